"""Images in nnU-Net's naming, as nnU-Net reads and preprocesses them for a trained model."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nnunet_sauron_runtime.preprocessing import MOST_VOXELS
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from ..console.progress import Progress
from .evaluation import check_same_voxels, read_labels
from .preprocessing import check_preprocessing
from .reading import check_file, missing_spacing, not_finite, read_image
from .trained import TrainedModel


@dataclass(frozen=True)
class Case:
    """One case's image files, one a modality: NAME_0000.ending, NAME_0001.ending, ..."""

    name: str
    files: tuple[str, ...]


def find_cases(folder: Path, model: TrainedModel) -> list[Case]:
    """The cases of a folder of images, sorted by name.

    Raises:
        FileNotFoundError: The folder is missing or holds no image of the model's file ending.
        ValueError: A case lacks a channel or has another number of them than the model takes, or the first one cannot
            be read; or plans.json does not tell how to preprocess them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one of images such as imagesTs.")
    check_preprocessing(model)
    ending = model.dataset_json["file_ending"]
    found: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if name := _name(path, ending):
            found.setdefault(name, []).append(str(path))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no image in nnU-Net's naming, such as CASE_0000{ending} (the model reads {ending})."
        )
    cases = [Case(name, tuple(files)) for name, files in found.items()]
    for case in cases:
        _check_numbers(case, model)
    # A file may hold several channels (RGB), so one case of each number of files is read.
    for case in {len(case.files): case for case in reversed(cases)}.values():
        read_case(model, case)
    return cases


def case_of(image: Path, model: TrainedModel) -> Case:
    """The whole case, given one of its files.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is not named CASE_0000 and the model's file ending, or a channel is missing beside it; or
            plans.json does not tell how to preprocess it.
    """
    check_preprocessing(model)
    ending = model.dataset_json["file_ending"]
    name = _name(image, ending)
    if name is None:
        raise ValueError(
            f"{image} is not in nnU-Net's naming: CASE_0000{ending}, where 0000 is the channel "
            f"({', '.join(model.channel_names)}); rename it, and give other channels beside it as "
            f"CASE_0001{ending}, ..."
        )
    if not image.is_file():
        raise FileNotFoundError(f"There is no image {image}.")
    case = Case(name, tuple(str(path) for path in sorted(image.parent.iterdir()) if _name(path, ending) == name))
    _check_numbers(case, model)
    return case


def check_cases(
    model: TrainedModel, cases: Sequence[Case], progress: Progress, labels: Mapping[str, Path] | None = None, *,
    segmented: bool = False,
) -> None:  # fmt: skip
    """Read every image, and the reference segmentations that there are, before anything that takes long.

    Args:
        model: The model.
        cases: The cases.
        progress: Shows a bar, and names images with values that are not finite where nnU-Net reads these as 0,
            those whose spacing nothing tells, and cases whose channels lie in different places; warns of segmentations.
        labels: Reference segmentations by the case's name.
        segmented: nnU-Net is to write segmentations of them, which it does not for images of four axes.

    Raises:
        ValueError: Images or references cannot be used; all of them are named.
    """
    labels, wrong, only_labels = labels or {}, [], True
    with progress.bar("checking images", len(cases)) as step:
        for case in cases:
            try:
                image, properties = read_case(model, case, progress.say)
                only_labels = only_labels and _has_only_labels(image, model)
                if segmented:
                    _check_three_axes(case, properties)
                for file in case.files:
                    if zeros := not_finite(model.segmentations.reader, file):
                        progress.say(f"{file} has {zeros} values that are nan or infinite: nnU-Net reads them as 0")
                if missing := missing_spacing(model.segmentations.reader, case.files[0]):
                    progress.say(f"{missing} is not there: nnU-Net takes the voxels of {case.name} for 1 mm long")
                if case.name in labels:
                    reference, spacing = read_labels(labels[case.name], model.segmentations)
                    of_image = (case.files[0], image.shape[1:], tuple(map(float, properties["spacing"])))
                    check_same_voxels(of_image, (labels[case.name], reference.shape, spacing))
            except ValueError as error:
                wrong.append(str(error))
            step(case.name)
    if wrong:
        several = f"{len(wrong)} of {len(cases)} cases cannot be used. " if len(wrong) > 1 else ""
        raise ValueError(several + "\n".join(wrong))
    if only_labels:
        progress.say(
            "WARNING: every voxel of every image has the number of one of the model's classes, as in segmentations. If "
            "this is a folder of labels, give that of the images with -i"
        )


def _has_only_labels(image: np.ndarray, model: TrainedModel) -> bool:
    highest = max(value for values in model.classes.values() for value in values)
    return image.min() >= 0 and image.max() <= highest and bool((image == image.round()).all())


def _check_three_axes(case: Case, properties: dict) -> None:
    axes = len(properties.get("sitk_stuff", {}).get("spacing", ()))
    if axes > 3:
        raise ValueError(
            f"{', '.join(case.files)} has {axes} axes, for which nnU-Net writes no segmentation; expected 2 or 3. Save "
            f"each channel as a file of its own: {case.name}_0000, {case.name}_0001, ..."
        )


def read_case(
    model: TrainedModel, case: Case, say: Callable[[str], None] = lambda line: None
) -> tuple[np.ndarray, dict]:
    """Image (channels, z, y, x), and the properties that nnU-Net's reader gives for it; `say` as in `read_image`.

    Raises:
        ValueError: A file is damaged, the files do not go together, or the image is not what the model takes: it has
            another number of channels or axes, or values that are not finite.
    """
    image, properties = read_image(model.manager.image_reader_writer_class(), case.files, say)
    files = ", ".join(case.files)
    if len(image) != model.input_channels:
        ending = model.dataset_json["file_ending"]
        raise ValueError(
            f"Case {case.name} has {len(image)} channels in {files}; the model takes {model.input_channels} "
            f"({', '.join(model.channel_names)}). Name files as for training, beside each other: CASE_0000{ending}, "
            f"CASE_0001{ending}, ..."
        )
    if len(model.patch_size) == 3 and len(properties.get("sitk_stuff", {}).get("spacing", ())) == 2:
        raise ValueError(
            f"Case {case.name} is a 2D image ({files}); the model takes 3D images. Give the whole volume, or a model "
            f"of configuration 2d."
        )
    _check_spacing(model, case, image.shape[1:], properties["spacing"])
    finite = np.isfinite(image)
    if not finite.all():
        raise ValueError(
            f"Case {case.name} has voxels that are not finite: {image.size - np.count_nonzero(finite)} are nan or "
            f"infinite in {files}, and nnU-Net would give nothing but nan. Mend the image or leave it out."
        )
    return image, properties


def _check_spacing(model: TrainedModel, case: Case, shape: Sequence[int], spacing: Sequence[float]) -> None:
    """Raise ValueError where nothing of an image, or more than any memory holds, is left at the model's spacing."""
    forward = model.manager.transpose_forward
    own = [float(spacing[axis]) for axis in forward]
    wanted = list(model.manager.get_configuration(model.configuration).spacing)
    wanted = [*own[: 3 - len(wanted)], *wanted]
    resampled = compute_new_shape([shape[axis] for axis in forward], own, wanted)
    if min(resampled) < 1 or math.prod(map(int, resampled)) > MOST_VOXELS:
        raise ValueError(
            f"Case {case.name} ({', '.join(case.files)}) has {' x '.join(map(str, shape))} voxels of "
            f"{' x '.join(f'{float(length):g}' for length in spacing)} mm, which are {' x '.join(map(str, resampled))} "
            f"at the model's spacing of {' x '.join(f'{length:g}' for length in wanted)} mm. Mend the image's spacing, "
            f"or leave it out."
        )


def preprocess(
    model: TrainedModel, image: np.ndarray, properties: dict, labels: np.ndarray | None = None
) -> tuple[torch.Tensor, np.ndarray | None, dict]:
    """nnU-Net's preprocessing of a case, as before its prediction.

    Args:
        model: The model.
        image: (channels, z, y, x).
        properties: Of the image.
        labels: Its segmentation, (1, z, y, x), to be brought to the same grid.

    Returns:
        Image (channels, *voxels) in float32, segmentation (1, *voxels) or nnU-Net's stand-in if there is none, and the
        properties that say where this lies in the original.
    """
    manager = model.manager
    configuration = manager.get_configuration(model.configuration)
    preprocessor = configuration.preprocessor_class(verbose=False)
    image, labels, properties = preprocessor.run_case_npy(
        image, labels, dict(properties), manager, configuration, model.dataset_json
    )
    return torch.from_numpy(np.asarray(image, dtype=np.float32)), labels, properties


def _name(path: Path, ending: str) -> str | None:
    """The case's name if the file is in nnU-Net's naming, and not hidden (such as ._CASE_0000.nii.gz of macOS)."""
    named = re.fullmatch(rf"([^.].*)_\d{{4}}{re.escape(ending)}", path.name, re.DOTALL)
    return named[1] if named else None


def _check_numbers(case: Case, model: TrainedModel) -> None:
    """Raise ValueError where a channel is missing: nnU-Net takes files in their order, so others would stand for it."""
    ending = model.dataset_json["file_ending"]
    numbers = [int(file.removesuffix(ending)[-4:]) for file in case.files]
    if numbers != list(range(len(numbers))):
        raise ValueError(
            f"Case {case.name} has the channels {', '.join(f'{number:04d}' for number in numbers)} "
            f"({', '.join(case.files)}); expected 0000, 0001, ... without a gap, for {len(model.channel_names)} "
            f"channels ({', '.join(model.channel_names)}). Rename the files, or put those that are missing beside them."
        )


def predict_case(predictor: nnUNetPredictor, case: Case, folder: Path) -> Path:
    """Segment a case by nnU-Net, into a file of its name; what nnU-Net prints meanwhile is left out.

    Args:
        predictor: As `TrainedModel.predictor` makes it.
        case: The case.
        folder: Where the segmentation is written, with the data set's ending.

    Returns:
        The file.

    Raises:
        OSError: There is no room.
    """
    file = folder / (case.name + predictor.dataset_json["file_ending"])
    with contextlib.redirect_stdout(io.StringIO()):
        predictor.predict_from_files_sequential([list(case.files)], [str(folder / case.name)])
    try:
        check_file(file)  # SimpleITK does not tell that a NIfTI file did not fit onto the disk
    except ValueError as error:
        raise OSError(errno.ENOSPC, f"{file.name} was written in part") from error
    return file
