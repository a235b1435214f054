"""How many channels every layer keeps: one tolerance for the whole network gives each its own width."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

from .ranking import Ranking

Cost = Callable[[Mapping[str, int]], int]  # a method of `CostModel`

SENSITIVITY_POWER, COST_POWER = 0.75, 0.5  # of `weighted`
LEAST_TOLERANCE = 1e-7
STEPS = 40  # halvings of the tolerance's logarithm
LATENCY_STEPS = 5  # each is measured
COARSE_STEPS, COARSE_STEP = 10, 3  # so many divisions of the highest tolerance by so much


def weighted(rankings: Mapping[str, Ranking], cost: Cost) -> dict[str, Ranking]:
    """Rankings whose errors, from their factor down to 0, count by what they do to the output and what is saved for it.

    Each unit's errors times `sensitivity ** 0.75 / saved ** 0.5`, where `saved` is the cost of its last channel
    relative to the geometric mean over the units. Did errors add up in the output, fall exponentially with the part of
    the channels kept, and costs add up as well, both powers would be 1; these kept the segmentations of 2D, 3D and
    residual networks best (benchmarks/results).

    Args:
        rankings: Of every unit, as `rank_units` gives them.
        cost: What is to be saved.
    """
    factors = unit_factors(rankings, cost)
    return {
        name: replace(ranking, errors=tuple(factors[name] * e for e in ranking.errors), sensitivity=1.0)
        for name, ranking in rankings.items()
    }


def unit_factors(rankings: Mapping[str, Ranking], cost: Cost) -> dict[str, float]:
    """What a unit's error counts, relative to other units: the factors of `weighted`; 1 for a unit of one channel."""
    dense = {name: len(ranking.order) for name, ranking in rankings.items()}
    saved = {name: cost(dense) - cost({**dense, name: width - 1}) for name, width in dense.items() if width > 1}
    mean = statistics.geometric_mean(saved.values()) if saved else 1.0
    return {
        name: ranking.sensitivity**SENSITIVITY_POWER / (saved[name] / mean) ** COST_POWER if name in saved else 1.0
        for name, ranking in rankings.items()
    }


def widths_at(tolerance: float, rankings: Mapping[str, Ranking], round_to: int = 1) -> dict[str, int]:
    """The fewest channels of each unit whose error is within the tolerance, up to a multiple of `round_to`."""
    return {
        name: min(len(ranking.order), -(-ranking.least(tolerance) // round_to) * round_to)
        for name, ranking in rankings.items()
    }


def tolerance_for(
    goal: float,
    part_left: Callable[[dict[str, int]], float],
    rankings: Mapping[str, Ranking],
    round_to: int = 1,
    steps: int = STEPS,
) -> float:
    """The least tolerance at which the network costs at most `goal` of what it did.

    A measured cost need not fall with the widths, since PyTorch computes some narrow convolutions slower than wider
    ones (benchmarks/results). So coarse steps, up from the least, find the first tolerance that meets the goal, and
    halvings then look between it and the one before.

    Args:
        goal: A fraction, between 0 and 1.
        part_left: From widths to the fraction of the cost that is left.

    Raises:
        ValueError: No tolerance that was tried leaves so little, the highest of all included.
    """
    if not 0 < goal < 1:
        raise ValueError(f"A target is a fraction between 0 and 1, such as 0.5; got {goal:g}.")
    measured: dict[tuple[int, ...], float] = {}

    def left_at(tolerance: float) -> float:
        widths = widths_at(tolerance, rankings, round_to)
        key = tuple(widths.values())
        if key not in measured:
            measured[key] = part_left(widths)
        return measured[key]

    highest = max((first for first in (r.errors[0] for r in rankings.values()) if first < math.inf), default=None)
    if highest is None:
        raise ValueError(f"A target of {goal:g} cannot be met: every layer keeps all of its channels.")
    coarse = [LEAST_TOLERANCE, *(highest / COARSE_STEP**k for k in range(COARSE_STEPS, -1, -1))]
    found = next(((low, high) for low, high in pairwise(coarse) if left_at(high) <= goal), None)
    if found is None:
        raise ValueError(
            f"A target of {goal:g} cannot be met: at best {min(measured.values()):.2g} of the cost are left. Choose a "
            f"larger target" + (" or a smaller --round-to." if round_to > 1 else ".")
        )
    low, high = found
    for _ in range(steps):
        middle = math.sqrt(low * high)  # useful tolerances lie decades apart
        low, high = (low, middle) if left_at(middle) <= goal else (middle, high)
    return high


def cost_left(cost: Cost, dense: Mapping[str, int]) -> Callable[[dict[str, int]], float]:
    """From widths to the fraction of `cost` that is left of the dense widths' own."""
    whole = cost(dense)
    return lambda widths: cost(widths) / whole
