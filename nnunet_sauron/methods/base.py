"""What every pruning method shares: the settings of when and how much to cut, and the interface a trainer drives.

A method scores channels, may add a term to the loss, and names what stays after an epoch. It knows nothing of nnU-Net:
`trainers.PruningTrainer` calls it, and removes channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..pruning.channels import ChannelLayout
from ..pruning.cost import CostModel


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """When and how much any method may cut.

    Attributes:
        cut_from: No cut before this fraction of the epochs.
        cut_until: No cut after this fraction: what is left needs time, and learning rate, to heal.
        max_fraction_per_epoch: Of a layer's channels, at most this part (rounded) goes in one epoch, and less as the
            learning rate falls: late cuts hardly heal. None: no such limit.
        max_loss_increase: All cuts are held while the training loss (without a method's own term) is this much above
            its lowest so far: nothing in the methods themselves stops a collapse. None: never held.
        min_channels: No layer gets narrower.
        round_to: Widths stay at multiples of this number, which vector units reward; layers that begin at another
            width go down to a multiple with their first cut.
        merge: Fold what goes into what stays, fitted on a few training batches (`pruning.merging`), instead of dropping
            it as published.
        merge_batches: How many batches; None: at least 6, and enough for 4 positions a channel in every layer.
    """

    cut_from: float = 0.0
    cut_until: float = 0.8
    max_fraction_per_epoch: float | None = 0.15
    max_loss_increase: float | None = 0.05
    min_channels: int = 2
    round_to: int = 1
    merge: bool = False
    merge_batches: int | None = None

    def __post_init__(self) -> None:
        for name in ("cut_from", "cut_until", "max_fraction_per_epoch"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a fraction in [0, 1]; got {getattr(self, name)}.")
        if self.cut_from > self.cut_until:
            raise ValueError(f"cut_from ({self.cut_from}) must not be after cut_until ({self.cut_until}).")
        if self.max_loss_increase is not None and not self.max_loss_increase > 0:
            raise ValueError(f"max_loss_increase must be above 0; got {self.max_loss_increase}.")
        for name in ("min_channels", "round_to", "merge_batches"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def without_effect(self) -> list[str]:
        """A sentence for each setting that is not at its default and yet changes nothing beside the others."""
        if self.merge_batches is None or self.merge:
            return []
        return [f"merge_batches={self.merge_batches} has no effect without merge=True"]

    def may_cut_after(self, epoch: int, num_epochs: int) -> bool:
        """Whether the epoch (counted from 0) lies in the cutting phase. The last one never does."""
        done = epoch + 1
        return done < num_epochs and self.cut_from * num_epochs <= done <= self.cut_until * num_epochs


@dataclass(frozen=True)
class TrainingState:
    """The training so far, newest epoch last.

    Attributes:
        train_losses: Training loss per epoch, a method's own term included.
        val_losses: Validation loss per epoch.
        widths: Channels per epoch, by unit name.
        patches: Draws at least so many patches of training data, in batches (B, channels, *patch), to measure on.
        regions: Whether classes may overlap, and outputs go through a sigmoid.
        last_chance: Whether this is the last epoch after which channels may go.
        learning_rate_left: Learning rate over the one at the start.
    """

    train_losses: Sequence[float]
    val_losses: Sequence[float]
    widths: dict[str, Sequence[int]]
    patches: Callable[[int], list[torch.Tensor]] | None = None
    regions: bool = False
    last_chance: bool = False
    learning_rate_left: float = 1.0

    @property
    def epoch(self) -> int:
        """The epoch that just ended, counted from 0."""
        return len(self.train_losses) - 1


class PruningMethod:
    """The base that a method fills in. Called in this order: prepare, attach, then for each epoch start_epoch; around
    every training step before_step, regulariser after its forward, before_update after its backward and after_step;
    end_epoch when the steps are over; redundant after the validation, and before_removal when what it named is about to
    go.

    Args:
        settings: An instance of the class's `Settings`.
        num_epochs: Length of the training.

    Attributes:
        latest_only: Keys of `state` that only the newest epoch's record keeps: what a resumed run needs and is large.
    """

    Settings: type[PruningSettings] = PruningSettings
    latest_only: tuple[str, ...] = ()

    def __init__(self, settings: PruningSettings, num_epochs: int):
        self.settings = settings
        self.num_epochs = num_epochs

    def prepare(self, layout: ChannelLayout, cost: CostModel, given_widths: dict[str, int] | None) -> None:
        """Fit the settings to the dense network, before anything is trained.

        Args:
            layout: The dense network's.
            cost: Parameters and multiply-accumulates at any widths.
            given_widths: Those of the model that the setting `widths_from` names, if there is one.

        Raises:
            ValueError: They cannot be met.
        """

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        """Begin to observe an unwrapped network. Its modules stay the same objects through every cut.

        A hook does nothing in evaluation mode: merging runs the network in it, and a copy with the same hooks.
        """

    def start_epoch(self, epoch: int, widths: dict[str, int]) -> None:
        """An epoch begins, with these channels per unit."""

    def before_step(self, steps_left: int) -> None:
        """A training step begins; `steps_left` counts it and the ones after it in this epoch."""

    def regulariser(self) -> torch.Tensor | None:
        """A scalar to add to the loss of the forward that just ran in training mode, or None."""

    def before_update(self) -> None:
        """The optimiser is about to step: the gradients are unscaled, clipped, and averaged over DDP's ranks. Not
        called where a gradient scaler skips the step."""

    def after_step(self, loss_scale: float) -> None:
        """A training step is over, also one whose update was skipped. Gradients of what is not in the optimiser are
        this rank's own, `loss_scale` times too large."""

    def end_epoch(self) -> None:
        """The epoch's training steps are over; on every DDP rank."""

    def reason_to_hold(self) -> str | None:
        """Why nothing can be told about channels after this epoch, or None."""

    def target(self) -> tuple[str, float, Callable[[Mapping[str, int]], float]] | None:
        """What the training is to end with: the setting's name, the part that is to be left, and how to measure that
        part at any widths. None for a method that ends where its thresholds lead it."""
        return None

    def why_missed(self) -> str | None:
        """Why more is left after the last cut than `target` asks for, where the method knows."""
        return None

    def has_schedule(self) -> bool:
        """Whether the last cut of all is due whatever the loss: held before, it makes up for all that was held."""
        return self.target() is not None

    def redundant(self, progress: TrainingState) -> dict[str, list[int]]:
        """The channels that should go, by unit name, the most redundant first: what `keep` trims to the settings."""
        raise NotImplementedError

    def keep(self, progress: TrainingState) -> dict[str, list[int]]:
        """The channels that stay, ascending, of each unit that loses any. Called on one DDP rank only.

        The last cut of all meets a target whatever `max_fraction_per_epoch` says: that delays cuts, and cancels none.
        """
        settings = self.settings
        if progress.last_chance and self.target():
            settings = replace(settings, max_fraction_per_epoch=None)
        kept = {
            name: channels_to_keep(going, progress.widths[name][-1], settings, progress.learning_rate_left)
            for name, going in self.redundant(progress).items()
        }
        return {name: channels for name, channels in kept.items() if len(channels) < progress.widths[name][-1]}

    def before_removal(self, keep: dict[str, list[int]]) -> None:
        """All but these channels of these units are about to be removed; on every DDP rank."""

    def state(self) -> dict:
        """What a resumed run must know, as plain Python or tensors; stored in the history after each epoch."""
        return {}

    def load_state(self, state: dict) -> None:
        """Continue from what `state` returned. Comes after `attach`."""


def mean_of(terms: list[torch.Tensor]) -> torch.Tensor | None:
    """The mean of the layers' terms of one forward, which are taken out of the list; None if there are none."""
    if not terms:
        return None
    mean = torch.stack(terms).mean()
    terms.clear()
    return mean


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
    fraction = settings.max_fraction_per_epoch
    most = width if fraction is None else round(fraction * learning_rate_left * width)
    if step > 1:
        most = max(most, width - (math.ceil(width / step) - 1) * step)
    least_left = max(settings.min_channels, width - most, width - len(redundant))
    left = min(width, math.ceil(least_left / step) * step)
    going = set(redundant[: width - left])
    return [channel for channel in range(width) if channel not in going]


def spread_steps(settings: PruningSettings, num_epochs: int, count: int) -> list[int]:
    """At most so many of the epochs after which channels may go, evenly, the first and the last one included."""
    epochs = steps(settings, num_epochs)
    if count >= len(epochs):
        return epochs
    if count == 1:
        return epochs[-1:]
    return [epochs[round(i * (len(epochs) - 1) / (count - 1))] for i in range(count)]


def steps(settings: PruningSettings, num_epochs: int, every: int = 1) -> list[int]:
    """The epochs after which a method that cuts by a schedule does so: every so many, the last one that may included.

    Raises:
        ValueError: There is none.
    """
    epochs = [epoch for epoch in range(num_epochs) if settings.may_cut_after(epoch, num_epochs)]
    if not epochs:
        raise ValueError(
            f"With num_epochs={num_epochs}, cut_from={settings.cut_from} and cut_until={settings.cut_until} there is "
            f"no epoch after which to cut; train longer or widen the cutting phase."
        )
    return epochs[(len(epochs) - 1) % every :: every]
