"""Methods that remove the globally lowest-ranked channels step by step, until a target is met."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..pruning.channels import ChannelLayout
from ..pruning.cost import CostModel
from .base import Progress, PruningMethod, PruningSettings, steps
from .targets import Target, TargetSettings, count_channels, least_widths, make_target


@dataclass(frozen=True, kw_only=True)
class StepwiseSettings(TargetSettings):
    """Settings of a pruning in steps; without `k` and a target, half of the channels stay.

    Attributes:
        k: Channels that go in a step; None: as many as the target asks for, spread evenly over the steps.
        recovery_epochs: Epochs of training from one step to the next.
        transposed_convolutions: Whether the outputs of transposed convolutions are cut as well; None: as published
            (STAMP and its variants leave them alone), and always with `widths_from`.
        seed: Of what chance decides.
    """

    k: int | None = None
    recovery_epochs: int = 1
    transposed_convolutions: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "recovery_epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.k is None:
            self.use_target("target_channels", 0.5)


class Stepwise(PruningMethod):
    """The base: a subclass ranks channels, lowest first to go, and may have its own order and choice of layers."""

    Settings = StepwiseSettings
    cuts_transposed = True

    def prepare(self, layout: ChannelLayout, cost: CostModel, given_widths: dict[str, int] | None) -> None:
        settings = self.settings
        self._steps = steps(settings, self.num_epochs, settings.recovery_epochs)
        fixed = self.left_alone(layout)
        if settings.given_targets():
            self._target = make_target(settings, layout, cost, given_widths, fixed)
        else:
            self._target = _no_target(settings, layout, fixed)
        going = self._target.start - self._target.end
        in_channels = self._target.measure is count_channels
        if (
            settings.k is not None
            and settings.given_targets()
            and in_channels
            and settings.k * len(self._steps) < going
        ):
            raise ValueError(
                f"k={settings.k} in {len(self._steps)} steps removes {settings.k * len(self._steps)} channels, but "
                f"{self._target.name} asks for {going:.0f}; leave k out, or take at least "
                f"{math.ceil(going / len(self._steps))}."
            )

    def target(self):
        if not self.settings.given_targets():
            return None
        return self._target.name, self._target.end / self._target.start, self._target.part_left

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

    def redundant(self, progress: Progress) -> dict[str, list[int]]:
        if progress.epoch not in self._steps:
            return {}
        widths = {name: series[-1] for name, series in progress.widths.items()}
        ranks = self.rank(widths, progress.epoch)
        done = (self._steps.index(progress.epoch) + 1) / len(self._steps)
        going = take_lowest(widths, ranks, self._target, done, self.settings, self.layer_score)
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
) -> dict[str, int]:
    """How many channels each unit loses in a step.

    One channel after another goes (with `round_to`, as many as lead to the next multiple), from the layer of the
    lowest score, until the target's limit for this step or `k` is reached.
    """
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
    while queue and target.measure(left) > target.limit(done) and (settings.k is None or gone < settings.k):
        _, name, size = heapq.heappop(queue)
        left[name] -= size
        gone += size
        enter(name)
    return {name: widths[name] - left[name] for name in widths}


def _no_target(settings: PruningSettings, layout: ChannelLayout, fixed: set[str]) -> Target:
    """`k` channels a step, for as long as there are steps and channels."""
    widths = layout.widths
    return Target("k", least_widths(settings, widths, fixed), count_channels, count_channels(widths), 0)
