"""Measures the demo's two models and writes `demo.json`; run as a command, in the environment of nnU-Net's commands."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from ..analysis.evaluation import evaluate_folder, mean_score
from ..analysis.timing import Timing, time_networks
from ..datasets.phantom import DATASET_NAME, LABELS
from ..pruning.channels import channel_layout
from ..pruning.cost import count_macs, count_parameters
from .steps import LENGTH, SAURON, model_folder

SIDES = {"stock": "StockTrainer", "sauron": "SauronTrainer"}
REPEATS = 200


def compare(folder: Path) -> dict:
    """Evaluate both trainers' predictions, and count and time their networks.

    Args:
        folder: The demo's folder, with trained models and predictions.

    Returns:
        What `demo.json` holds: a dictionary for `stock` and one for `sauron`, the `ratios` of sauron over stock, and
        `notes` on what was measured how. Undefined numbers are None.
    """
    predictors = {side: _load(model_folder(folder, trainer)) for side, trainer in SIDES.items()}
    first = predictors["stock"]
    input_channels = determine_num_input_channels(first.plans_manager, first.configuration_manager, first.dataset_json)
    patch_size = tuple(first.configuration_manager.patch_size)
    networks = {side: predictor.network for side, predictor in predictors.items()}
    timings = time_networks(networks, (1, input_channels, *patch_size), repeats=REPEATS, warmup=30)

    comparison: dict = {}
    for side, network in networks.items():
        macs = count_macs(network, patch_size, input_channels)
        comparison[side] = {
            **_accuracy(folder, SIDES[side]),
            "parameters": count_parameters(network),
            "macs": macs,
            "channels": sum(unit.width for unit in channel_layout(network).units),
            "milliseconds_per_patch": timings[side].median * 1000,
            "timing": asdict(timings[side]),
            "seconds_per_case": seconds_per_case(folder / "predictions" / SIDES[side]),
        }
    numbers = [key for key, value in comparison["stock"].items() if not isinstance(value, dict)]
    stock, sauron = comparison["stock"], comparison["sauron"]
    return {
        **comparison,
        "ratios": {key: ratio(sauron[key], stock[key]) for key in numbers},
        "test_cases": len(list((folder / "predictions" / SIDES["stock"]).glob("*.nii.gz"))),
        "patch_size": list(patch_size),
        "settings": {"both": LENGTH, "sauron": SAURON},
        "notes": _notes(comparison, patch_size, timings),
        "pruning_png": str(model_folder(folder, SIDES["sauron"]) / "fold_0" / "pruning.png"),
    }


def seconds_per_case(predictions: Path) -> float | None:
    """Mean time between the files of two successive cases, in seconds; None with fewer than two cases.

    Without workers nnU-Net reads, preprocesses, predicts and writes one case after the other, so this is all that a
    case costs. Imports, loading of the network and the first case (its warm-up) lie before the first file.

    Args:
        predictions: Folder of predicted segmentations, written with `-npp 0 -nps 0`.
    """
    written = sorted(path.stat().st_mtime for path in predictions.glob("*.nii.gz"))
    return (written[-1] - written[0]) / (len(written) - 1) if len(written) > 1 else None


def ratio(value: float | None, baseline: float | None) -> float | None:
    """`value / baseline`, None where that is not defined."""
    return None if value is None or not baseline else value / baseline


def _accuracy(folder: Path, trainer: str) -> dict:
    references = folder / "nnUNet_raw" / DATASET_NAME / "labelsTs"
    scores = evaluate_folder(folder / "predictions" / trainer, references, LABELS)
    dice = mean_score(scores, "dice")
    hd95 = mean_score(scores, "hd95")
    cases = [
        {"case": score.case, "dice": _defined(score.values("dice")), "hd95_mm": _defined(score.values("hd95"))}
        for score in scores
    ]
    return {
        "dice": None if math.isnan(dice.value) else dice.value,
        "hd95_mm": None if math.isnan(hd95.value) else hd95.value,
        "undefined": {"dice": dice.undefined, "hd95_mm": hd95.undefined, "of": dice.defined + dice.undefined},
        "cases": {case.pop("case"): case for case in cases},
    }


def _defined(values: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no nan."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _notes(comparison: dict, patch_size: tuple[int, ...], timings: dict[str, Timing]) -> list[str]:
    size = " x ".join(str(length) for length in patch_size)
    spread = " and ".join(
        f"{timing.lower_quartile * 1000:.2f} to {timing.upper_quartile * 1000:.2f} ms" for timing in timings.values()
    )
    notes = [
        f"Dice and HD95: mean over cases and {len(LABELS) - 1} classes.",
        f"Network time: one patch of {size}, median of {REPEATS} turns, {timings['stock'].threads} threads; the middle "
        f"half took {spread}.",
        "Seconds per case: reading, preprocessing, prediction without mirroring, and writing; without imports and "
        "loading of the network.",
    ]
    for side in SIDES:
        undefined = comparison[side]["undefined"]
        if undefined["dice"] or undefined["hd95_mm"]:
            notes.append(
                f"{SIDES[side]}: a mask was empty, so Dice is undefined for {undefined['dice']} and HD95 for "
                f"{undefined['hd95_mm']} of {undefined['of']}; these are not in the means."
            )
    return notes


def _load(trained_model: Path) -> nnUNetPredictor:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(trained_model), (0,), "checkpoint_final.pth")
    return predictor


def main(folder: Path) -> None:
    """Write `demo.json` into the demo's folder, whole or not at all."""
    partial = folder / "demo.json.partial"
    partial.write_text(json.dumps(compare(folder), indent=2))
    os.replace(partial, folder / "demo.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
