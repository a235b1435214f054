"""Methods that remove the globally lowest-ranked channels step by step, until a target is met."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..pruning.channels import ChannelLayout
from ..pruning.cost import CostModel
from .base import PruningMethod, TrainingState, spread_steps, steps
from .targets import Target, TargetSettings, count_channels, least_widths, make_target

MOST_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class StepwiseSettings(TargetSettings):
    """Settings of a pruning in steps.

    Attributes:
        k: Channels that go in a step (at most, beside a target; the last step makes up for what was held); None: as
            many as the target asks for, spread evenly over the steps.
        recovery_epochs: Epochs of training from one step to the next; None: as many as leave 50 steps, evenly spread,
            and at least 1, which is the papers'.
        transposed_convolutions: Whether the outputs of transposed convolutions are cut as well; None: as published
            (STAMP and its variants leave them alone), and always with `widths_from`.
        seed: Of what chance decides.
    """

    k: int | None = None
    recovery_epochs: int | None = None
    transposed_convolutions: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "recovery_epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")


class Stepwise(PruningMethod):
    """The base: a subclass ranks channels, lowest first to go, and may have its own order and choice of layers."""

    Settings = StepwiseSettings
    cuts_transposed = True

    def prepare(self, layout: ChannelLayout, cost: CostModel, given_widths: dict[str, int] | None) -> None:
        settings = self.settings
        if settings.recovery_epochs is None:
            self._steps = spread_steps(settings, self.num_epochs, MOST_STEPS)
        else:
            self._steps = steps(settings, self.num_epochs, settings.recovery_epochs)
        fixed = self.left_alone(layout)
        self._dense_channels = count_channels(layout.widths)
        if settings.k is None:
            self._target = make_target(settings, layout, cost, given_widths, fixed)
            return
        most = settings.k * len(self._steps)
        if not settings.given_targets():
            least = least_widths(settings, layout.widths, fixed)
            end = max(count_channels(least), self._dense_channels - most)
            self._target = Target("k", least, count_channels, self._dense_channels, end, end)
            return
        self._target = make_target(settings, layout, cost, given_widths, fixed)
        going = self._target.start - self._target.end
        if self._target.measure is count_channels and most < going:
            raise ValueError(
                f"k={settings.k} in {len(self._steps)} steps removes {most} channels, but {self._target.name} asks for "
                f"{going:.0f}; leave k out, or take at least {math.ceil(going / len(self._steps))}."
            )

    def target(self):
        return self._target.name, self._target.asked / self._target.start, self._target.part_left

    def why_missed(self) -> str | None:
        if self.settings.k is None:
            return self._target.why
        return f"k={self.settings.k} in {len(self._steps)} steps is too little"

    def left_alone(self, layout: ChannelLayout) -> set[str]:
        """Units that are never cut."""
        wanted = self.settings.transposed_convolutions
        if wanted is None:
            wanted = self.cuts_transposed or self.settings.widths_from is not None
        return set() if wanted else {unit.name for unit in layout.units if unit.transposed}

    def rank(self, widths: Mapping[str, int], epoch: int) -> dict[str, Sequence[float]]:
        """A number per channel of each unit, the lowest of all to go first."""
        raise NotImplementedError

    def order(self, unit: str, ranks: Sequence[float], epoch: int) -> list[int]:
        """A unit's channels, the first to go first."""
        return sorted(range(len(ranks)), key=ranks.__getitem__)

    def layer_score(self, lowest: Sequence[float], width: int) -> float:
        """The unit of the lowest score loses channels next: by the ranks of its lowest ones, and its width now."""
        return sum(lowest) / len(lowest)

    def redundant(self, progress: TrainingState) -> dict[str, list[int]]:
        if progress.epoch not in self._steps:
            return {}
        widths = {name: series[-1] for name, series in progress.widths.items()}
        ranks = self.rank(widths, progress.epoch)
        done = (self._steps.index(progress.epoch) + 1) / len(self._steps)
        most = None
        if self.settings.k is not None and progress.last_chance:  # guards may have held some of the steps before
            most = self.settings.k * len(self._steps) - (self._dense_channels - count_channels(widths))
        going = take_lowest(widths, ranks, self._target, done, self.settings, self.layer_score, most)
        return {name: self.order(name, ranks[name], progress.epoch)[:count] for name, count in going.items() if count}


def over_layer_norm(scores: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """Ranks that can be compared between layers: each layer's scores (C,), at least 0, over their L2 norm."""
    return {name: (s / s.norm().clamp_min(torch.finfo(s.dtype).tiny)).tolist() for name, s in scores.items()}


def take_lowest(
    widths: Mapping[str, int],
    ranks: Mapping[str, Sequence[float]],
    target: Target,
    done: float,
    settings: StepwiseSettings,
    layer_score: Callable[[Sequence[float], int], float],
    most: int | None = None,
) -> dict[str, int]:
    """How many channels each unit loses in a step.

    One channel after another goes (with `round_to`, as many as lead to the next multiple), from the layer of the
    lowest score, until the target's limit for this step, or `most` channels (None: `k`), are reached.
    """
    most = settings.k if most is None else most
    left = dict(widths)
    ascending = {name: sorted(values) for name, values in ranks.items()}
    queue: list[tuple[float, str, int]] = []

    def enter(name: str) -> None:
        size = (left[name] - 1) % settings.round_to + 1
        if left[name] - size >= target.least[name]:
            gone = widths[name] - left[name]
            heapq.heappush(queue, (layer_score(ascending[name][gone : gone + size], left[name]), name, size))

    for name in widths:
        enter(name)
    gone = 0
    limit = target.limit(done) + 1e-9 * target.start  # which may be a channel's count, but for its last digit
    while queue and target.measure(left) > limit and (most is None or gone < most):
        _, name, size = heapq.heappop(queue)
        left[name] -= size
        gone += size
        enter(name)
    return {name: widths[name] - left[name] for name in widths}
