"""The report's numbers as flat tables: pandas frames, CSV and JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date

import pandas as pd

from ... import __version__
from ...console.json_data import json_data
from ...model.device import machine
from ...model.evaluation import ClassScore
from .contents import ModelReport, Report

METRICS = ("dice", "hd95", "surface_dice", "absolute_volume_error", "volume_error")
COUNTS = ("cases", "empty_prediction", "empty_reference", "both_empty")
MEAN = "mean"  # stands for a fold


def fold_numbers(model: ModelReport, fold: str) -> dict[str, float]:
    """All known numbers of one fold, or of the folder of predictions; unknown ones are absent.

    Returns:
        channels; parameters; macs and flops of one patch; weights_bytes; peak_memory_bytes; seconds_cpu, seconds_cuda
        and their interquartile ranges (`_iqr`); epoch_time_ratio; target_asked and target_left, the parts that a
        pruning's target asked for and left; `METRICS` as means over cases, then classes (hd95 in mm, volume errors as
        fractions), and for each class (`dice: NAME`, ...); cases; how many pairs of a case and a class have an
        empty_prediction, an empty_reference, or both_empty (again also for each class); and channels of each stage
        (`channels: encoder.stages.0`, ...).
    """
    numbers: dict[str, float] = {}
    if fold in model.folds:
        one = model.folds[fold]
        if one.widths:
            numbers["channels"] = sum(one.widths.values())
            numbers.update({f"channels: {stage}": width for stage, width in stage_channels(one.widths).items()})
        numbers.update(_cost(one.cost))
        for device, timing in one.timing.items():
            numbers[f"seconds_{device}"] = timing.median
            numbers[f"seconds_{device}_iqr"] = timing.interquartile_range
        if one.epoch_time_ratio is not None:
            numbers["epoch_time_ratio"] = one.epoch_time_ratio
        if one.target:
            numbers.update({f"target_{key}": one.target[key] for key in ("asked", "left")})
    scores = model.scores.get(fold, [])
    if scores:
        of_class = {name: [score.classes[name] for score in scores] for name in model.classes}
        numbers["cases"] = len(scores)
        means = {name: _means(found) for name, found in of_class.items()}
        numbers.update(_combined(list(means.values())))
        for name, found in means.items():
            numbers.update({f"{key}: {name}": value for key, value in found.items()})
    return numbers


def mean_numbers(model: ModelReport) -> dict[str, float]:
    """The mean over `compared_parts` of each number that is known of any; counts of cases are added up."""
    return _combined([fold_numbers(model, part) for part in model.compared_parts])


def stage_channels(widths: Mapping[str, int]) -> dict[str, int]:
    """Channels of a network's stages, added up over their layers; a transposed convolution belongs to its stage."""
    stages: dict[str, int] = {}
    for name, width in widths.items():
        part, kind, number, *_ = [*name.replace("transpconvs", "stages").split("."), "", ""]
        stage = f"{part}.{kind}.{number}" if kind == "stages" else part
        stages[stage] = stages.get(stage, 0) + width
    return stages


def dense_numbers(model: ModelReport) -> dict[str, float]:
    """What the network of the model's plans costs."""
    channels = {"channels": sum(model.dense_widths.values())} if model.dense_widths else {}
    return channels if model.dense_cost is None else {**channels, **_cost(model.dense_cost)}


def summary_frame(report: Report) -> pd.DataFrame:
    """A row for each model and fold, and one for the mean over a model's folds."""
    rows = []
    for model in report.models:
        known = {"model": model.name, "trainer": model.trainer, "plans": model.plans}
        known["configuration"] = model.configuration
        rows += [{**known, "fold": fold, **fold_numbers(model, fold)} for fold in model.parts]
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
    return json_data({
        "made_by": f"nnunet-sauron {__version__}",
        "date": date.today().isoformat(),
        "machine": {**machine(), "threads": report.threads},
        "baseline": report.baseline,
        "surface_dice_tolerance_mm": report.tolerance_mm,
        "problems": report.problems,
        "left_out": report.left_out,
        "models": [
            {
                "name": model.name, "folder": str(model.folder), "trainer": model.trainer, "plans": model.plans,
                "configuration": model.configuration, "patch_size": list(model.patch_size),
                "dense": {**dense_numbers(model), "widths": model.dense_widths},
                MEAN: mean_numbers(model),
                "folds": {
                    fold: {**fold_numbers(model, fold), **_details(model, fold)} for fold in model.parts
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


def data_files(report: Report) -> dict[str, str]:
    """The texts of report.json, report.csv (models and folds) and cases.csv (cases and classes), by their names."""
    return {
        "report.json": json.dumps(as_json(report), indent=1),
        "report.csv": summary_frame(report).to_csv(index=False),
        "cases.csv": case_frame(report).to_csv(index=False),
    }


def _cost(cost) -> dict[str, float]:
    known = {
        "parameters": cost.parameters, "macs": cost.macs, "flops": cost.flops, "weights_bytes": cost.weights_bytes,
        "peak_memory_bytes": cost.peak_memory_bytes,
    }  # fmt: skip
    return {key: value for key, value in known.items() if not math.isnan(value)}  # of a bundle only its size


def _combined(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over the parts that know it; counts are added up."""
    combined = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part[key] for part in parts if not math.isnan(part.get(key, math.nan))]
        combine = sum if key.split(":")[0] in COUNTS else statistics.fmean
        combined[key] = combine(values) if values else math.nan
    return combined


def _means(scores: Sequence[ClassScore]) -> dict[str, float]:
    """Means where they are defined, and counts of empty masks."""
    pairs = [(one.predicted_ml > 0, one.reference_ml > 0) for one in scores]
    means = {}
    for metric in METRICS:
        values = [value for value in (getattr(one, metric) for one in scores) if not math.isnan(value)]
        means[metric] = statistics.fmean(values) if values else math.nan
    return {
        **means,
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
        "target": one.target,
        "timing": {device: asdict(timing) for device, timing in one.timing.items()},
        "epoch_seconds": one.epoch_seconds,
        "widths_by_epoch": [epoch["widths"] for epoch in one.history],
        "tau_by_epoch": [epoch["state"]["tau"] for epoch in one.history if "tau" in epoch["state"]],
    }
