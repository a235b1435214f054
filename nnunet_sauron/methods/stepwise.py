"""Methods that remove the globally lowest-ranked channels step by step, until a target is met."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..pruning.channels import ChannelLayout
from ..pruning.cost import CostModel
from .base import PruningMethod, TrainingState
from .limits import require, spread_steps, steps
from .measuring import NOTHING_MEASURED
from .targets import Target, TargetSettings, count_channels, least_widths, make_target

MOST_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class StepwiseSettings(TargetSettings):
    """Settings of a pruning in steps.

    Attributes:
        k: Channels removed in a step: at most, beside a target, and the last step makes up for those that were held
            back; more where `round_to` asks for it. None: as many as the target asks for, spread evenly over the
            steps.
        recovery_epochs: Epochs of training from one step to the next, 1 in the papers. None: at least 1, and as many as
            lead to at most 50 steps, evenly spread.
        transposed_convolutions: Whether the outputs of transposed convolutions are cut as well. None: as published
            (STAMP and its variants leave them alone), and always with `widths_from`.
        seed: Of random choices.
    """

    k: int | None = None
    recovery_epochs: int | None = None
    transposed_convolutions: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "recovery_epochs"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


class Stepwise(PruningMethod):
    """The base: a subclass scores channels, of which the lowest are removed first, and may choose layers and channels
    in another way."""

    Settings = StepwiseSettings
    cuts_transposed = True

    def prepare(self, layout: ChannelLayout, cost: CostModel, given_widths: dict[str, int] | None) -> None:
        settings = self.settings
        if settings.recovery_epochs is None:
            self._steps = spread_steps(settings, self.num_epochs, MOST_STEPS)
        else:
            self._steps = steps(settings, self.num_epochs, settings.recovery_epochs)
        fixed = self.never_cut(layout)
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
        removed = self._target.start - self._target.end
        if self._target.measure is count_channels and most < removed:
            raise ValueError(
                f"k={settings.k} in {len(self._steps)} steps removes {most} channels, but {self._target.name} asks for "
                f"{removed:.0f}; leave k out, or take at least {math.ceil(removed / len(self._steps))}."
            )

    def target(self):
        return self._target.name, self._target.part_asked, self._target.part_left

    def why_missed(self) -> str | None:
        if self.settings.k is None:
            return self._target.why
        return f"k={self.settings.k} in {len(self._steps)} steps is too little"

    def never_cut(self, layout: ChannelLayout) -> set[str]:
        """Units that are never cut."""
        wanted = self.settings.transposed_convolutions
        if wanted is None:
            wanted = self.cuts_transposed or self.settings.widths_from is not None
        return set() if wanted else {unit.name for unit in layout.units if unit.transposed}

    def score(self, training: TrainingState) -> dict[str, Sequence[float]]:
        """A number per channel of each unit, the lowest of all to be removed first; empty where none was measured.

        On every DDP rank.
        """
        raise NotImplementedError

    def order(self, unit: str, scores: Sequence[float], epoch: int) -> list[int]:
        """A unit's channels, those to be removed first."""
        return sorted(range(len(scores)), key=scores.__getitem__)

    def layer_score(self, lowest: Sequence[float], width: int) -> float:
        """The unit of the lowest layer score loses channels next: of its lowest channels' scores, and its width."""
        return sum(lowest) / len(lowest)

    def redundant(self, training: TrainingState) -> dict[str, list[int]]:
        self.unmeasured = None
        if training.epoch not in self._steps:
            return {}
        scores, widths = self.score(training), training.widths_now
        if not scores:
            self.unmeasured = NOTHING_MEASURED
            return {}
        done = (self._steps.index(training.epoch) + 1) / len(self._steps)
        most = None
        if self.settings.k is not None and training.is_last_cut:  # guards may have held back steps before this one
            most = self.settings.k * len(self._steps) - (self._dense_channels - count_channels(widths))
        counts = count_lowest(widths, scores, self._target, done, self.settings, self.layer_score, most)
        return {name: self.order(name, scores[name], training.epoch)[:count] for name, count in counts.items() if count}


def random_scores(training: TrainingState, seed: int) -> dict[str, list[float]]:
    """A number from 0 to 1 per channel of each unit; the same for a seed and an epoch, on every DDP rank."""
    draw = random.Random(f"{seed}:{training.epoch}")
    return {name: [draw.random() for _ in range(width)] for name, width in training.widths_now.items()}


def over_layer_norm(scores: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """Scores that can be compared between layers: each layer's (C,), at least 0, over their L2 norm."""
    return {name: (s / s.norm().clamp_min(torch.finfo(s.dtype).tiny)).tolist() for name, s in scores.items()}


def count_lowest(
    widths: Mapping[str, int],
    scores: Mapping[str, Sequence[float]],
    target: Target,
    done: float,
    settings: StepwiseSettings,
    layer_score: Callable[[Sequence[float], int], float],
    most: int | None = None,
) -> dict[str, int]:
    """How many channels each unit loses in a step.

    Channels are taken one by one (with `round_to`, as many as lead to the next multiple) from the unit of the lowest
    layer score, until this step's part of the target is reached, or `most` channels (None: `k`) are taken.
    """
    most = settings.k if most is None else most
    left = dict(widths)
    ascending = {name: sorted(values) for name, values in scores.items()}
    queue: list[tuple[float, str, int]] = []

    def enqueue(name: str) -> None:
        size = (left[name] - 1) % settings.round_to + 1
        if left[name] - size >= target.least[name]:
            taken = widths[name] - left[name]
            heapq.heappush(queue, (layer_score(ascending[name][taken : taken + size], left[name]), name, size))

    for name in widths:
        enqueue(name)
    taken = 0
    limit = target.limit(done) + 1e-9 * target.start  # which may be a channel's count, but for its last digit
    while queue and target.measure(left) > limit and (most is None or taken < most):
        _, name, size = heapq.heappop(queue)
        left[name] -= size
        taken += size
        enqueue(name)
    return {name: widths[name] - left[name] for name in widths}
