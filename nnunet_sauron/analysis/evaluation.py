"""Dice, surface distances and volumes of a folder of predicted segmentations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

# What nnU-Net writes beside the segmentations.
NOT_IMAGES = {".json", ".pkl", ".npz", ".csv", ".txt"}
TOLERANCE_MM = 1.0


@dataclass(frozen=True)
class ClassScore:
    """One class of one case. An empty mask leaves a metric undefined (nan), since there is no distance to nothing.

    Attributes:
        dice: In [0, 1]; nan where prediction and reference are both empty, 0 where only one is.
        hd95: 95th percentile Hausdorff distance in mm, the larger of the two directions; nan where either is empty.
        surface_dice: Part of both surfaces that lies within the tolerance of the other one, in [0, 1]; nan where both
            are empty, 0 where only one is.
        predicted_ml, reference_ml: Volumes, in millilitres (square centimetres of a 2D image, as if 1 cm thick).
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
    """A mean that says what it leaves out.

    Attributes:
        value: Mean of the defined values; nan if there is none.
        defined: Number of values in the mean.
        undefined: Number of nan values left out of it.
    """

    value: float
    defined: int
    undefined: int


def evaluate_folder(
    predictions: Path,
    references: Path,
    labels: Mapping[str, int | Sequence[int]],
    *,
    tolerance_mm: float = TOLERANCE_MM,
    ignore_label: int | None = None,
    cases: Sequence[str] | None = None,
) -> list[CaseScore]:
    """Score every reference segmentation against the prediction of the same file name.

    Args:
        predictions: Folder of predicted segmentations, as `nnUNetv2_predict` writes it.
        references: Folder of reference segmentations; other files than images are passed over.
        labels: Class names and their values, as in nnU-Net's `dataset.json`; several values are a region. The value 0
            is background and not scored.
        tolerance_mm: Of the surface Dice.
        ignore_label: Voxels of this value in the reference are judged nowhere.
        cases: Only these file names; None for every reference.

    Returns:
        One score a reference, sorted by case.

    Raises:
        FileNotFoundError: If there is no reference, or one has no prediction.
        ValueError: If a prediction's size or spacing is not its reference's, or the tolerance is negative.

    Source: MONAI's `compute_dice`, `compute_hausdorff_distance` and `compute_surface_dice`, with the image's spacing.
    """
    predictions, references = Path(predictions), Path(references)
    if tolerance_mm < 0:
        raise ValueError(f"The surface Dice's tolerance is a distance in mm, 0 or more; got {tolerance_mm:g}.")
    files = [references / name for name in cases] if cases is not None else segmentation_files(references)
    if not files:
        raise FileNotFoundError(f"{references} holds no reference segmentation; give a folder such as labelsTs.")
    for what, missing in (
        ("reference", [path.name for path in files if not path.is_file()]),
        ("prediction", [path.name for path in files if not (predictions / path.name).is_file()]),
    ):
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(files)} cases have no {what} of the same name in "
                f"{references if what == 'reference' else predictions}, the first is {missing[0]}; predict these cases "
                f"too, or evaluate against a folder without them."
            )
    labels = {name: (value,) if isinstance(value, int) else tuple(value) for name, value in labels.items()}
    return [_evaluate_case(predictions / path.name, path, labels, tolerance_mm, ignore_label) for path in files]


def segmentation_files(folder: Path) -> list[Path]:
    """The segmentations in a folder, sorted, without what nnU-Net writes beside them."""
    return sorted(path for path in Path(folder).glob("*.*") if path.suffix not in NOT_IMAGES and path.name[0] != ".")


def mean_score(scores: Sequence[CaseScore], metric: str, name: str | None = None) -> Mean:
    """Mean over all cases and classes, with the count of the values that are not defined.

    Args:
        scores: What `evaluate_folder` returned.
        metric: An attribute of `ClassScore`.
        name: Only this class.
    """
    values = [v for score in scores for key, v in score.values(metric).items() if name is None or key == name]
    defined = [value for value in values if not math.isnan(value)]
    return Mean(_mean(defined), defined=len(defined), undefined=len(values) - len(defined))


def score_class(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance_mm: float = TOLERANCE_MM
) -> ClassScore:
    """Score one binary mask.

    Args:
        prediction: Boolean mask, 2D or 3D.
        reference: Boolean mask of the same shape.
        spacing: Voxel size in mm, one value an axis of the arrays.
        tolerance_mm: Of the surface Dice.
    """
    millilitres = math.prod(spacing) / (1000 if len(spacing) == 3 else 100)
    sums = {"predicted_ml": prediction, "reference_ml": reference}
    volumes = {name: float(mask.sum() * millilitres) for name, mask in sums.items()}
    if not prediction.any() or not reference.any():
        overlap = 0.0 if prediction.any() or reference.any() else math.nan
        return ClassScore(dice=overlap, hd95=math.nan, surface_dice=overlap, **volumes)
    # MONAI takes (batch, class, *space).
    masks = [torch.from_numpy(np.ascontiguousarray(mask))[None, None].float() for mask in (prediction, reference)]
    options = {"include_background": True, "spacing": list(spacing)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.5 and 1.6 warn of a call of their own
        dice = compute_dice(*masks)
        hd95 = compute_hausdorff_distance(*masks, percentile=95, **options)
        surface_dice = compute_surface_dice(*masks, class_thresholds=[tolerance_mm], **options)
    return ClassScore(dice=float(dice), hd95=float(hd95), surface_dice=float(surface_dice), **volumes)


def _evaluate_case(
    prediction_file: Path,
    reference_file: Path,
    labels: Mapping[str, tuple[int, ...]],
    tolerance_mm: float,
    ignore_label: int | None,
) -> CaseScore:
    prediction, reference = (SimpleITK.ReadImage(str(path)) for path in (prediction_file, reference_file))
    if prediction.GetSize() != reference.GetSize() or not np.allclose(
        prediction.GetSpacing(), reference.GetSpacing(), rtol=1e-3
    ):
        raise ValueError(
            f"{prediction_file} has size {prediction.GetSize()} and spacing {prediction.GetSpacing()} mm, its "
            f"reference {reference_file} {reference.GetSize()} and {reference.GetSpacing()} mm; they must describe the "
            "same voxels, so predict from the image that belongs to the reference."
        )
    spacing = reference.GetSpacing()[::-1]  # SimpleITK counts axes x, y, z; its arrays are z, y, x
    prediction, reference = SimpleITK.GetArrayFromImage(prediction), SimpleITK.GetArrayFromImage(reference)
    judged = True if ignore_label is None else reference != ignore_label
    scores = {
        name: score_class(
            np.isin(prediction, values) & judged, np.isin(reference, values) & judged, spacing, tolerance_mm
        )
        for name, values in labels.items()
        if values != (0,)
    }
    return CaseScore(reference_file.name.split(".")[0], scores)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
