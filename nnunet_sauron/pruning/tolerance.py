"""The widths of all layers, from one tolerance for the whole network."""

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
COARSE_STEPS, COARSE_STEP = 10, 3  # the highest tolerance is divided by 3, up to 10 times


def weighted(rankings: Mapping[str, Ranking], cost: Cost) -> dict[str, Ranking]:
    """Rankings whose errors are weighted by their effect on the output and by the cost that is saved.

    Each unit's errors times `sensitivity ** 0.75 / saved ** 0.5`, where `saved` is the cost of its last channel
    relative to the geometric mean over the units. Both powers would be 1 if errors added up in the output and fell
    exponentially with the fraction of channels kept, and if costs added up; these powers kept the segmentations of 2D,
    3D and residual networks best (benchmarks/results).

    Args:
        rankings: Of every unit, as `rank_units` gives them.
        cost: The cost to save.
    """
    factors = unit_factors(rankings, cost)
    return {
        name: replace(ranking, errors=tuple(factors[name] * e for e in ranking.errors), sensitivity=1.0)
        for name, ranking in rankings.items()
    }


def unit_factors(rankings: Mapping[str, Ranking], cost: Cost) -> dict[str, float]:
    """The weight of each unit's error relative to other units, as in `weighted`; 1 for a unit of one channel.

    Args:
        rankings: Of every unit, as `rank_units` gives them.
        cost: A cost as a function of the widths, such as `CostModel.macs`.
    """
    dense = {name: len(ranking.order) for name, ranking in rankings.items()}
    saved = {name: cost(dense) - cost({**dense, name: width - 1}) for name, width in dense.items() if width > 1}
    mean = statistics.geometric_mean(saved.values()) if saved else 1.0
    return {
        name: ranking.sensitivity**SENSITIVITY_POWER / (saved[name] / mean) ** COST_POWER if name in saved else 1.0
        for name, ranking in rankings.items()
    }


def widths_at(tolerance: float, rankings: Mapping[str, Ranking], round_to: int = 1) -> dict[str, int]:
    """The fewest channels of each unit whose error is within the tolerance, up to a multiple of `round_to`.

    Args:
        tolerance: The part of a unit's readers' input that may be lost, weighted as the rankings are.
        rankings: Of every unit, as `weighted` gives them.
        round_to: Widths are multiples of this, up to the channels that there are.
    """
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
    """The least tolerance that leaves at most the fraction `goal` of the network's cost.

    A measured cost need not fall with the widths, since PyTorch computes some narrow convolutions slower than wider
    ones (benchmarks/results). So coarse steps, up from the least, find the first tolerance that meets the goal, and
    halvings then look between it and the one before.

    Args:
        goal: A fraction, between 0 and 1.
        part_left: From widths to the fraction of the cost that is left.

    Raises:
        ValueError: No tolerance, up to the highest, leaves as little.
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
            f"larger target" + (" or a smaller multiple of widths (round_to)." if round_to > 1 else ".")
        )
    low, high = found
    for _ in range(steps):
        middle = math.sqrt(low * high)  # useful tolerances lie decades apart
        low, high = (low, middle) if left_at(middle) <= goal else (middle, high)
    return high


def cost_left(cost: Cost, dense: Mapping[str, int]) -> Callable[[dict[str, int]], float]:
    """A function from widths to their cost as a fraction of the dense widths' cost."""
    whole = cost(dense)
    return lambda widths: cost(widths) / whole
