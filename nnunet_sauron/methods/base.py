"""What every pruning method shares: the settings of when and how much to cut, and the interface a trainer drives.

A method scores channels, may add a term to the loss, and names what is redundant after an epoch. It knows nothing of
nnU-Net: `trainers.PruningTrainer` calls it, trims its wishes to the settings below, and removes channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..pruning.channels import ChannelLayout


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """When and how much any method may cut.

    Attributes:
        cut_from: No cut before this fraction of the epochs.
        cut_until: No cut after this fraction: what is left needs time, and learning rate, to heal.
        max_fraction_per_epoch: Of a layer's channels, at most this part (rounded) goes in one epoch, and less as the
            learning rate falls: late cuts hardly heal.
        max_loss_increase: All cuts are held while the training loss (without a method's own term) is this much above
            its lowest so far: nothing in the methods themselves stops a collapse.
        min_channels: No layer gets narrower.
        round_to: Widths stay at multiples of this number, which vector units reward; layers that begin at another
            width go down to a multiple with their first cut.
    """

    cut_from: float = 0.0
    cut_until: float = 0.8
    max_fraction_per_epoch: float = 0.15
    max_loss_increase: float = 0.05
    min_channels: int = 2
    round_to: int = 1

    def __post_init__(self) -> None:
        for name in ("cut_from", "cut_until", "max_fraction_per_epoch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a fraction in [0, 1]; got {getattr(self, name)}.")
        if self.cut_from > self.cut_until:
            raise ValueError(f"cut_from ({self.cut_from}) must not be after cut_until ({self.cut_until}).")
        if not self.max_loss_increase > 0:
            raise ValueError(f"max_loss_increase must be above 0; got {self.max_loss_increase}.")
        for name in ("min_channels", "round_to"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def may_cut_after(self, epoch: int, num_epochs: int) -> bool:
        """Whether the epoch (counted from 0) lies in the cutting phase. The last one never does."""
        done = epoch + 1
        return done < num_epochs and self.cut_from * num_epochs <= done <= self.cut_until * num_epochs


@dataclass(frozen=True)
class Progress:
    """The training so far, newest epoch last.

    Attributes:
        train_losses: Training loss per epoch, a method's own term included.
        val_losses: Validation loss per epoch.
        widths: Channels per epoch, by unit name.
    """

    train_losses: Sequence[float]
    val_losses: Sequence[float]
    widths: dict[str, Sequence[int]]


class PruningMethod:
    """The base that a method fills in. Called in this order: attach, then for each epoch start_epoch, before every
    training step before_step and after its forward regulariser, and redundant at the end of the epoch.

    Args:
        settings: An instance of the class's `Settings`.
        num_epochs: Length of the training.
    """

    Settings: type[PruningSettings] = PruningSettings

    def __init__(self, settings: PruningSettings, num_epochs: int):
        self.settings = settings
        self.num_epochs = num_epochs

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        """Begin to observe an unwrapped network. Its modules stay the same objects through every cut."""

    def start_epoch(self, epoch: int, widths: dict[str, int]) -> None:
        """An epoch begins, with these channels per unit."""

    def before_step(self, steps_left: int) -> None:
        """A training step begins; `steps_left` counts it and the ones after it in this epoch."""

    def regulariser(self) -> torch.Tensor | None:
        """A scalar to add to the loss of the forward that just ran in training mode, or None."""

    def redundant(self, progress: Progress) -> dict[str, list[int]]:
        """The channels that should go, by unit name, the most redundant first. Called on one DDP rank only."""
        raise NotImplementedError

    def state(self) -> dict:
        """What a resumed run must know, as plain Python; stored in the history after each epoch."""
        return {}

    def load_state(self, state: dict) -> None:
        """Continue from what `state` returned."""


def channels_to_keep(
    redundant: Sequence[int], width: int, settings: PruningSettings, learning_rate_left: float = 1.0
) -> list[int]:
    """Trim a method's wish for one layer to the settings.

    Args:
        redundant: Channels that should go, the most redundant first.
        width: Channels of the layer now.
        settings: `max_fraction_per_epoch`, `min_channels` and `round_to` apply.
        learning_rate_left: Learning rate over the one at the start.

    Returns:
        The channels that stay, ascending.
    """
    step = settings.round_to
    # With a large step the fraction alone would never allow one: the next multiple below is always within reach.
    most = round(settings.max_fraction_per_epoch * learning_rate_left * width)
    if step > 1:
        most = max(most, width - (math.ceil(width / step) - 1) * step)
    least_left = max(settings.min_channels, width - most, width - len(redundant))
    left = min(width, math.ceil(least_left / step) * step)
    going = set(redundant[: width - left])
    return [channel for channel in range(width) if channel not in going]
