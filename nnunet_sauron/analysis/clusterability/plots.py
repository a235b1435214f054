"""The result of `clusterability`, as a table for the terminal and as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from ...console.terminal import PlainTable, plain_console
from ...files import AGAIN, write_atomically
from ..plot_text import as_is
from .folders import TrainedFold
from .measure import FEWEST_MAPS, MEASURES, SIGNIFICANT, Clusterability, points

# Okabe and Ito's colours, distinct with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v")
TITLES = {
    "dip": "Dip of pairwise distances",
    "hopkins": "Hopkins statistic (0.5: random)",
    "neighbours": "Near neighbours",
}
DIGITS = {"dip": ".4f", "hopkins": ".3f", "neighbours": ".3f"}
UNITS = {"dip": "dip", "hopkins": "H", "neighbours": "fraction of the other maps"}
FEWEST_MAPS_TO_CHOOSE = 8
NOTE = (
    "dip: Hartigans' dip of the pairwise distances between a layer's feature maps, larger with more modes. hopkins: "
    "Hopkins statistic on at most 3 principal components, 0.5 random, near 1 clustered. neighbours: fraction of the "
    "other maps within the distance that held a tenth of them in the first snapshot. tau: Kendall's tau of the measure "
    f"against the epoch, with its p; rising and falling are p < {SIGNIFICANT}. Snapshots of a training depend on each "
    "other, so compare p with that of a training without delta_opt."
)
NOTE_ON_WIDTHS = (
    "{} layers lost channels, which changes the measures as well: maps with near neighbours are removed first, and "
    "with fewer maps the dip is larger and the Hopkins statistic smaller. To see delta_opt alone, train without cuts: "
    'nnunet_sauron="target_macs=1,delta_opt_after_cuts=True,snapshot_every=10".'
)


def draw(result: Clusterability, folder: Path, layer: str | None = None) -> list[Path]:
    """Write the pictures: the measures over the epochs, trends by lambda_, and one layer's maps by t-SNE.

    Args:
        result: What `clusterability` returned.
        folder: Where; made if it is not there.
        layer: The layer of the t-SNE; None for the widest of the first model that has at least 8 maps in the first and
            the last snapshot of all models (no t-SNE if there is none).

    Returns:
        The files.

    Raises:
        ValueError: No such layer, or too few maps in it for a t-SNE.
    """
    chosen = _layer_to_show(result, layer)
    figures = {"clusterability_measures.png": _measures(result), "clusterability_trends.png": trends_by_lambda(result)}
    if chosen:
        figures["clusterability_tsne.png"] = _tsne(result.models, chosen)
    folder.resolve().mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        write_atomically(folder / name, partial(figure.savefig, format="png", dpi=200), AGAIN)
    return [folder / name for name in figures]


def embedding(model: TrainedFold, layer: str, epoch: int) -> np.ndarray:
    """t-SNE of a layer's maps in one snapshot, (channels, 2); axes and distances between groups have no meaning.

    nan where the maps are not finite, as in a training that diverged.
    """
    where = points(model.maps(epoch)[layer])
    if not np.isfinite(where).all():
        return np.full((len(where), 2), math.nan)
    if np.ptp(where, axis=0).max() == 0:
        return np.zeros((len(where), 2))  # all in one place, where t-SNE would divide by 0
    perplexity = min(30, (len(where) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(where.astype(np.float32))


def print_table(result: Clusterability, console=None) -> None:
    """Print a table for each model, the number of trends, and the meaning of the columns."""
    from rich.text import Text

    console = console or plain_console()
    channels = _channels(result)
    for model in result.models:
        table = PlainTable(title=Text(f"{model.name} ({model.folder}, fold {model.fold})"))
        table.add_column("layer", no_wrap=True)
        table.add_column("channels")
        several = len(model.snapshots) > 1
        for measure in MEASURES:
            table.add_column(measure)
            if several:
                table.add_column("tau (p)")
        of_model = result.trends[result.trends.model == model.name]
        for layer, trends in of_model.groupby("layer", sort=False):
            row = [layer, _change(*channels.loc[model.name, layer], "d")]
            for trend in trends.set_index("measure").loc[list(MEASURES)].itertuples():
                row += [_change(trend.first, trend.last, DIGITS[trend.Index]), *([_tau(trend)] if several else [])]
            table.add_row(*row)
        console.print(table)
    table = PlainTable("lambda", "measure", "median of the layers", "rising", "falling", "of layers", title="Trends")
    for (value, measure), row in result.summary().iterrows():
        counts = (f"{row[key]:.0f}" for key in ("rising", "falling", "layers"))
        table.add_row(lambda_label(value), measure, _change(row["first"], row["last"], DIGITS[measure]), *counts)
    console.print(table)
    for note in sorted(set(result.trends.note) - {""}):
        console.print(Text(f"{(result.trends.note == note).sum()} times no trend: {note}"))
    console.print(Text(NOTE))
    fewer = int((channels["last"] < channels["first"]).sum())
    if fewer:
        console.print(Text(NOTE_ON_WIDTHS.format(fewer)))
    for problem in result.problems:
        console.print(Text(f"Problem: {problem}"), soft_wrap=True)


def lambda_label(value: float) -> str:
    """The weight of delta_opt in words."""
    return "none" if math.isnan(value) else f"{value:g}"


def _measures(result: Clusterability) -> Figure:
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, len(MEASURES))
    for axes, measure in zip(panels, MEASURES, strict=True):
        for k, model in enumerate(result.models):
            table = result.values[result.values.model == model.name].pivot(
                index="epoch", columns="layer", values=measure
            )
            colour = COLOURS[k % len(COLOURS)]
            axes.plot(table.index, table, color=colour, linewidth=0.5, alpha=0.25)
            low, median, high = (table.quantile(q, axis=1) for q in (0.25, 0.5, 0.75))
            axes.fill_between(table.index, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(table.index, median, color=colour, marker=MARKERS[k % len(MARKERS)], markersize=4, linewidth=2,
                      label=as_is(model.name))  # fmt: skip
        axes.set(title=TITLES[measure], xlabel="epochs of training", ylabel=UNITS[measure])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")  # it falls with the number of maps: from layer to layer by orders of magnitude
    panels[1].axhline(0.5, color="0.3", linestyle=":", linewidth=1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False,
                  title="Thick: median of the layers; band: their middle half; thin: each layer")  # fmt: skip
    return figure


def trends_by_lambda(result: Clusterability) -> Figure:
    """How many layers' measures rise and fall with each weight of delta_opt."""
    summary = result.summary()
    groups = list(summary.index.unique("lambda_"))
    figure = Figure(figsize=(max(8, 3 + 2.2 * len(groups)), 3.6), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, measure in zip(panels, MEASURES, strict=True):
        rows = [_row(summary, value, measure) for value in groups]
        for offset, key, colour, hatch in ((-0.2, "rising", COLOURS[0], ""), (0.2, "falling", COLOURS[1], "//")):
            bars = axes.bar(np.arange(len(groups)) + offset, [row[key] for row in rows], 0.38, color=colour,
                            hatch=hatch, edgecolor="white", label=f"{key} (p < {SIGNIFICANT})")  # fmt: skip
            axes.bar_label(bars, fontsize=9)
        axes.set_xticks(range(len(groups)),
                        [f"{lambda_label(value)}\n({row['layers']:.0f} layers)"
                         for value, row in zip(groups, rows, strict=True)])  # fmt: skip
        axes.set_title(TITLES[measure], fontsize=10)
        axes.margins(y=0.15)
    panels[1].set_xlabel("lambda, the weight of delta_opt")
    panels[0].set_ylabel("layers")
    panels[0].yaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _row(summary: pd.DataFrame, value: float, measure: str) -> pd.Series:
    same = [(math.isnan(v) and math.isnan(value)) or v == value for v, _ in summary.index]
    return summary[same].droplevel(0).loc[measure]


def _tsne(models: Sequence[TrainedFold], layer: str) -> Figure:
    figure = Figure(figsize=(6.4, 0.8 + 2.8 * len(models)), layout="constrained")
    rows = figure.subplots(len(models), 2, squeeze=False)
    for k, (model, row) in enumerate(zip(models, rows, strict=True)):
        for axes, epoch in zip(row, dict.fromkeys(_ends(model)), strict=False):
            where = embedding(model, layer, epoch)
            axes.scatter(*where.T, s=14, color=COLOURS[k % len(COLOURS)], alpha=0.7, linewidths=0)
            what = f"{len(where)} maps" + (", not finite" if np.isnan(where).any() else "")
            axes.set_title(f"{f'after {epoch} epochs' if epoch else 'untrained'}: {what}", fontsize=10)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(as_is(model.name), fontsize=10)
        if len(model.snapshots) == 1:
            row[1].set_axis_off()
    figure.suptitle(as_is(f"Feature maps of {layer} by t-SNE"), fontsize=11)
    figure.supxlabel("A point is a feature map; the axes have no unit", fontsize=9)
    return figure


def _layer_to_show(result: Clusterability, layer: str | None) -> str | None:
    """The layer that was asked for, or the widest with enough maps in every snapshot that is shown."""
    channels = result.values.groupby(["layer", "model", "epoch"], sort=False).channels.first()
    shown = {
        name: [channels.get((name, model.name, epoch), 0) for model in result.models for epoch in _ends(model)]
        for name in result.values.layer.unique()
    }
    if layer is not None:
        if layer not in shown:
            raise ValueError(f"There is no layer '{layer}'; there are {', '.join(shown)}.")
        if min(shown[layer]) < FEWEST_MAPS:
            raise ValueError(
                f"'{layer}' has {min(shown[layer])} feature maps in a snapshot to show; t-SNE needs {FEWEST_MAPS}."
            )
        return layer
    enough = [name for name, widths in shown.items() if min(widths) >= FEWEST_MAPS_TO_CHOOSE]
    return max(enough, key=lambda name: shown[name][0], default=None)


def _ends(model: TrainedFold) -> tuple[int, int]:
    epochs = list(model.snapshots)
    return epochs[0], epochs[-1]


def _channels(result: Clusterability) -> pd.DataFrame:
    """Channels in the first and in the last snapshot, by model and layer."""
    ordered = result.values.sort_values("epoch", kind="stable")
    return ordered.groupby(["model", "layer"], sort=False).channels.agg(["first", "last"])


def _change(first: float, last: float, spec: str) -> str:
    if math.isnan(first):
        return "-"
    return f"{first:{spec}}" if first == last else f"{first:{spec}} -> {last:{spec}}"


def _tau(trend) -> str:
    return "-" if math.isnan(trend.tau) else f"{trend.tau:+.2f} ({trend.p:.2g})"
