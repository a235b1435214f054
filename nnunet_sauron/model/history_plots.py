"""The pruning history of a training, as pictures: `pruning.png` beside nnU-Net's `progress.png`, and widths as bars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from ..files import write_atomically
from .checkpoints import PRUNING


def plot_pruning(
    series: dict[str, list], dense_widths: dict[str, int], dense_cost: tuple[int, int], path: Path
) -> None:
    """Draw channels per layer, thresholds, cost and epoch time over the epochs.

    Args:
        series: nnU-Net's logged series with the pruning history among them.
        dense_widths: Channels per unit before anything was removed.
        dense_cost: Parameters and multiply-accumulates then.
        path: The PNG to write.
    """
    history = series[PRUNING]
    names = list(dense_widths)
    # nnU-Net's progress plot leaves seaborn's style with 2.5 times larger fonts behind.
    with matplotlib.style.context(["default", {"font.size": 9, "axes.titlesize": 11}], after_reset=True):
        figure = Figure(figsize=(13, 4.4 + 0.17 * len(names)), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=[3, 2])
        draw_channels(figure, figure.add_subplot(grid[:, 0]), history, dense_widths)
        if "tau" in history[-1]["state"]:
            right = grid[:, 1].subgridspec(3, 1)
            draw_thresholds(figure.add_subplot(right[2]), history, names)
        else:
            right = grid[:, 1].subgridspec(2, 1)
        _cost(figure.add_subplot(right[0]), history, dense_cost)
        _epoch_time(figure.add_subplot(right[1]), series)
        write_atomically(path, lambda target: figure.savefig(target, dpi=110, format="png"))


def draw_channels(figure, axes, history: list[dict], dense: dict[str, int]) -> None:
    """Channels left of every unit (rows) over the epochs (columns), as an image."""
    left = np.array([[epoch["widths"][name] / width for epoch in history] for name, width in dense.items()])
    image = axes.imshow(
        left, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="viridis",
        extent=(-0.5, len(history) - 0.5, len(dense) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_title("Channels left per layer")
    axes.set_yticks(range(len(dense)), list(dense), fontsize=7)
    axes.set_xlabel("epoch")
    _whole_epochs(axes)
    numbers = axes.secondary_yaxis("right")
    now = [f"{history[-1]['widths'][name]} of {width}" for name, width in dense.items()]
    numbers.set_yticks(range(len(dense)), now, fontsize=7)
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, label="fraction of the channels at the start")


def draw_widths(axes, dense: Mapping[str, int], widths: Mapping[str, int], labels: tuple[str, str], colours) -> None:
    """A wide bar for every unit's channels before, with a narrow one in it for those that are left.

    Args:
        axes: Matplotlib's.
        dense, widths: Channels by unit, before and now.
        labels, colours: Of the two bars.
    """
    names = list(dense)
    for numbers, label, colour, height in zip((dense, widths), labels, colours, (0.8, 0.5), strict=True):
        axes.barh(names, [numbers[name] for name in names], height=height, color=colour, label=label)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("channels")


def _cost(axes, history: list[dict], dense: tuple[int, int]) -> None:
    for key, total, label, style in (
        ("parameters", dense[0], "parameters", "-"),
        ("macs", dense[1], "multiply-accumulates", "--"),
    ):
        axes.plot([epoch[key] / total for epoch in history], style, marker=_marker(history), label=label)
    axes.set(title="Cost over the dense network's", xlabel="epoch", ylabel="ratio", ylim=(0, 1.05))
    axes.legend(loc="upper right")
    _finish(axes)


def _epoch_time(axes, series: dict[str, list]) -> None:
    seconds = [
        end - start
        for start, end in zip(series["epoch_start_timestamps"], series["epoch_end_timestamps"], strict=False)
    ]
    axes.plot([s / seconds[0] for s in seconds], marker=_marker(seconds), color="tab:green")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(title=f"Epoch time over the first epoch's ({seconds[0]:.1f} s)", xlabel="epoch", ylabel="ratio")
    axes.set_ylim(bottom=0)
    _finish(axes)


def draw_thresholds(axes, history: list[dict], names: list[str]) -> None:
    """Sauron's threshold of every unit over the epochs."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    for name, colour in zip(names, colours, strict=True):
        axes.plot([epoch["state"]["tau"][name] for epoch in history], color=colour, linewidth=1)
    axes.set(title="Threshold tau (dark: first layer, light: last)", xlabel="epoch", ylabel="tau")
    _finish(axes)


def _finish(axes) -> None:
    axes.grid(alpha=0.3)
    _whole_epochs(axes)


def _whole_epochs(axes) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)


def _marker(values: list) -> str | None:
    # A line through a single epoch would not show.
    return "o" if len(values) < 3 else None
