"""Dice and 95th percentile Hausdorff distance of a folder of predicted segmentations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance

# What nnU-Net writes beside the segmentations.
NOT_IMAGES = {".json", ".pkl", ".npz", ".csv", ".txt"}


@dataclass(frozen=True)
class CaseScore:
    """One case's scores, a value for each foreground class.

    Attributes:
        case: File name without its ending.
        dice: Dice in [0, 1]; nan where prediction and reference are both empty, 0 where only one is.
        hd95: 95th percentile Hausdorff distance in mm, the larger of the two directions; nan where prediction or
            reference is empty, since there is no distance to nothing.
    """

    case: str
    dice: dict[str, float]
    hd95: dict[str, float]


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


def evaluate_folder(predictions: Path, references: Path, labels: Mapping[str, int]) -> list[CaseScore]:
    """Score every reference segmentation against the prediction of the same file name.

    Args:
        predictions: Folder of predicted segmentations, as `nnUNetv2_predict` writes it.
        references: Folder of reference segmentations; other files than images are passed over.
        labels: Class names and their values, as in nnU-Net's `dataset.json`. The value 0 is background and not scored.

    Returns:
        One score a reference, sorted by case.

    Raises:
        FileNotFoundError: If there is no reference, or one has no prediction.
        ValueError: If a prediction's size or spacing is not its reference's.

    Source: MONAI's `compute_dice` and `compute_hausdorff_distance`, with the image's spacing.
    """
    predictions, references = Path(predictions), Path(references)
    files = sorted(path for path in references.glob("*.*") if path.suffix not in NOT_IMAGES and path.name[0] != ".")
    if not files:
        raise FileNotFoundError(f"{references} holds no reference segmentation; give a folder such as labelsTs.")
    missing = [path.name for path in files if not (predictions / path.name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} references have no prediction of the same name in {predictions}, the "
            f"first is {missing[0]}; predict these cases too, or evaluate against a folder without them."
        )
    return [_evaluate_case(predictions / path.name, path, labels) for path in files]


def mean_score(scores: Sequence[CaseScore], metric: Callable[[CaseScore], Mapping[str, float]]) -> Mean:
    """Mean over all cases and classes, with the count of the values that are not defined.

    Args:
        scores: What `evaluate_folder` returned.
        metric: Picks the metric, as in `lambda score: score.dice`.
    """
    values = [value for score in scores for value in metric(score).values()]
    defined = [value for value in values if not math.isnan(value)]
    mean = sum(defined) / len(defined) if defined else math.nan
    return Mean(mean, defined=len(defined), undefined=len(values) - len(defined))


def score_class(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    """Dice and 95th percentile Hausdorff distance of one binary mask.

    Args:
        prediction: Boolean mask, 2D or 3D.
        reference: Boolean mask of the same shape.
        spacing: Voxel size in mm, one value an axis of the arrays.

    Returns:
        Dice and the distance in mm; see `CaseScore` for empty masks.
    """
    if not prediction.any() or not reference.any():
        return (0.0 if prediction.any() or reference.any() else math.nan), math.nan
    # MONAI takes (batch, class, *space).
    masks = [torch.from_numpy(np.ascontiguousarray(mask))[None, None].float() for mask in (prediction, reference)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.5 and 1.6 warn of a call of their own
        dice = compute_dice(*masks)
        distance = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=list(spacing))
    return float(dice), float(distance)


def _evaluate_case(prediction_file: Path, reference_file: Path, labels: Mapping[str, int]) -> CaseScore:
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
    dice, hd95 = {}, {}
    for name, value in labels.items():
        if value != 0:
            dice[name], hd95[name] = score_class(prediction == value, reference == value, spacing)
    return CaseScore(reference_file.name.split(".")[0], dice, hd95)
