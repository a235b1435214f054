"""How many channels every layer keeps: one tolerance for the whole network gives each its own width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..pruning import Ranking

LEAST_TOLERANCE = 1e-7
STEPS = 40  # halvings of the tolerance's logarithm
LATENCY_STEPS = 10  # each is measured


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

    Args:
        goal: A fraction, between 0 and 1.
        part_left: From widths to the fraction of the cost that is left.

    Raises:
        ValueError: Even one channel a layer (`round_to` channels) costs more.
    """
    if not 0 < goal < 1:
        raise ValueError(f"A target is a fraction between 0 and 1, such as 0.5; got {goal:g}.")
    least = part_left(widths_at(1.0, rankings, round_to))
    if least > goal:
        raise ValueError(
            f"A target of {goal:g} cannot be met: with the fewest channels in every layer {least:.2g} of the cost are "
            f"left. Choose a larger target" + (" or a smaller --round-to." if round_to > 1 else ".")
        )
    low, high = LEAST_TOLERANCE, 1.0
    for _ in range(steps):
        middle = math.sqrt(low * high)  # useful tolerances lie decades apart
        low, high = (low, middle) if part_left(widths_at(middle, rankings, round_to)) <= goal else (middle, high)
    return high


def cost_left(cost: Callable[[Mapping[str, int]], int], dense: Mapping[str, int]) -> Callable[[dict[str, int]], float]:
    """From widths to the fraction of `cost` (a method of `CostModel`) that is left of the dense widths' own."""
    whole = cost(dense)
    return lambda widths: cost(widths) / whole
