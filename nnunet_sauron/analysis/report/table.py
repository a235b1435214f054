"""The report as rows of text, the same for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.text import Text

from ...console.numbers import duration, with_prefix
from ...console.terminal import PlainTable
from .contents import ModelReport, Report, target_in_words
from .data import dense_numbers, fold_numbers, mean_numbers, stage_channels
from .paired import PairedDifference


@dataclass(frozen=True)
class Row:
    """A number of `mean_numbers`, its title, and its format."""

    key: str
    title: str
    show: Callable[[float], str]


BYTES = partial(with_prefix, unit="B")
COST = (
    Row("channels", "channels", lambda v: f"{v:.0f}"),
    Row("parameters", "parameters", with_prefix),
    Row("macs", "MACs of a patch", with_prefix),
    Row("flops", "FLOPs of a patch", with_prefix),
    Row("weights_bytes", "weights on disk", BYTES),
    Row("peak_memory_bytes", "peak memory of a patch", BYTES),
    Row("seconds_cpu", "CPU time of a patch", duration),
    Row("seconds_cpu_iqr", "its interquartile range", duration),
    Row("seconds_cuda", "GPU time of a patch", duration),
    Row("seconds_cuda_iqr", "its interquartile range", duration),
    Row("epoch_time_ratio", "last epochs' time over the first ones'", lambda v: f"{v:.2f}"),
)
QUALITY = (
    Row("dice", "Dice", lambda v: f"{v:.3f}"),
    Row("hd95", "HD95, mm", lambda v: f"{v:.2f}"),
    Row("surface_dice", "surface Dice", lambda v: f"{v:.3f}"),
    Row("absolute_volume_error", "volume error, absolute", lambda v: f"{v:.1%}"),
    Row("volume_error", "volume error, signed", lambda v: f"{v:+.1%}"),
)
RATIOS = ("parameters", "weights_bytes")
RATIOS_PER_PATCH = ("macs", "flops", "peak_memory_bytes", "seconds_cpu", "seconds_cuda")
EMPTY = (
    Row("cases", "cases", lambda v: f"{v:.0f}"),
    Row("empty_prediction", "classes missed: empty prediction", lambda v: f"{v:.0f}"),
    Row("empty_reference", "classes invented: empty reference", lambda v: f"{v:.0f}"),
    Row("both_empty", "classes absent: both empty", lambda v: f"{v:.0f}"),
)
COMPARISONS = {
    "dice": ("Dice", lambda v: f"{v:+.3f}"),
    "hd95": ("HD95, mm", lambda v: f"{v:+.2f}"),
    "surface_dice": ("surface Dice", lambda v: f"{v:+.3f}"),
    "absolute_volume_error": ("volume error, points", lambda v: f"{100 * v:+.1f}"),
}


def rows(report: Report, wanted: tuple[Row, ...]) -> list[tuple[str, list[str]]]:
    """A title and a cell for each model: the mean over its folds, and for a cost its ratio to the baseline's."""
    numbers = {model.name: mean_numbers(model) for model in report.models}
    baseline = report.model(report.baseline)
    found = []
    for row in wanted:
        cells = []
        for model in report.models:
            value, of_baseline = (numbers[one.name].get(row.key, math.nan) for one in (model, baseline))
            cells.append(_cell(row, value, of_baseline if _has_ratio(row, model, baseline) else math.nan))
        if any(cell != NOTHING for cell in cells):
            found.append((row.title, cells))
    return found


def _has_ratio(row: Row, model: ModelReport, baseline: ModelReport) -> bool:
    if model is baseline:
        return False
    same_patch = (model.configuration, model.patch_size) == (baseline.configuration, baseline.patch_size)
    return row.key in RATIOS or (row.key in RATIOS_PER_PATCH and same_patch)


def class_rows(report: Report) -> list[tuple[str, list[str]]]:
    """Quality by class, and empty masks where there are any."""
    names = dict.fromkeys(name for model in report.models for name in model.classes)
    by_class = [
        Row(f"{row.key}: {name}", f"{name}: {row.title}", row.show)
        for name in names for row in (*QUALITY[:4], EMPTY[1], EMPTY[2])
    ]  # fmt: skip
    found = rows(report, tuple(by_class))
    return [(title, cells) for title, cells in found if set(cells) - {"0", NOTHING}]  # masks that are never empty


def stage_rows(report: Report) -> list[tuple[str, list[str]]]:
    """Channels of each stage now, and of those in the plans."""
    stages = {model.name: stage_channels(model.dense_widths) for model in report.models}
    numbers = {model.name: mean_numbers(model) for model in report.models}
    found = []
    for stage in dict.fromkeys(stage for known in stages.values() for stage in known):
        cells = []
        for model in report.models:
            value = numbers[model.name].get(f"channels: {stage}", math.nan)
            dense = stages[model.name].get(stage)
            cells.append(NOTHING if math.isnan(value) else f"{value:.0f} of {dense}" if dense else f"{value:.0f}")
        found.append((stage, cells))
    return found


def target_rows(report: Report) -> list[tuple[str, list[str]]]:
    """Each model's pruning target and whether it was reached; folds are named where they differ."""
    cells = []
    for model in report.models:
        outcomes: dict[tuple, list[str]] = {}
        for fold, one in model.folds.items():
            if one.target:
                key = tuple(one.target[name] for name in ("name", "value", "reached"))
                outcomes.setdefault(key, []).append(fold)
        words = {
            ", ".join(folds): target_in_words([model.folds[fold].target for fold in folds])
            for folds in outcomes.values()
        }
        alike = len(words) == 1
        cells.append("; ".join(text if alike else f"fold {folds}: {text}" for folds, text in words.items()) or NOTHING)
    return [("target", cells)] if set(cells) != {NOTHING} else []


def fold_rows(model: ModelReport) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The folds' names, and a title and a cell for each fold; the plans' own widths come first."""
    numbers = [dense_numbers(model)]
    numbers += [fold_numbers(model, part) for part in model.parts]
    titles = ["plans", *(f"fold {part}" if part in model.folds else part for part in model.parts)]
    found = []
    for row in (*COST, *QUALITY, *EMPTY):
        cells = [_cell(row, one.get(row.key, math.nan), math.nan) for one in numbers]
        if any(cell != NOTHING for cell in cells):
            found.append((row.title, cells))
    targets = [model.folds[part].target if part in model.folds else None for part in model.parts]
    if any(targets):
        found.append(("target", [NOTHING, *(target_in_words([one]) if one else NOTHING for one in targets)]))
    return titles, found


def width_rows(model: ModelReport) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The folds' names, and each layer's channels in the plans and in every fold; nothing if they are not known."""
    folds = {f"fold {fold}": one.widths for fold, one in model.folds.items() if one.widths}
    columns = [model.dense_widths, *folds.values()]
    names = [name for name in model.dense_widths if all(name in widths for widths in columns)] if folds else []
    return ["plans", *folds], [(name, [str(widths[name]) for widths in columns]) for name in names]


def comparison_rows(model: ModelReport) -> list[tuple[str, str, str, str]]:
    """Metric, mean difference with its interval, p, and cases."""
    found = []
    for metric, (title, show) in COMPARISONS.items():
        if metric in model.differences:
            one = model.differences[metric]
            cases = f"{one.cases}" + (f" ({one.left_out} undefined)" if one.left_out else "")
            found.append((title, difference(one, show), p_value(one.p), cases))
    return found


def difference(one: PairedDifference, show: Callable[[float], str]) -> str:
    """A mean difference and its confidence interval."""
    if math.isnan(one.mean):
        return NOTHING
    return show(one.mean) + ("" if math.isnan(one.low) else f" [{show(one.low)}, {show(one.high)}]")


def p_value(p: float) -> str:
    """A p-value to read."""
    return NOTHING if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


NOTHING = "-"


def _cell(row: Row, value: float, baseline: float) -> str:
    if math.isnan(value):
        return NOTHING
    ratio = f" ({value / baseline:.2f}x)" if baseline and not math.isnan(baseline) else ""
    return row.show(value) + ratio


def notes(report: Report) -> list[str]:
    """What the numbers mean, with their sources."""
    timed = {
        device: one.repeats
        for model in report.models for fold in model.folds.values() for device, one in fold.timing.items()
    }  # fmt: skip
    how = {"cpu": f"{report.threads} CPU threads, float32", "cuda": "GPU, autocast as in nnU-Net's prediction"}
    timing = [
        f"Times on {how[device]}: median of {repeats} forward passes after a warm-up; the networks alternated in one "
        "process."
        for device, repeats in timed.items()
    ]
    return [
        "MACs, FLOPs, memory and times are of one patch of the plans' size, batch 1. FLOPs are PyTorch's flop "
        "counter's, of convolutions and transposed convolutions; MACs are half of them. Peak memory is in float32: "
        "weights, input and live tensors, without the workspace of convolutions.",
        *timing,
        f"Dice, HD95 (the larger direction's 95th percentile) and surface Dice (tolerance {report.tolerance_mm:g} mm) "
        "are defined as MONAI's, over surface voxels; means over cases, then over classes, then over folds. Where "
        "prediction or reference is empty there is no distance, and where both are there is no Dice: such pairs of a "
        "case and a class are counted and not averaged.",
        "Volume error: (predicted - reference) / reference.",
        f"Differences: per case, against {report.baseline}, mean over the classes where both have a value; 95 % "
        "bootstrap interval (BCa, 9999 draws over cases) and Wilcoxon's signed rank test, two-sided, not corrected for "
        "the number of comparisons.",
    ]


def print_report(report: Report, console: Console) -> None:
    """The report as tables of text."""
    table = _rich_table("mean over folds", report)
    for found in (rows(report, COST) + target_rows(report), rows(report, QUALITY), rows(report, EMPTY)):
        for title, cells in found:
            table.add_row(title, *cells)
        table.add_section()
    console.print(table)
    for title, found in (("by class, mean over folds", class_rows(report)), ("channels", stage_rows(report))):
        if found:
            table = _rich_table(title, report)
            for row, cells in found:
                table.add_row(row, *cells)
            console.print(table)
    for model in report.models:
        if len(model.folds) > 1:
            heads, found = fold_rows(model)
            table = PlainTable(model.name, *heads)
            for title, cells in found:
                table.add_row(title, *cells)
            console.print(table)
    for model in report.models:
        if model.differences:
            table = PlainTable("", "mean [95 % interval]", "p (Wilcoxon)", "cases")
            console.print(Text(f"{model.name} minus {report.baseline}"))
            for cells in comparison_rows(model):
                table.add_row(*cells)
            console.print(table)
    for note in notes(report):
        console.print(Text(f"- {note}"))
    for problem in report.problems:
        # Not wrapped: commands in it are to be copied.
        console.print(Text(f"! {problem}", style="bold"), soft_wrap=True)


def _rich_table(title: str, report: Report) -> PlainTable:
    return PlainTable(title, *(model.name.replace("__", "\n").replace("/", "/\n") for model in report.models))
