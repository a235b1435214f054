"""Dice, surface distances and volumes of a folder of predicted segmentations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree

from ..console.errors import first_of, in_words
from .labels import class_values, foreground_values
from .reading import read_segmentation

TOLERANCE_MM = 1.0
ROUNDING = 1e-6  # mm; two voxels of 0.1 mm are 0.2 mm apart, up to the rounding of floating point


@dataclass(frozen=True)
class ClassScore:
    """One class of one case. An empty mask leaves a metric undefined (nan), since there is no distance to nothing.

    Attributes:
        dice: In [0, 1]; nan where prediction and reference are both empty, 0 where only one is.
        hd95: 95th percentile Hausdorff distance in mm, the larger of the two directions; nan where either is empty.
        surface_dice: Part of both surfaces that lies within the tolerance of the other one, in [0, 1]; nan where both
            are empty, 0 where only one is.
        predicted_ml, reference_ml: Volumes, in millilitres; square centimetres of a 2D image.
    """

    dice: float
    hd95: float
    surface_dice: float
    predicted_ml: float
    reference_ml: float

    @property
    def volume_error(self) -> float:
        """(predicted - reference) / reference, signed; nan without a reference."""
        return (self.predicted_ml - self.reference_ml) / self.reference_ml if self.reference_ml else math.nan

    @property
    def absolute_volume_error(self) -> float:
        """|predicted - reference| / reference; nan without a reference."""
        return abs(self.volume_error)


@dataclass(frozen=True)
class CaseScore:
    """One case: its file name without the ending, and its foreground classes or regions by name."""

    case: str
    classes: dict[str, ClassScore]

    def values(self, metric: str) -> dict[str, float]:
        """An attribute of `ClassScore` by class."""
        return {name: getattr(score, metric) for name, score in self.classes.items()}

    def mean(self, metric: str) -> float:
        """Mean over the classes where it is defined; nan if it is nowhere."""
        return _mean([value for value in self.values(metric).values() if not math.isnan(value)])


@dataclass(frozen=True)
class Mean:
    """A mean, with the number of values that it leaves out.

    Attributes:
        value: Mean of the defined values; nan if there is none.
        defined: Number of values in the mean.
        undefined: Number of nan values left out of it.
    """

    value: float
    defined: int
    undefined: int


@dataclass(frozen=True)
class Segmentations:
    """How a data set's segmentations are stored, and their classes.

    Attributes:
        classes: Names and values, as in nnU-Net's `dataset.json`; several values are a region. The value 0 is
            background and not scored.
        ignore_label: Voxels of this value in the reference are judged nowhere.
        ending: Of the files.
        reader: nnU-Net's, which the plans name; it tells the spacing in mm (1 where a format, such as PNG, has none).
        values: Allowed values of a segmentation, which is refused where it has another. None: those of the classes, of
            which it must have one unless it is empty.
    """

    classes: Mapping[str, int | Sequence[int]]
    ignore_label: int | None = None
    ending: str = ".nii.gz"
    reader: BaseReaderWriter = field(default_factory=SimpleITKIO)
    values: frozenset[int] | None = None

    def files(self, folder: Path) -> list[Path]:
        """The segmentations in a folder, sorted, without other files of nnU-Net."""
        return sorted(path for path in Path(folder).glob(f"*{self.ending}") if path.name[0] != ".")


def evaluate_folder(
    predictions: Path,
    references: Path,
    kind: Segmentations,
    *,
    tolerance_mm: float = TOLERANCE_MM,
    cases: Sequence[str] | None = None,
    on_error: Callable[[str], None] | None = None,
    after_case: Callable[[str], None] = lambda name: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> list[CaseScore]:
    """Score every reference segmentation against the prediction of the same file name.

    Args:
        predictions: Folder of predicted segmentations, as `nnUNetv2_predict` writes it.
        references: Folder of reference segmentations.
        kind: How both are stored.
        tolerance_mm: Of the surface Dice.
        cases: Only these file names; None for every reference.
        on_error: Given what is wrong with a case, which is then left out; without it, that is raised.
        after_case: Called with each case's file name.
        on_note: Given, once, what to know about the distances if files do not tell their spacing.

    Returns:
        One score a reference, sorted by case. The values are those of MONAI's `compute_dice`,
        `compute_hausdorff_distance` and `compute_surface_dice`, given the image's spacing; see `score_class`.

    Raises:
        FileNotFoundError: If a folder or all references are missing, or one of them or its prediction is.
        ValueError: If a file cannot be read, has values that are no class, or a prediction's size or spacing is not
            its reference's, or the tolerance is negative.
    """
    predictions, references = Path(predictions), Path(references)
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"The surface Dice's tolerance is a distance in mm, 0 or more; got {tolerance_mm:g}.")
    for what, folder in (("predictions", predictions), ("references", references)):
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder of {what} {folder}.")
    names = [path.name for path in kind.files(references)] if cases is None else sorted(cases)
    if not names:
        raise FileNotFoundError(
            f"{references} holds no reference segmentation (*{kind.ending}); give a folder such as labelsTs."
        )
    missing = [name for name in names if not (predictions / name).is_file()]
    if missing and on_error is None:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} references have no prediction of the same name in {predictions}, the "
            f"first is {missing[0]}; predict these cases too, or evaluate against a folder without them."
        )
    scores, notes = [], set()
    for name in names:
        try:
            score, note = _evaluate_case(predictions / name, references / name, kind, tolerance_mm)
            scores.append(score)
            if note and note not in notes:
                notes.add(note)
                on_note(note)
        except Exception as error:  # one bad case must not stop the others
            if on_error is None:
                raise
            said = in_words(error)
            on_error(said if name in said else f"{name}: {said}")
        after_case(name)
    return scores


def read_labels(file: Path, kind: Segmentations) -> tuple[np.ndarray, tuple[float, ...] | None]:
    """A segmentation (z, y, x), and its spacing in mm; None where it is not stored.

    Raises:
        ValueError: It cannot be read, has several channels, or values that are no class of the data set.
    """
    labels, spacing = read_segmentation(kind.reader, file)
    check_values(file, labels, kind)
    return labels, spacing


def check_values(file: Path, labels: np.ndarray, kind: Segmentations) -> None:
    """Raise ValueError if a segmentation has values that are no class of the data set."""
    there = set(pd.unique(labels.ravel()).tolist()) - {0, kind.ignore_label}
    known = kind.values or {value for values in class_values(kind.classes).values() for value in values}
    unknown = sorted(there - known)
    if unknown and (kind.values is not None or len(unknown) == len(there)):
        shown = first_of([f"{value:g}" for value in unknown])
        raise ValueError(
            f"{file} has values that are no class: {shown}; those of the data set are "
            f"{', '.join(map(str, sorted(known)))}. Give segmentations with these."
        )


Grid = tuple[str | Path, tuple[int, ...], tuple[float, ...] | None]
"""A file, its shape (z, y, x) and its spacing in mm if it stores one."""


def check_same_voxels(one: Grid, other: Grid) -> None:
    """Raise ValueError unless two files have the same shape and, where both store it, the same spacing."""
    (file, shape, spacing), (other_file, other_shape, other_spacing) = one, other
    in_plane = [axis for axis, length in enumerate(shape) if length > 1]
    same = tuple(shape) == tuple(other_shape)
    if same and spacing is not None and other_spacing is not None:
        same = np.allclose(np.take(spacing, in_plane), np.take(other_spacing, in_plane), rtol=1e-3)
    if not same:
        told = [" (no spacing)" if s is None else f" and spacing {s} mm" for s in (spacing, other_spacing)]
        raise ValueError(
            f"{file} has shape {tuple(shape)}{told[0]}, {other_file} {tuple(other_shape)}{told[1]}; a segmentation and "
            f"what it is compared with must describe the same voxels, so give those that belong to the same image."
        )


def mean_score(scores: Sequence[CaseScore], metric: str, name: str | None = None) -> Mean:
    """Mean over the classes of their means over cases, as nnU-Net's `foreground_mean`.

    Args:
        scores: What `evaluate_folder` returned.
        metric: An attribute of `ClassScore`.
        name: Only this class.

    Returns:
        The mean, and how many pairs of a case and a class have a value, and how many none.
    """
    of_class: dict[str, list[float]] = {}
    for score in scores:
        for key, value in score.values(metric).items():
            if name in (None, key):
                of_class.setdefault(key, []).append(value)
    defined = [[value for value in values if not math.isnan(value)] for values in of_class.values()]
    count = sum(map(len, defined))
    mean = _mean([_mean(values) for values in defined if values])
    return Mean(mean, defined=count, undefined=sum(map(len, of_class.values())) - count)


def score_class(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance_mm: float = TOLERANCE_MM
) -> ClassScore:
    """Score one binary mask.

    A mask's surface is its voxels with a neighbour along an axis outside of the mask; distances are between the centres
    of such voxels. HD95: Huttenlocher et al., IEEE TPAMI 15 (1993) 850, with the 95th percentile of each direction's
    distances in the place of their maximum. Surface Dice: Nikolov et al., arXiv 1809.04430, with the number of surface
    voxels in the place of areas. MONAI defines both so.

    Args:
        prediction: Boolean mask, 2D or 3D.
        reference: Boolean mask of the same shape.
        spacing: Voxel size in mm, one value an axis of the arrays.
        tolerance_mm: Of the surface Dice.
    """
    # An axis of a single voxel has no neighbours: with it, every voxel would be surface.
    axes = [axis for axis, length in enumerate(reference.shape) if length > 1] or [0]
    shape, spacing = [reference.shape[axis] for axis in axes], [float(spacing[axis]) for axis in axes]
    prediction, reference = prediction.reshape(shape), reference.reshape(shape)
    millilitres = math.prod(spacing) / (1000 if len(spacing) == 3 else 100)
    sums = {"predicted_ml": prediction, "reference_ml": reference}
    volumes = {name: float(mask.sum() * millilitres) for name, mask in sums.items()}
    if not prediction.any() or not reference.any():
        overlap = 0.0 if prediction.any() or reference.any() else math.nan
        return ClassScore(dice=overlap, hd95=math.nan, surface_dice=overlap, **volumes)
    box = bounding_box(prediction | reference)
    prediction, reference = prediction[box], reference[box]
    dice = 2 * (prediction & reference).sum() / (prediction.sum() + reference.sum())
    surfaces = [_surface(mask, spacing) for mask in (prediction, reference)]
    distances = [KDTree(to).query(of)[0] for of, to in (surfaces, surfaces[::-1])]
    hd95 = max(np.percentile(of_one, 95) for of_one in distances)
    near = np.concatenate(distances) <= tolerance_mm + ROUNDING
    return ClassScore(dice=float(dice), hd95=float(hd95), surface_dice=float(near.mean()), **volumes)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Of a mask with at least one voxel, with a voxel of margin where there is room."""
    box = []
    for axis in range(mask.ndim):
        filled = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(max(0, filled[0] - 1), filled[-1] + 2))
    return tuple(box)


def _evaluate_case(
    prediction_file: Path, reference_file: Path, kind: Segmentations, tolerance_mm: float
) -> tuple[CaseScore, str | None]:
    """A case's score, and a remark about its distances."""
    for what, path in (("prediction", prediction_file), ("reference", reference_file)):
        if not path.exists():
            raise FileNotFoundError(f"Case {path.name} has no {what} in {path.parent}.")
    (prediction, spacing), (reference, reference_spacing) = (
        read_labels(path, kind) for path in (prediction_file, reference_file)
    )
    check_same_voxels(
        (prediction_file, prediction.shape, spacing), (reference_file, reference.shape, reference_spacing)
    )
    note = None
    if spacing is None and reference_spacing is None:
        note = "Neither segmentations nor references tell a spacing: distances and volumes are as if voxels had 1 mm."
    elif reference_spacing is None:
        note = f"References in {reference_file.parent} tell no spacing: that of the segmentations is taken."
    elif spacing is None:
        note = f"Segmentations in {prediction_file.parent} tell no spacing: that of the references is taken."
    spacing = reference_spacing or spacing or (1.0, 1.0, 1.0)
    something = (prediction != 0) | (reference != 0)
    if something.any():  # the rest of a large image would only cost time, class by class
        box = bounding_box(something)
        prediction, reference = prediction[box], reference[box]
    judged = True if kind.ignore_label is None else reference != kind.ignore_label
    scores = {}
    for name, values in foreground_values(kind.classes, kind.ignore_label).items():
        masks = (np.isin(image, values) & judged for image in (prediction, reference))
        scores[name] = score_class(*masks, spacing, tolerance_mm)
    return CaseScore(reference_file.name.removesuffix(kind.ending), scores), note


def _surface(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """A mask's surface voxels, (voxels, axes), in mm."""
    return np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
