"""Crops around a structure, and predictions of crops put back into the volumes that they were taken from."""

from __future__ import annotations

import argparse
import itertools
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np

from ...files import check_writable, new_folder, read_json_object
from .cases import Mask, Problems
from .command import exit_code
from .nifti import read_mask
from .tree import images

Part = tuple[slice, slice, slice]


def around(masks: Sequence[np.ndarray], which: int, size: int) -> Part:
    """A box of `size` voxels along each axis, centred on the bounding box of a mask and moved into the volume.

    Along an axis that has fewer voxels than that it takes all of them.

    Args:
        masks: (x, y, z) each, of one shape.
        which: The one in the middle.
        size: In voxels.

    Raises:
        ValueError: The mask is empty, or does not fit into such a box.
    """
    there = np.argwhere(masks[which])
    if not len(there):
        raise ValueError(f"there is nothing to crop {size} voxels around: the mask is empty")
    low, high, shape = there.min(axis=0), there.max(axis=0) + 1, np.array(masks[which].shape)
    if (high - low > size).any():
        raise ValueError(
            f"the mask is {(high - low).tolist()} voxels large; a crop of {size} would cut it: --crop-size "
            f"{max(high - low)}"
        )
    length = np.minimum(size, shape)
    start = np.clip((low + high - length) // 2, 0, shape - length)
    return tuple(slice(int(first), int(first + count)) for first, count in zip(start, length, strict=True))


def undo(predictions: Path, output: Path, conversion: Path) -> int:
    """Put predictions of crops back into whole volumes; where two crops overlap, that with the nearer centre counts.

    Args:
        predictions: A folder of nnU-Net's: CASE.nii.gz. Cases that were not cropped are passed on.
        output: A folder to make.
        conversion: The data set's conversion.json.

    Returns:
        How many volumes were written.

    Raises:
        ValueError: Predictions are damaged, of other cases, not of the crops' shape, or not of all crops of a volume;
            all problems are named.
        OSError: A folder or file is missing, or cannot be written.
    """
    cases = _cases(conversion)
    if not predictions.is_dir():
        raise FileNotFoundError(f"{predictions} is no folder; give one with predictions of nnU-Net.")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; give another folder with -o.")
    check_writable(output)
    problems, wholes = Problems(), defaultdict(dict)
    found = images(predictions, problems)
    for name in found:
        if name not in cases:
            problems.add(found[name], f"{conversion} has no case of this name")
        else:
            crop = cases[name]
            wholes[crop["whole"] if crop else name][name] = crop
    for whole, parts in wholes.items():
        for name in (name for name, crop in cases.items() if crop and crop["whole"] == whole and name not in parts):
            problems.add(predictions, f"there is no {name}.nii.gz, the other crop of {whole}")
    if not found:
        problems.add(predictions, "there is no prediction CASE.nii.gz")
    with new_folder(output) as beside:
        for whole, parts in sorted(wholes.items()):
            try:
                nibabel.save(_join({found[name]: crop for name, crop in parts.items()}), beside / f"{whole}.nii.gz")
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("Nothing was written:\n" + "\n".join(f"  {problem}" for problem in problems))
    return len(wholes)


def undo_main(number: int, arguments: Sequence[str] | None = None) -> int:
    """The command line of `undo`.

    Args:
        number: The data set's, if none is given.
        arguments: Those of the command line by default.

    Returns:
        The exit code: 0, 2 after an error, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(description="Puts predictions of crops back into whole volumes.")
    parser.add_argument("--undo-crop", metavar="PREDICTIONS", type=Path, required=True, help="folder of nnU-Net's")
    parser.add_argument("-o", dest="output", metavar="OUT", type=Path, required=True, help="folder to make")
    parser.add_argument("-d", dest="number", metavar="ID", type=int, default=number, help="data set; %(default)s")
    options = parser.parse_args(arguments)

    def work() -> None:
        raw = os.environ.get("nnUNet_raw")
        found = sorted(Path(raw).glob(f"Dataset{options.number:03d}_*/conversion.json")) if raw else []
        if len(found) != 1:
            raise FileNotFoundError(
                f"Expected one Dataset{options.number:03d}_*/conversion.json in nnUNet_raw ({raw or 'not set'}), "
                f"found {len(found)}. It tells where the crops lie: give the data set with -d."
            )
        print(f"{options.output}: {undo(options.undo_crop, options.output, found[0])} volumes")

    return exit_code(work)


def _cases(conversion: Path) -> dict[str, dict | None]:
    """Every case's crop, or None."""
    told = read_json_object(conversion, "convert the data set anew")
    try:
        cases = {case["name"]: case.get("crop") for case in told["cases"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{conversion} was not written by a conversion ({error!r}); convert anew.") from error
    if not any(cases.values()):
        raise ValueError(f"{conversion} tells of no crops; the data set was converted without --crop.")
    for name, crop in cases.items():
        if crop is not None and not _is_crop(crop):
            raise ValueError(
                f"{conversion}: the crop of {name} is {crop}, expected 'whole', a name, and 'voxels', first and end of "
                f"three axes, within 'of', a shape; convert the data set anew."
            )
    return cases


def _is_crop(crop: object) -> bool:
    """Whether it is as a conversion writes it."""
    try:
        whole, ends, shape = (crop[key] for key in ("whole", "voxels", "of"))
        numbers = [*shape, *itertools.chain(*ends)]
        inside = all(0 <= first < end <= length for (first, end), length in zip(ends, shape, strict=True))
        return (
            len(shape) == 3 and inside and all(isinstance(number, int) for number in numbers)
            and whole != "" and whole == Path(whole).name
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return False


def _join(parts: Mapping[Path, dict | None]) -> nibabel.Nifti1Image:
    """The whole volume of its crops' predictions, by file; of one that was not cropped, what it is."""
    whole = nearest = affine = None
    for file, crop in parts.items():
        stored, labels = read_mask(Mask(file))
        crop = crop or {"voxels": [[0, length] for length in labels.shape], "of": labels.shape}
        where = tuple(slice(*ends) for ends in crop["voxels"])
        if labels.shape != (expected := tuple(part.stop - part.start for part in where)):
            raise ValueError(f"{file} has the shape {labels.shape}; the crop has {expected}")
        first = nibabel.affines.apply_affine(stored.affine, [-part.start for part in where])
        placed = nibabel.affines.from_matvec(stored.affine[:3, :3], first)
        if whole is None:
            whole, affine = np.zeros(crop["of"], np.uint8), placed
            nearest = np.full(crop["of"], np.inf, np.float32)
        elif whole.shape != tuple(crop["of"]) or not np.allclose(affine, placed, atol=0.01):
            raise ValueError(f"{file} does not lie where the other crop of its volume has it")
        centre = [(part.start + part.stop - 1) / 2 for part in where]
        away = sum((axis - middle) ** 2 for axis, middle in zip(np.ogrid[where], centre, strict=True))
        closer = away < nearest[where]
        whole[where][closer] = labels[closer]
        nearest[where][closer] = away[closer]
    image = nibabel.Nifti1Image(whole, affine)
    image.header.set_xyzt_units("mm")
    return image
