"""The interface that a trainer calls, which every pruning method shares.

A method may add a term to the loss, measures channels after an epoch, and decides which of them are kept. It knows
nothing of nnU-Net: `trainers.PruningTrainer` calls it, and removes the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..pruning.channels import ChannelLayout
from ..pruning.cost import CostModel
from .limits import PruningSettings, channels_to_keep


@dataclass(frozen=True)
class TrainingState:
    """The training so far, newest epoch last, and what a method measures with.

    Attributes:
        train_losses: Training loss per epoch, including a method's own term.
        val_losses: Validation loss per epoch.
        widths: Channels per epoch, by unit name.
        batches: Draws this number of training batches (B, channels, *patch), one after another, and yields those that
            are finite.
        losses: Draws this number of training batches, one after another, and yields the loss of each, computed in the
            training's precision. All are multiplied by one constant, which keeps gradients in float16 above 0.
        batch_size: B.
        regions: Whether classes may overlap, and outputs go through a sigmoid.
        is_last_cut: Whether channels can be removed after this epoch for the last time.
        learning_rate_left: Learning rate over the one at the start.
    """

    train_losses: Sequence[float]
    val_losses: Sequence[float]
    widths: dict[str, Sequence[int]]
    batches: Callable[[int], Iterable[torch.Tensor]] | None = None
    losses: Callable[[int], Iterator[torch.Tensor]] | None = None
    batch_size: int = 1
    regions: bool = False
    is_last_cut: bool = False
    learning_rate_left: float = 1.0

    @property
    def epoch(self) -> int:
        """The epoch that just ended, counted from 0."""
        return len(self.train_losses) - 1

    @property
    def widths_now(self) -> dict[str, int]:
        """Channels of each unit after that epoch."""
        return {name: series[-1] for name, series in self.widths.items()}


class PruningMethod:
    """The base of all methods. Its methods are called in this order: prepare, attach, then in each epoch start_epoch;
    in every training step before_step, regulariser after the forward, before_update after the backward, and after_step;
    measure after the validation; and before_removal when the other channels are about to be removed.

    Channels are measured after an epoch. Hooks in the training's forward are for what changes the loss.

    Args:
        settings: An instance of the class's `Settings`.
        num_epochs: Length of the training.

    Attributes:
        latest_only: Keys of `state` that only the newest epoch's record keeps: large, and needed to resume alone.
        unmeasured: Why the last `measure` could tell nothing about the channels, or None.
        doubt: What makes the last `measure` less certain than it should be, or None.
    """

    Settings: type[PruningSettings] = PruningSettings
    latest_only: tuple[str, ...] = ()

    def __init__(self, settings: PruningSettings, num_epochs: int):
        self.settings = settings
        self.num_epochs = num_epochs
        self.unmeasured: str | None = None
        self.doubt: str | None = None

    @classmethod
    def for_settings(cls, settings: PruningSettings, num_epochs: int) -> PruningMethod:
        """The method that these settings ask for: of this class, or one of its kind that it chooses by them."""
        return cls(settings, num_epochs)

    def prepare(self, layout: ChannelLayout, cost: CostModel, given_widths: dict[str, int] | None) -> None:
        """Fit the settings to the dense network, before anything is trained.

        Args:
            layout: The dense network's.
            cost: Parameters and multiply-accumulates at any widths.
            given_widths: Widths of the model that the setting `widths_from` names, if it names one.

        Raises:
            ValueError: They cannot be met.
        """

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        """Take the unwrapped network, and register hooks. Its modules stay the same objects through every cut.

        A hook does nothing in evaluation mode: merging runs the network, and a copy with the same hooks, in it.
        """

    def start_epoch(self, epoch: int, widths: dict[str, int]) -> None:
        """An epoch begins, with these channels per unit."""

    def before_step(self) -> None:
        """A training step begins."""

    def regulariser(self) -> torch.Tensor | None:
        """A scalar to add to the loss of the forward that just ran in training mode, or None."""

    def before_update(self) -> None:
        """The optimiser is about to step: the gradients are unscaled, clipped, and averaged over DDP's ranks. Not
        called where a gradient scaler skips the step."""

    def after_step(self, loss_scale: float) -> None:
        """A training step is over, also one whose update was skipped. Gradients of parameters that are not in the
        optimiser are this rank's own, and `loss_scale` times too large."""

    def target(self) -> tuple[str, float, Callable[[Mapping[str, int]], float]] | None:
        """What the training should end with: the setting's name, the fraction that should be left, and a function from
        widths to the fraction that is left. None for a method without a target."""
        return None

    def why_missed(self) -> str | None:
        """Why more is left after the last cut than `target` asks for, where the method knows."""
        return None

    def has_schedule(self) -> bool:
        """Whether the last cut of all is made whatever the loss, and makes up for cuts that were held back."""
        return self.target() is not None

    def measure(self, training: TrainingState) -> dict[str, list[int]]:
        """Score the channels after an epoch, on a few batches, and decide which are kept.

        Called on every DDP rank with batches of its own, so that scores can be summed over the ranks; what rank 0
        returns is done. Sets `unmeasured`. The last cut of all meets a target whatever `max_fraction_per_epoch` says,
        which delays cuts and cancels none.

        Returns:
            The channels that are kept, ascending, of each unit that loses any.
        """
        settings, widths = self.settings_of_cut(training), training.widths_now
        kept = {
            name: channels_to_keep(channels, widths[name], settings, training.learning_rate_left)
            for name, channels in self.redundant(training).items()
        }
        return {name: channels for name, channels in kept.items() if len(channels) < widths[name]}

    def settings_of_cut(self, training: TrainingState) -> PruningSettings:
        """The settings that limit the cut after this epoch: the last cut of all meets a target without the limit."""
        unlimited = training.is_last_cut and self.target() is not None
        return replace(self.settings, max_fraction_per_epoch=None) if unlimited else self.settings

    def redundant(self, training: TrainingState) -> dict[str, list[int]]:
        """The channels that should be removed, by unit, the most redundant first; `measure` applies the settings."""
        raise NotImplementedError

    def before_removal(self, keep: dict[str, list[int]]) -> None:
        """All but these channels of these units are about to be removed; on every DDP rank."""

    def state(self) -> dict:
        """What a resumed training needs, as plain Python or tensors; stored in the history after each epoch."""
        return {}

    def load_state(self, state: dict) -> None:
        """Continue from what `state` returned. Comes after `attach`."""


def mean_of(terms: list[torch.Tensor]) -> torch.Tensor | None:
    """The mean of the layers' terms of one forward, or None without terms; empties the list."""
    if not terms:
        return None
    mean = torch.stack(terms).mean()
    terms.clear()
    return mean
