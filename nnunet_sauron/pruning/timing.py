"""How long networks take for one input, measured so that their ratio can be trusted."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .eval_mode import mixed_precision

LEAST_REPEATS = 3
RATIO_REPEATS = 9  # of `time_left`, each time
MOST_TIMES = 4
SCATTER = 0.3  # of the median, for the middle half of the repeats: a machine that does something else as well


@dataclass(frozen=True)
class Timing:
    """Forward passes of one network, in seconds.

    Attributes:
        median: Median of all repeats.
        lower_quartile: 25th percentile.
        upper_quartile: 75th percentile.
        repeats: Number of measured forward passes.
        threads: CPU threads PyTorch could use.
        device: Where it ran.
        fastest: The shortest of all; what is done beside it can only make a pass longer.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    repeats: int
    threads: int
    device: str
    fastest: float = math.nan

    @property
    def interquartile_range(self) -> float:
        """Spread of the middle half of the repeats, in seconds."""
        return self.upper_quartile - self.lower_quartile

    @property
    def scatters(self) -> bool:
        """Whether the machine was so busy that the median tells little."""
        return self.interquartile_range > SCATTER * self.median


def time_networks(
    networks: Mapping[str, nn.Module],
    input_shape: Sequence[int] | Mapping[str, Sequence[int]],
    *,
    repeats: int = 30,
    warmup: int = 5,
    device: str | torch.device = "cpu",
    seconds: float | None = None,
) -> dict[str, Timing]:
    """Time forward passes of several networks in one process, taking turns.

    Taking turns lets a slow moment of the machine hit all networks alike; every round turns the order round. The
    networks run in evaluation mode under `torch.inference_mode`, on random normal float32 input; on a GPU under
    autocast, as in nnU-Net's prediction. They stay on `device`, their modes are put back.

    Args:
        networks: Networks by name; they are moved to `device`.
        input_shape: Shape of the input with batch and channels, as in (1, 1, 64, 64); or one for each name.
        repeats: Measured forward passes of each network.
        warmup: Forward passes of each network before that.
        device: Where to run.
        seconds: End after the round in which so much time has passed, with `LEAST_REPEATS` measured at least.

    Returns:
        One `Timing` a network, in the order given.

    Raises:
        ValueError: If there is no network, or `repeats` is below 1, or `warmup` below 0.
    """
    if not networks:
        raise ValueError("networks is empty; give at least one network to time.")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats is {repeats} and warmup is {warmup}; expected at least 1 and at least 0.")
    device = torch.device(device)
    shapes = input_shape if isinstance(input_shape, Mapping) else dict.fromkeys(networks, input_shape)
    generator = torch.Generator().manual_seed(0)
    patches = {name: torch.randn(tuple(shapes[name]), generator=generator).to(device) for name in networks}
    modes = {name: network.training for name, network in networks.items()}
    measured: dict[str, list[float]] = {name: [] for name in networks}
    begun = time.perf_counter()
    try:
        for network in networks.values():
            network.to(device).eval()
        order = list(networks)
        for turn in range(warmup + repeats):
            for name in order:
                elapsed = _time_once(networks[name], patches[name], device)
                if turn >= warmup:
                    measured[name].append(elapsed)
            order.reverse()
            late = seconds is not None and time.perf_counter() - begun > seconds
            if late and len(measured[order[0]]) >= LEAST_REPEATS:
                break
            warmup = min(warmup, turn + 1) if late else warmup
    finally:
        for name, network in networks.items():
            network.train(modes[name])
    return {name: _summarise(values, device) for name, values in measured.items()}


def time_left(
    whole: nn.Module, narrow: nn.Module, input_shape: Sequence[int], device: str | torch.device
) -> tuple[float, bool]:
    """The time of a narrow network as a fraction of the whole one's, of the fastest passes of each.

    Both are timed taking turns; where the machine does something else as well, up to `MOST_TIMES` times.

    Args:
        whole, narrow: The networks; they are moved to `device`, and stay there.
        input_shape: (batch, channels, *patch).
        device: Where to run.

    Returns:
        The fraction, and whether the machine was busy to the end, so that the fraction may be wrong.
    """
    fastest, busy = {"whole": math.inf, "narrow": math.inf}, True
    for _ in range(MOST_TIMES):
        timed = time_networks(
            {"whole": whole, "narrow": narrow}, input_shape, repeats=RATIO_REPEATS, warmup=2, device=device
        )
        fastest = {name: min(before, timed[name].fastest) for name, before in fastest.items()}
        busy = any(one.scatters for one in timed.values())
        if not busy:
            break
    return fastest["narrow"] / fastest["whole"], busy


def _time_once(network: nn.Module, patch: torch.Tensor, device: torch.device) -> float:
    with torch.inference_mode(), mixed_precision(device):
        _wait_for(device)
        start = time.perf_counter()
        network(patch)
        _wait_for(device)
        return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    """GPUs run behind Python's back; the CPU does not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _summarise(seconds: list[float], device: torch.device) -> Timing:
    lower, median, upper = (float(value) for value in np.percentile(seconds, (25, 50, 75)))
    threads = torch.get_num_threads()
    return Timing(median, lower, upper, len(seconds), threads, str(device), fastest=min(seconds))
