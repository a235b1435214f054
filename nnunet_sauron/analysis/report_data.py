"""The report's numbers as flat tables: pandas frames, CSV and JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from .. import __version__
from ..trainers.checkpoints import write_atomically
from .evaluation import CaseScore, mean_score
from .report import ModelReport, Report

METRICS = ("dice", "hd95", "surface_dice", "absolute_volume_error", "volume_error")
MEAN = "mean"  # stands for a fold


def fold_numbers(model: ModelReport, fold: str) -> dict[str, float]:
    """All that is known of one fold, or of the folder of predictions; what is not known is absent.

    Returns:
        channels; parameters; macs and flops of one patch; weights_bytes; peak_memory_bytes; seconds_cpu, seconds_cuda
        and their interquartile ranges (`_iqr`); epoch_time_ratio; `METRICS` as means over cases and classes (hd95 in
        mm, volume errors as fractions) and for each class (`dice: NAME`, ...); cases; and how many pairs of a case and
        a class have an empty_prediction, an empty_reference, or both_empty.
    """
    numbers: dict[str, float] = {}
    if fold in model.folds:
        one = model.folds[fold]
        if one.widths:
            numbers["channels"] = sum(one.widths.values())
        numbers.update(_cost(one.cost))
        for device, timing in one.timing.items():
            numbers[f"seconds_{device}"] = timing.median
            numbers[f"seconds_{device}_iqr"] = timing.interquartile_range
        if one.epoch_time_ratio is not None:
            numbers["epoch_time_ratio"] = one.epoch_time_ratio
    scores = model.scores.get(fold, [])
    if scores:
        numbers["cases"] = len(scores)
        numbers.update(_empty(scores))
        numbers.update({metric: mean_score(scores, metric).value for metric in METRICS})
        for name in scores[0].classes:
            numbers.update({f"{metric}: {name}": mean_score(scores, metric, name).value for metric in METRICS})
    return numbers


def mean_numbers(model: ModelReport) -> dict[str, float]:
    """The mean over folds of each number that is known of any; counts of cases are added up."""
    folds = [fold_numbers(model, fold) for fold in _folds(model)]
    means = {}
    for key in dict.fromkeys(key for numbers in folds for key in numbers):
        values = [numbers[key] for numbers in folds if not math.isnan(numbers.get(key, math.nan))]
        combine = sum if key in ("cases", *_empty([])) else statistics.fmean
        means[key] = combine(values) if values else math.nan
    return means


def dense_numbers(model: ModelReport) -> dict[str, float]:
    """What the network of the model's plans costs."""
    return {"channels": sum(model.dense_widths.values()), **_cost(model.dense_cost)}


def summary_frame(report: Report) -> pd.DataFrame:
    """A row for each model and fold, and one for the mean over a model's folds."""
    rows = []
    for model in report.models:
        known = {"model": model.name, "trainer": model.trainer, "plans": model.plans}
        known["configuration"] = model.configuration
        rows += [{**known, "fold": fold, **fold_numbers(model, fold)} for fold in _folds(model)]
        rows.append({**known, "fold": MEAN, **mean_numbers(model)})
    return pd.DataFrame(rows)


def case_frame(report: Report) -> pd.DataFrame:
    """A row for each model, fold, case and class."""
    rows = [
        {"model": model.name, "fold": fold, "case": score.case, "class": name, **asdict(of_class),
         **{metric: getattr(of_class, metric) for metric in METRICS}}
        for model in report.models for fold, scores in model.scores.items()
        for score in scores for name, of_class in score.classes.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def as_json(report: Report) -> dict:
    """The whole report as plain data; nan becomes None."""
    return _plain({
        "made_by": f"nnunet-sauron {__version__}",
        "date": date.today().isoformat(),
        "machine": {
            "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "threads": report.threads, "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "baseline": report.baseline,
        "surface_dice_tolerance_mm": report.tolerance_mm,
        "problems": report.problems,
        "models": [
            {
                "name": model.name, "folder": str(model.folder), "trainer": model.trainer, "plans": model.plans,
                "configuration": model.configuration, "patch_size": list(model.patch_size),
                "dense": {**dense_numbers(model), "widths": model.dense_widths},
                MEAN: mean_numbers(model),
                "folds": {
                    fold: {**fold_numbers(model, fold), **_details(model, fold)} for fold in _folds(model)
                },
                "differences": {metric: asdict(value) for metric, value in model.differences.items()},
                "cases": {
                    fold: {score.case: {name: asdict(one) for name, one in score.classes.items()} for score in scores}
                    for fold, scores in model.scores.items()
                },
            }
            for model in report.models
        ],
    })  # fmt: skip


def write_data(report: Report, folder: Path) -> list[Path]:
    """Write report.json, report.csv (models and folds) and cases.csv (cases and classes), each whole or not at all."""
    texts = {
        "report.json": json.dumps(as_json(report), indent=1),
        "report.csv": summary_frame(report).to_csv(index=False),
        "cases.csv": case_frame(report).to_csv(index=False),
    }
    for name, text in texts.items():
        write_atomically(folder / name, lambda path, text=text: Path(path).write_text(text))
    return [folder / name for name in texts]


def _folds(model: ModelReport) -> list[str]:
    return list(dict.fromkeys([*model.folds, *model.scores]))


def _cost(cost) -> dict[str, float]:
    return {
        "parameters": cost.parameters, "macs": cost.macs, "flops": cost.flops, "weights_bytes": cost.weights_bytes,
        "peak_memory_bytes": cost.peak_memory_bytes,
    }  # fmt: skip


def _empty(scores: list[CaseScore]) -> dict[str, int]:
    pairs = [(one.predicted_ml > 0, one.reference_ml > 0) for score in scores for one in score.classes.values()]
    return {
        "empty_prediction": pairs.count((False, True)),
        "empty_reference": pairs.count((True, False)),
        "both_empty": pairs.count((False, False)),
    }


def _details(model: ModelReport, fold: str) -> dict:
    if fold not in model.folds:
        return {}
    one = model.folds[fold]
    return {
        "widths": one.widths,
        "timing": {device: asdict(timing) for device, timing in one.timing.items()},
        "epoch_seconds": one.epoch_seconds,
    }


def _plain(value):
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
