"""What a compressed model is to meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..pruning import CostModel, Ranking
from ..pruning.tolerance import LATENCY_STEPS, STEPS, Cost, tolerance_for

GOALS = ("tolerance", "macs", "parameters", "latency")


@dataclass(frozen=True)
class Goal:
    """What the small model is to meet: exactly one of these.

    Attributes:
        tolerance: Relative squared error that each layer may make in the input of the next layers, weighted by its
            cost (`weighted`), or all layers of a stage together (`stage_rankings`); above 0.
        macs, parameters, latency: Fraction that is to be left, between 0 and 1.
    """

    tolerance: float | None = None
    macs: float | None = None
    parameters: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in GOALS if getattr(self, name) is not None}
        if len(given) != 1:
            raise ValueError(f"Give exactly one of {', '.join(GOALS)}; got {', '.join(given) or 'none'}.")
        ((name, value),) = given.items()
        if name == "tolerance":
            if not 0 < value < math.inf:
                raise ValueError(f"tolerance is a number above 0, such as 0.02; got {value:g}.")
        elif not 0 < value < 1:
            raise ValueError(f"{name} is a fraction between 0 and 1, such as 0.5; got {value:g}.")

    def counted(self, cost: CostModel) -> Cost:
        """What the goal counts, and layers' errors are weighed by: parameters, or else multiply-accumulates."""
        return cost.macs if self.parameters is None else cost.parameters

    @property
    def fraction(self) -> float:
        """The fraction of MACs, parameters or time that is to be left."""
        return next(value for value in (self.macs, self.parameters, self.latency) if value is not None)

    @property
    def steps(self) -> int:
        """Steps of the search for a tolerance; fewer where each one is a measurement of time."""
        return LATENCY_STEPS if self.latency is not None else STEPS


def tolerance_meeting(
    goal: Goal,
    fraction_left: Callable[[dict[str, int]], float],
    rankings: Mapping[str, Ranking],
    round_to: int,
    left_alone: Sequence[str],
) -> float:
    """The tolerance whose widths meet a goal.

    Args:
        goal: The goal.
        fraction_left: From widths to the fraction that is left of what the goal limits; unused for a tolerance.
        rankings: Of every unit or stage, weighted.
        round_to: Widths are multiples of this.
        left_alone: Units with too few positions for a stable fit, for the error.

    Raises:
        ValueError: The goal cannot be met.
    """
    if goal.tolerance is not None:
        return goal.tolerance
    try:
        return tolerance_for(goal.fraction, fraction_left, rankings, round_to, goal.steps)
    except ValueError as error:
        if not left_alone:
            raise
        raise ValueError(
            f"{error} Give more images, so that these need not be left alone: {', '.join(left_alone)}."
        ) from error
