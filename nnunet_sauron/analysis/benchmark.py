"""The verb `benchmark`: network time of trained models, measured in alternation in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..console.json_output import print_json
from ..console.terminal import PlainTable, plain_console
from ..model.checkpoints import CHECKPOINT
from ..model.device import chosen_device, machine
from ..model.trained import TrainedModel
from ..pruning.cost import forward_on_meta
from ..pruning.timing import Timing, time_networks
from .report.compare import short_names


def benchmark(
    folders: Sequence[Path],
    *,
    folds: list[str] | None = None,
    patch_size: Sequence[int] | None = None,
    batch_size: int = 1,
    threads: int | None = None,
    repeats: int = 30,
    device: str | None = None,
    checkpoint: str = CHECKPOINT,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Timing]:
    """Time the networks of trained models.

    Args:
        folders: The models'.
        folds: Of each model; None for its first one.
        patch_size: Voxels per axis; None for each model's own.
        batch_size: Patches in one forward pass.
        threads: CPU threads; None for PyTorch's choice.
        repeats: Measured forward passes of each.
        device: As `chosen_device` takes it.
        checkpoint: File name of the checkpoints to read.
        say: Called with what to know about a model: folds that are left out, a trainer that was not found.

    Returns:
        A timing for each model and fold, in the order given; its name tells batch and patch.

    Raises:
        FileNotFoundError: A folder is no trained model.
        ValueError: A number is below 1, there is no such device, or a network cannot take such a patch.
    """
    for name, value in (("--batch-size", batch_size), ("--threads", threads), ("--repeats", repeats)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    device = chosen_device(device)
    networks, shapes = {}, {}
    for name, folder in zip(short_names(folders), folders, strict=True):
        model = TrainedModel.read(folder, folds, checkpoint, first_only=not folds)
        for line in model.remarks:
            say(f"{name}: {line}")
        size = tuple(patch_size or model.patch_size)
        for fold in model.checkpoints:
            network, channels = model.network(fold), model.input_channels
            _check(network, channels, size, model)
            key = f"{name} fold {fold}, {batch_size} x {' x '.join(map(str, size))}"
            networks[key], shapes[key] = network, (batch_size, channels, *size)
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        return time_networks(networks, shapes, repeats=repeats, device=device)
    finally:
        torch.set_num_threads(before)


def print_benchmark(timings: dict[str, Timing], *, json_output: bool, remarks: Sequence[str] = ()) -> None:
    """A row for each network; the ratio is to the first one's. As JSON also remarks, such as on folds left out."""
    if json_output:
        named = {name: asdict(timing) for name, timing in timings.items()}
        print_json({"machine": machine(), "networks": named, "remarks": remarks})
        return
    first = next(iter(timings.values()))
    table = PlainTable("", "median, ms", "middle half, ms", "ratio")
    for name, one in timings.items():
        spread = f"{1000 * one.lower_quartile:.3g} to {1000 * one.upper_quartile:.3g}"
        ratio = f"{one.median / first.median:.2f}"
        table.add_row(name.replace("__", "\n"), f"{1000 * one.median:.3g}", spread, ratio)
    console = plain_console()
    console.print(table)
    how = f"on {first.device}, {first.threads} CPU threads"
    console.print(f"{first.repeats} forward passes each, after a warm-up, in alternation, {how}")


def _check(network: torch.nn.Module, channels: int, size: Sequence[int], model: TrainedModel) -> None:
    """Skips and upsampled maps must meet: a size that the strides do not divide fails in the middle of the network."""
    try:
        forward_on_meta(network, size, channels)
    except (RuntimeError, ValueError) as error:
        given, planned = (" x ".join(map(str, one)) for one in (size, model.patch_size))
        raise ValueError(
            f"{model.folder.name}, whose patches are {planned}, cannot take one of {given}; give as many numbers, each "
            f"a multiple of its total stride, at least one of them a larger one. {str(error)[:200]}"
        ) from error
