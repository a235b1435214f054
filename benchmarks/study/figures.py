"""Pictures of trainings: epoch time over the first epoch's, and channels left on every level of the network.

    python benchmarks/study/figures.py MODEL_FOLDER... [-f FOLD] -o FOLDER

The first is Fig. 4 of Sauron's paper, the second Fig. 3 of Lean Unet's. Layers one by one are in the report of
`nnUNetv2_sauron report`, feature maps and clusterability are verbs of their own.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from grid import CHECKPOINTS
from matplotlib import pyplot as plt

from nnunet_sauron.model.checkpoints import PRUNING, read_checkpoint

BEYOND = 2.5  # times the first epoch's: a pause of the machine, not the training
LAYER = re.compile(r"(encoder|decoder)\.(stem|\w+\.(\d+))")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_FOLDER", help="trained models' folders")
    parser.add_argument("-f", dest="fold", default="0", help="fold; %(default)s")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="for the pictures")
    arguments = parser.parse_args()
    try:
        logs: dict[str, dict[str, list]] = {}
        for model in arguments.models:
            name = _name(model)
            logs[str(model) if name in logs else name] = read_log(model, arguments.fold)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    arguments.o.mkdir(parents=True, exist_ok=True)
    draw_epoch_times(logs, arguments.o / "epoch_time.png")
    pruned = {name: log for name, log in logs.items() if log.get(PRUNING)}
    if pruned:
        draw_levels(pruned, arguments.o / "levels.png")


def read_log(model: Path, fold: str) -> dict[str, list]:
    """nnU-Net's logged series of a fold, of its last checkpoint.

    Raises:
        FileNotFoundError: The fold has no checkpoint.
        ValueError: It cannot be read.
    """
    folder = model / f"fold_{fold}"
    path = next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no checkpoint; give the folder of a model, which holds fold_{fold}.")
    return read_checkpoint(path)["logging"]


def draw_epoch_times(logs: Mapping[str, Mapping[str, list]], path: Path) -> None:
    """Each epoch's time over the first one's, a line a training; a mark at the top is an epoch beyond the axis."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    longest = 0.0
    for name, log in logs.items():
        times = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
        seconds = [end - start for start, end in times]
        ratios = [one / seconds[0] for one in seconds]
        longest = max(longest, *ratios)
        (line,) = axes.plot([min(one, BEYOND) for one in ratios], label=f"{name} (first: {seconds[0]:.1f} s)")
        beyond = [epoch for epoch, one in enumerate(ratios) if one > BEYOND]
        axes.plot(beyond, [BEYOND] * len(beyond), "^", color=line.get_color())
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(xlabel="epoch", ylabel="epoch time over the first epoch's", ylim=(0, min(longest, BEYOND) * 1.05))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_levels(logs: Mapping[str, Mapping[str, list]], path: Path) -> None:
    """Channels left on each level, encoder and decoder apart, a panel a training."""
    figure, panels = plt.subplots(
        1, len(logs), figsize=(4.2 * len(logs) + 1.6, 4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (name, log) in zip(panels[0], logs.items(), strict=True):
        levels = [channels_of_levels(epoch["widths"]) for epoch in log[PRUNING]]
        colours = plt.get_cmap("viridis")
        deepest = max(level for _, level in levels[0])
        for side, level in sorted(levels[0], reverse=True):
            left = [one[side, level] / levels[0][side, level] for one in levels]
            axes.plot(left, "-" if side == "encoder" else "--", color=colours(0.9 * level / max(1, deepest)),
                      label=f"{side}, level {level} ({levels[0][side, level]})")  # fmt: skip
        axes.set(title=name, xlabel="epoch", ylim=(0, 1.05))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("channels left (at the start)")
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def channels_of_levels(widths: Mapping[str, int]) -> dict[tuple[str, int], int]:
    """Channels of all layers of a side and a level, 0 the highest resolution.

    Args:
        widths: Channels by unit, as the pruning history has them.
    """
    return {key: sum(widths[name] for name in names) for key, names in layers_of_levels(widths).items()}


def layers_of_levels(names: Iterable[str]) -> dict[tuple[str, int], list[str]]:
    """Units' names by side and level, 0 the highest resolution: down the encoder, then up the decoder."""
    layers = [(match[1], int(match[3] or 0), name) for name in names if (match := LAYER.match(name))]
    deepest = max(index for side, index, _ in layers if side == "encoder")
    found: dict[tuple[str, int], list[str]] = {}
    for side, index, name in sorted(layers, key=lambda layer: (layer[0] == "decoder", layer[1])):
        found.setdefault((side, index if side == "encoder" else deepest - 1 - index), []).append(name)
    return found


def _name(model: Path) -> str:
    """The run's, in the study's folders; else the model folder's."""
    resolved = model.resolve()
    return resolved.parents[1].name if resolved.parent.name.startswith("Dataset") else resolved.name


if __name__ == "__main__":
    main()
