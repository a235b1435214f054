"""Pictures of a compression."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import AGAIN, write_atomically
from ..model.evaluation import mean_score
from ..model.history_plots import draw_widths
from .agreement import Measured
from .compressor import Compressed


def plot_trade_off(points: Sequence[tuple[Compressed, Measured]], path: Path) -> None:
    """Agreement against the MACs and the parameters that are left, for several tolerances.

    Raises:
        OSError: The picture could not be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    dice = [mean_score(measured.agreement, "dice").value for _, measured in points]
    for label, attribute, marker in (("MACs", "macs", "o"), ("parameters", "parameters", "s")):
        costs = [getattr(one, attribute) for one, _ in points]
        left = [100 * after / before for before, after in costs]
        axes.plot(left, dice, marker=marker, label=label)
        if attribute == "macs":
            for x, y, (one, _) in zip(left, dice, points, strict=True):
                axes.annotate(f"{one.tolerance:.3g}", (x, y), (-5, 4), textcoords="offset points",
                              fontsize=8, ha="right")  # fmt: skip
    axes.set(xlabel="left of the old model (%)", ylabel="Dice, new against old segmentations")
    axes.margins(0.1)
    axes.legend()
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=150, format="png"), AGAIN)


def plot_widths(one: Compressed, path: Path) -> None:
    """Channels of every layer, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.22 * len(one.before) + 1), layout="constrained")
    axes = figure.subplots()
    draw_widths(axes, one.before, one.after, ("before", "after"), ("0.85", "C0"))
    axes.legend()
    figure.savefig(path, dpi=120)
