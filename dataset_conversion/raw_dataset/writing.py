"""Writing a data set that was checked: its images and segmentations, and the files that describe it."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel
import numpy as np

from ...console.progress import Progress
from .cases import Case, Dataset, Image
from .nifti import is_minc, load, read_mask
from .parallel import in_parallel

ENDING = ".nii.gz"
CHUNK = 1 << 22


@dataclass(frozen=True)
class Written:
    """What became of one case.

    Attributes:
        checksums: SHA-256 of its source files.
        linked, copied: How many of its files are links, and how many are not.
        crop: First and last plus one voxel of each axis (x, y, z), the shape before, and the whole's name; None if
            nothing was cropped.
    """

    checksums: dict[str, str]
    linked: int
    copied: int
    crop: dict[str, list | str] | None = None


def write_dataset(
    dataset: Dataset,
    folder: Path,
    splits: list[dict[str, list[str]]] | None,
    record: Mapping[str, object],
    *,
    link: bool,
    processes: int,
    progress: Progress,
) -> dict[str, int]:
    """Write a data set that was checked.

    nnU-Net's planner copies splits_final.json from here to nnUNet_preprocessed, where training reads it.

    Args:
        dataset: What was checked.
        folder: An empty folder, which is to become the data set's.
        splits: The folds; None for no file.
        record: For conversion.json, beside the cases with their sources and checksums.
        link: Link what can be.
        processes: How many.
        progress: Shows a bar.

    Returns:
        How many files were linked and how many were copied or written anew.

    Raises:
        OSError: It could not be written.
    """
    from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir()
    if any(case.masks and not case.training for case in dataset.cases):
        (folder / "labelsTs").mkdir()
    write = partial(write_case, folder=folder, link=link)
    written = in_parallel(write, dataset.cases, processes, progress, "writing")
    generate_dataset_json(
        str(folder),
        dict(enumerate(dataset.channel_names)),
        dict(dataset.labels),
        len(dataset.training),
        ENDING,
        regions_class_order=dataset.regions_class_order,
        dataset_name=dataset.name,
        reference=dataset.reference,
        description=dataset.description,
        license=dataset.licence,
        converted_by=f"nnunet-sauron {record['version']}",
    )
    if splits is not None:
        (folder / "splits_final.json").write_text(json.dumps(splits, indent=2), "utf-8")
    counts = {"linked": sum(case.linked for case in written), "copied": sum(case.copied for case in written)}
    cases = [_case_record(*pair) for pair in zip(dataset.cases, written, strict=True)]
    text = json.dumps({**record, **counts, "notes": dataset.notes, "cases": cases}, indent=2)
    (folder / "conversion.json").write_text(text, "utf-8", "backslashreplace")
    return counts


def write_case(case: Case, folder: Path, link: bool) -> Written:
    """Write the images and the segmentation of one case.

    Images of three axes are copied byte by byte (compressed if they are not) or linked. Segmentations that are whole
    numbers with the image's own header are too; others are written with it.
    """
    suffix, links = "Tr" if case.training else "Ts", []
    geometry = load(case.images[0].file)
    labelled = bool(case.masks or case.blank)
    labels = where = None
    if labelled and (case.crop or not _as_it_is(case, geometry)):
        masks = [read_mask(mask)[1] for mask in case.masks]
        labels = sum(masks, np.zeros(geometry.shape[:3], np.uint8))  # they do not overlap
        where = case.crop(masks) if case.crop else None
    for number, image in enumerate(case.images):
        target = folder / f"images{suffix}" / f"{case.name}_{number:04d}{ENDING}"
        stored = load(image.file)
        if where is None and len(stored.shape) == 3 and not is_minc(image.file):
            links.append(_copy(image.file, target, link))
        else:
            nibabel.save(_part(stored, _voxels(stored, image), where), target)
            links.append(False)
    if labelled:
        target = folder / f"labels{suffix}" / f"{case.name}{ENDING}"
        if labels is None:
            links.append(_copy(case.masks[0].file, target, link))
        else:
            nibabel.save(_part(geometry, labels, where), target)
            links.append(False)
    crop = where and {
        "voxels": [[part.start, part.stop] for part in where], "of": list(geometry.shape[:3]), "whole": case.whole
    }  # fmt: skip
    checksums = {str(file): _checksum(file) for file in case.files}
    return Written(checksums, linked=sum(links), copied=len(links) - sum(links), crop=crop)


def _as_it_is(case: Case, image: nibabel.Nifti1Image) -> bool:
    """Whether the segmentation's file can stand for what would be written."""
    if len(case.masks) != 1 or case.masks[0].values is not None or is_minc(case.masks[0].file):
        return False
    mask = load(case.masks[0].file)
    fields = ("dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d")
    fields += ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units")
    return (
        len(mask.shape) == 3  # axes of length 1 behind them are lost from images, too
        and mask.get_data_dtype().kind in "iu"
        and mask.dataobj.slope == 1
        and mask.dataobj.inter == 0
        and type(mask.header) is type(image.header)
        and all(np.array_equal(mask.header[name], image.header[name]) for name in fields)
    )


def _voxels(stored: nibabel.Nifti1Image, image: Image) -> np.ndarray:
    voxels = np.asanyarray(stored.dataobj if image.channel is None else stored.dataobj[..., image.channel])
    return voxels.reshape(voxels.shape[:3])


def _part(geometry: nibabel.Nifti1Image, voxels: np.ndarray, where: tuple[slice, ...] | None) -> nibabel.Nifti1Image:
    """Voxels (x, y, z), or a part of them, as an image that lies where they lie in `geometry`."""
    header = geometry.header.copy()
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    whole = nibabel.Nifti1Image(voxels, geometry.affine, header)
    return whole if where is None else whole.slicer[where]


def _copy(source: Path, target: Path, link: bool) -> bool:
    """Link a file if asked to and if it is compressed, as all files of a data set must be; else copy its bytes.

    Returns:
        Whether it was linked.
    """
    with source.open("rb") as opened:
        compressed = opened.read(2) == b"\x1f\x8b"
    if compressed and link:
        target.symlink_to(source.resolve())
        return True
    if compressed:
        shutil.copyfile(source, target)
    else:
        with source.open("rb") as opened, gzip.open(target, "wb", compresslevel=6) as packed:
            shutil.copyfileobj(opened, packed, CHUNK)
    return False


def _checksum(file: Path) -> str:
    total = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()


def _case_record(case: Case, written: Written) -> dict[str, object]:
    record = {
        "name": case.name,
        "group": case.group or case.name,
        "training": case.training,
        "images": [{"file": str(image.file), "channel": image.channel} for image in case.images],
        "masks": [{"file": str(mask.file), "values": mask.values and dict(mask.values)} for mask in case.masks],
        "sha256": written.checksums,
    }
    return record if written.crop is None else {**record, "crop": written.crop}
