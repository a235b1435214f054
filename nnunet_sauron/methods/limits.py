"""When and how much any method may cut: the settings that all share, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

POLY_EXPONENT = 0.9  # of nnU-Net's schedule
ROUNDING = 1e-9  # 0.29 * 100 is a little below 29


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """When and how much any method may cut.

    Attributes:
        cut_from: No cut before this fraction of the epochs.
        cut_until: No cut after this fraction: the network needs time, and learning rate, to recover.
        max_fraction_per_epoch: At most this fraction of a layer's channels (rounded) is removed in one epoch. Except
            in Shrink and in Sauron (without `published`) it falls with the learning rate, since the network hardly
            recovers from late cuts. None: no limit.
        max_loss_increase: No cut while the training loss (without a method's own term) is this much above its lowest
            so far: nothing in the methods themselves stops a collapse. None: cuts are never held back.
        min_channels: No layer gets narrower.
        round_to: Widths are kept at multiples of this number, which suits vector units; a layer of another width comes
            down to a multiple with its first cut.
        merge: Merge removed channels into those that are kept, by a fit on a few training batches (`pruning.merging`),
            instead of dropping them as published.
        merge_batches: Number of these batches; None: at least 6, and enough for 4 positions per channel of a layer.
        rate_after_cuts: Learning rate of the first epoch after the cutting phase, as a multiple of `initial_lr`; from
            there it falls to 0 as nnU-Net's does (learning rate rewinding: Renda, Frankle, Carbin, ICLR 2020). None:
            nnU-Net's schedule throughout.
    """

    cut_from: float = 0.0
    cut_until: float = 0.8
    max_fraction_per_epoch: float | None = 0.15
    max_loss_increase: float | None = 0.05
    min_channels: int = 2
    round_to: int = 1
    merge: bool = False
    merge_batches: int | None = None
    rate_after_cuts: float | None = None

    def __post_init__(self) -> None:
        for name in ("cut_from", "cut_until"):
            require(0 <= getattr(self, name) <= 1, name, "a fraction in [0, 1]", getattr(self, name))
        most = self.max_fraction_per_epoch
        require(most is None or 0 < most <= 1, "max_fraction_per_epoch", "a fraction in (0, 1], or None", most)
        if self.cut_from > self.cut_until:
            raise ValueError(f"cut_from ({self.cut_from}) must not be after cut_until ({self.cut_until}).")
        for name in ("max_loss_increase", "rate_after_cuts"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "above 0", value)
        for name in ("min_channels", "round_to", "merge_batches"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1", getattr(self, name))

    def without_effect(self) -> list[str]:
        """A sentence for each setting that is not at its default and yet changes nothing beside the others."""
        if self.merge_batches is None or self.merge:
            return []
        return [f"merge_batches={self.merge_batches} has no effect without merge=True"]

    def may_cut_after(self, epoch: int, num_epochs: int) -> bool:
        """Whether the epoch (counted from 0) lies in the cutting phase. The last one never does."""
        done = epoch + 1
        begun = self.cut_from * num_epochs - ROUNDING <= done
        return begun and done < num_epochs and done <= self.first_epoch_after_cuts(num_epochs)

    def first_epoch_after_cuts(self, num_epochs: int) -> int:
        """The epoch (counted from 0) before which the cutting phase ends."""
        return math.floor(self.cut_until * num_epochs + ROUNDING)

    def learning_rate(self, epoch: int, num_epochs: int) -> float | None:
        """The learning rate of an epoch over the one at the start; None: nnU-Net's."""
        first = self.first_epoch_after_cuts(num_epochs)
        if self.rate_after_cuts is None or epoch < first:
            return None
        return self.rate_after_cuts * (1 - (epoch - first) / (num_epochs - first)) ** POLY_EXPONENT


def require(condition: bool, name: str, expected: str, value) -> None:
    """Raise ValueError, which names the setting, what was expected and the value, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} must be {expected}; got {value}.")


def require_one_at_most(targets: Sequence[str]) -> None:
    """Raise ValueError, which names them, if several targets are given."""
    if len(targets) > 1:
        raise ValueError(f"Only one target can be met, but {' and '.join(targets)} are given; choose one.")


def require_fraction(name: str, value: float | None) -> None:
    """Raise ValueError unless a target is in (0, 1], or None."""
    require(value is None or 0 < value <= 1, name, "the fraction that stays, in (0, 1]", value)


def to_multiple(count: int, step: int, width: int) -> int:
    """The least multiple of a step that is not below a count of channels, or else the layer's whole width."""
    return min(width, math.ceil(count / step) * step)


def channels_to_keep(
    redundant: Sequence[int], width: int, settings: PruningSettings, learning_rate_left: float = 1.0
) -> list[int]:
    """Keep as many of a layer's redundant channels as the settings require.

    Args:
        redundant: Channels that should be removed, the most redundant first.
        width: Channels of the layer now.
        settings: `max_fraction_per_epoch`, `min_channels` and `round_to` apply.
        learning_rate_left: Learning rate over the one at the start.

    Returns:
        The channels that are kept, ascending.
    """
    step = settings.round_to
    # With a large step the fraction alone would never allow one: the next multiple below is always within reach.
    fraction = settings.max_fraction_per_epoch
    most = width if fraction is None else round(fraction * learning_rate_left * width)
    if step > 1:
        most = max(most, width - (math.ceil(width / step) - 1) * step)
    least_left = max(settings.min_channels, width - most, width - len(redundant))
    left = to_multiple(least_left, step, width)
    removed = set(redundant[: width - left])
    return [channel for channel in range(width) if channel not in removed]


def spread_steps(settings: PruningSettings, num_epochs: int, count: int) -> list[int]:
    """At most `count` of the epochs after which channels may be removed, evenly spaced, the first and last included."""
    epochs = steps(settings, num_epochs)
    if count >= len(epochs):
        return epochs
    if count == 1:
        return epochs[-1:]
    return [epochs[round(i * (len(epochs) - 1) / (count - 1))] for i in range(count)]


def steps(settings: PruningSettings, num_epochs: int, every: int = 1) -> list[int]:
    """The epochs after which a method with a schedule cuts: one in `every`, counted back from the last one.

    Raises:
        ValueError: No epoch lies in the cutting phase.
    """
    epochs = [epoch for epoch in range(num_epochs) if settings.may_cut_after(epoch, num_epochs)]
    if not epochs:
        raise ValueError(
            f"With num_epochs={num_epochs}, cut_from={settings.cut_from} and cut_until={settings.cut_until} there is "
            f"no epoch after which to cut; train longer or widen the cutting phase."
        )
    return epochs[(len(epochs) - 1) % every :: every]
