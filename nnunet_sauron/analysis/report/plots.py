"""The report's pictures, as SVG that takes its colours from the page: one drawing for light, dark and print."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...model.history_plots import draw_channels, draw_thresholds, draw_widths
from ..plot_text import as_is
from .compare import common_values
from .contents import ModelReport, Report
from .data import fold_numbers, mean_numbers

# Placeholder colours, replaced by the page's own in `_svg`.
INK, FAINT = "#010203", "#010204"
SERIES = tuple(f"#0102{16 + i:02x}" for i in range(8))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
STYLE = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "grid.color": FAINT, "axes.facecolor": "none", "figure.facecolor": "none",
    "legend.facecolor": "none", "legend.edgecolor": FAINT, "legend.labelcolor": INK, "axes.grid": True,
    "axes.axisbelow": True, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 10, "svg.fonttype": "none", "font.family": "sans-serif",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One drawing.

    Attributes:
        title: What it shows.
        caption: How to read it.
        svg: An `<svg>` element to be put into a page that defines --ink, --faint and --series-0 to --series-7.
    """

    title: str
    caption: str
    svg: str


def pictures(report: Report) -> Iterator[Picture]:
    """All drawings for which there are data."""
    yield from _trade_off(report)
    yield from _cases(report)
    yield from _layers(report)
    yield from _epoch_time(report)
    for number, model in enumerate(report.models):
        yield from _history(model, number)


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """The points that no other one beats: as cheap or cheaper, and as good or better, and not the same.

    Args:
        points: Cost and quality of each.

    Returns:
        Their indices, the cheapest first.
    """

    def beaten(i: int) -> bool:
        cost, quality = points[i]
        return any(
            c <= cost and q >= quality and (c, q) != (cost, quality) for j, (c, q) in enumerate(points) if j != i
        )

    return sorted((i for i in range(len(points)) if not beaten(i)), key=lambda i: points[i])


def _trade_off(report: Report) -> Iterator[Picture]:
    means = {model.name: mean_numbers(model) for model in report.models}
    axes_of = {
        "parameters": "parameters, millions", "macs": "MACs of a patch, billions", "seconds_cpu": "CPU, ms a patch",
        "seconds_cuda": "GPU, ms a patch",
    }  # fmt: skip
    scale = {"parameters": 1e-6, "macs": 1e-9}
    known = [key for key in axes_of if any(key in one and _is_number(one.get("dice")) for one in means.values())]
    if not known:
        return
    same_patch = len({(model.configuration, model.patch_size) for model in report.models}) == 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(known), 3.9), layout="constrained")
        panels = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
        for axes, key in zip(panels, known, strict=True):
            factor = scale.get(key, 1e3)
            shown = {
                i: (means[model.name][key] * factor, means[model.name]["dice"])
                for i, model in enumerate(report.models)
                if key in means[model.name] and _is_number(means[model.name].get("dice"))
            }
            points = list(shown.values())
            front = [points[i] for i in pareto_front(points)]
            if len(front) > 1 and (key == "parameters" or same_patch):
                axes.plot(*zip(*front, strict=True), color=FAINT, linewidth=1.5, zorder=1, label="trade-off front")
            for i, point in shown.items():
                model = report.models[i]
                folds = [fold_numbers(model, fold) for fold in model.folds]
                folds = [(one[key] * factor, one["dice"]) for one in folds if key in one and "dice" in one]
                if len(folds) > 1:
                    axes.scatter(*zip(*folds, strict=True), s=14, color=_colour(i), marker=_marker(i), alpha=0.5)
                axes.scatter(*point, s=60, color=_colour(i), marker=_marker(i), label=_label(model), zorder=3)
            axes.set_xlabel(axes_of[key])
            axes.set_xlim(left=0)
        panels[0].set_ylabel("Dice, mean of classes and cases")
        _legend_below(figure, panels[0])
        yield Picture(
            "Dice against cost",
            "Large marks: means over folds; small ones: folds. The line joins the models that no other one beats in "
            "both; for costs of a patch only where all patches are alike.",
            _svg(figure, "trade_off", "Dice against cost"),
        )


def _cases(report: Report) -> Iterator[Picture]:
    baseline = report.model(report.baseline)
    others = [(i, model) for i, model in enumerate(report.models) if "dice" in model.differences]
    if not others:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.6), layout="constrained")
        axes = figure.subplots()
        lowest = 1.0
        for i, model in others:
            pairs = np.array(list(common_values(model, baseline, "dice").values()))[:, ::-1]
            axes.scatter(*pairs.T, s=22, color=_colour(i), marker=_marker(i), alpha=0.8, label=_label(model))
            if not np.isnan(pairs).all():
                lowest = min(lowest, np.nanmin(pairs))
        low = max(0.0, math.floor(10 * lowest) / 10 - 0.02)
        axes.plot([low, 1], [low, 1], color=INK, linewidth=1)
        axes.set(xlim=(low, 1.01), ylim=(low, 1.01), xlabel=f"Dice, {_label(baseline)}", ylabel="Dice")
        axes.set_aspect("equal")
        _legend_below(figure, axes)
        yield Picture(
            "Dice of each case against the baseline's",
            "One mark per case, mean over classes; above the line the model is better than the baseline.",
            _svg(figure, "cases", "Dice of each case against the baseline's"),
        )


def _layers(report: Report) -> Iterator[Picture]:
    shown = [
        (i, model, one) for i, model in enumerate(report.models)
        for one in list(model.folds.values())[:1] if one.widths and one.widths.keys() == model.dense_widths.keys()
    ]  # fmt: skip
    if not shown:
        return
    with matplotlib.rc_context(STYLE):
        longest = max(len(model.dense_widths) for _, model, _ in shown)
        figure = Figure(figsize=(4.6 * min(2, len(shown)), (1.2 + 0.19 * longest) * math.ceil(len(shown) / 2)),
                        layout="constrained")  # fmt: skip
        grid = figure.subplots(math.ceil(len(shown) / 2), min(2, len(shown)), squeeze=False).ravel()
        for axes, (i, model, one) in zip(grid, shown, strict=False):
            draw_widths(axes, model.dense_widths, one.widths, ("in the plans", "now"), (FAINT, _colour(i)))
            axes.grid(axis="y", visible=False)
            axes.set_title(_label(model), fontsize=9)
            axes.legend(fontsize=8, loc="lower right")
        for axes in grid[len(shown) :]:
            axes.remove()
        yield Picture(
            "Channels of each layer",
            "Wide bars: the network of the plans; narrow bars: the network now (first fold).",
            _svg(figure, "layers", "Channels of each layer, in the plans and now"),
        )


def _epoch_time(report: Report) -> Iterator[Picture]:
    shown = [
        (i, model, one.epoch_seconds) for i, model in enumerate(report.models)
        for one in list(model.folds.values())[:1] if len(one.epoch_seconds) > 1
    ]  # fmt: skip
    if not shown:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for i, model, seconds in shown:
            axes.plot([s / seconds[0] for s in seconds], color=_colour(i), marker=_marker(i), linewidth=1.4,
                      markersize=4, markevery=max(1, len(seconds) // 12),
                      label=f"{_label(model)} (first: {seconds[0]:.1f} s)")  # fmt: skip
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.set(xlabel="epoch", ylabel="epoch time over the first's", ylim=(0, None))
        _legend_below(figure, axes)
        yield Picture(
            "Epoch time",
            "Each epoch's time over the first one's (first fold); other work on the machine is included.",
            _svg(figure, "epoch_time", "Epoch time over the first epoch's"),
        )


def _history(model: ModelReport, number: int) -> Iterator[Picture]:
    history = next((fold.history for fold in model.folds.values()), [])
    if not history or history[0]["widths"].keys() != model.dense_widths.keys():
        return
    names, title = list(model.dense_widths), model.name.replace("__", " ")
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(8.6, 1.8 + 0.17 * len(names)), layout="constrained")
        draw_channels(figure, figure.subplots(), history, model.dense_widths)
        yield Picture(
            f"Channels over the epochs: {title}",
            "One row per layer (first fold); right: channels at the end, of those in the plans.",
            _svg(figure, f"channels_{number}", f"Channels over the epochs of {model.name}"),
        )
        if all("tau" in epoch["state"] for epoch in history):
            figure = Figure(figsize=(7.2, 3.2), layout="constrained")
            axes = figure.subplots()
            axes.set_facecolor("#f4f4f4")  # in every theme: on black the first layers' colours would not be seen
            draw_thresholds(axes, history, names)
            yield Picture(
                f"Thresholds over the epochs: {title}",
                "A channel below its layer's threshold is redundant; each layer adjusts its own threshold.",
                _svg(figure, f"tau_{number}", f"Thresholds over the epochs of {model.name}"),
            )


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure with the page's colours; `name` keeps the ids of a page's drawings apart, `title` is read aloud."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    width = figure.get_size_inches()[0] * 96
    svg = svg.replace("<svg", f'<svg style="--width: {width:.0f}px" role="img" aria-label="{escape(title)}"', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    for colour, variable in ((INK, "--ink"), (FAINT, "--faint"), *((c, f"--series-{i}") for i, c in enumerate(SERIES))):
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _legend_below(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8, frameon=False)


def _label(model: ModelReport) -> str:
    """A model's name in lines short enough for a legend or a panel's title."""
    return as_is("\n".join(textwrap.wrap(model.name.replace("__", " ").replace("/", "/ "), 34)))


def _colour(model: int) -> str:
    return SERIES[model % len(SERIES)]


def _marker(model: int) -> str:
    # Another mark for each colour that comes again.
    return MARKERS[(model + model // len(SERIES)) % len(MARKERS)]


def _is_number(value: float | None) -> bool:
    return value is not None and not math.isnan(value)
