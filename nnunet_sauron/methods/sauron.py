"""Sauron: draw a layer's feature maps into clusters while training, and remove what became redundant.

Valverde, Shatillo, Tohka: Sauron U-Net: Simple automated redundancy elimination in medical image segmentation via
filter pruning. arXiv 2209.13590; Neurocomputing 594 (2024) 127817.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..pruning.channels import ChannelLayout, feature_map_modules
from .base import Progress, PruningMethod, PruningSettings, mean_of
from .delta import NORMALISATIONS
from .delta import relative_distances as _relative_distances
from .delta import with_delta_opt as _with_delta_opt

FIRST_THRESHOLD = 0.001


class Threshold:
    """One layer's threshold, which adjusts itself after every epoch (paper, algorithm 1).

    It starts at 0.001 and climbs `kappa` linear steps to `tau_max`. After an epoch, a waiting threshold waits one
    epoch less; another one goes up a step and waits `rho` epochs when
    (C1) the last training loss lies inside the range of the `rho` before it,
    (C2) the last validation loss is no new minimum, and
    (C3) fewer than `mu` of the layer's channels went last time.

    Attributes:
        value: The threshold now.
        waiting: Epochs that it still waits.

    Args:
        tau_max: Upper end, in (0.001, 1].
        kappa: Number of steps.
        rho: Epochs to look back and to wait.
        mu: A fraction of the channels: 0.02 for the paper's 2 %.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(self, tau_max: float = 0.3, kappa: int = 15, rho: int = 5, mu: float = 0.02):
        _require(FIRST_THRESHOLD < tau_max <= 1, "tau_max", f"in ({FIRST_THRESHOLD}, 1]", tau_max)
        _require(kappa >= 1, "kappa", "at least 1", kappa)
        _require(rho >= 1, "rho", "at least 1 epoch", rho)
        _require(0 < mu <= 1, "mu", "a fraction in (0, 1], such as 0.02 for 2 %", mu)
        self.tau_max, self.kappa, self.rho, self.mu = tau_max, kappa, rho, mu
        self.steps = 0
        self.waiting = 0

    @property
    def value(self) -> float:
        return FIRST_THRESHOLD + (self.tau_max - FIRST_THRESHOLD) * self.steps / self.kappa

    def update(self, train_losses: Sequence[float], val_losses: Sequence[float], widths: Sequence[int]) -> float:
        """Adjust the threshold after an epoch.

        Args:
            train_losses: Training loss of every epoch so far, newest last.
            val_losses: Validation loss, likewise.
            widths: Channels of the layer after every epoch so far, newest last.

        Returns:
            The threshold after that epoch, which is `value`.
        """
        if self.waiting > 0:
            self.waiting -= 1
        elif (
            self.steps < self.kappa
            and self._training_has_settled(train_losses)
            and self._validation_has_settled(val_losses)
            and self._few_channels_went(widths)
        ):
            self.steps += 1
            self.waiting = self.rho
        return self.value

    def _training_has_settled(self, losses: Sequence[float]) -> bool:
        if len(losses) <= self.rho:
            return False
        before = losses[-1 - self.rho : -1]
        return min(before) <= losses[-1] <= max(before)

    def _validation_has_settled(self, losses: Sequence[float]) -> bool:
        # The published code compares with a minimum that includes the value itself, so its C2 never stops anything.
        return len(losses) > 1 and losses[-1] >= min(losses[:-1])

    def _few_channels_went(self, widths: Sequence[int]) -> bool:
        return len(widths) < 2 or (widths[-2] - widths[-1]) < self.mu * widths[-2]


@dataclass(frozen=True, kw_only=True)
class SauronSettings(PruningSettings):
    """Sauron's settings; the paper's values unless it gives none.

    Attributes:
        lambda_: Weight of delta_opt in the loss; 0 for the ablation that only prunes.
        normalisation: Of the maps in delta_opt: "minmax", "none" or "max_distance".
        tau_max: Upper end of the thresholds.
        kappa: Steps from 0.001 to `tau_max`.
        rho: Epochs that a threshold looks back and waits; None: 5 for each 1000 epochs of training, at least 2.
        mu: A threshold stays while the layer's last loss of channels was at least this fraction.
        prune_batches: delta_prune is averaged over this many of the epoch's last training batches. The published code
            takes 1, where another draw of batches removes other channels (benchmarks/delta_prune_reproducibility.py).
    """

    lambda_: float = 0.5
    normalisation: str = "minmax"
    tau_max: float = 0.3
    kappa: int = 15
    rho: int | None = None
    mu: float = 0.02
    prune_batches: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.lambda_ >= 0, "lambda_", "0 or more", self.lambda_)
        _require(self.normalisation in NORMALISATIONS, "normalisation", "one of " + ", ".join(NORMALISATIONS),
                 self.normalisation)  # fmt: skip
        _require(self.prune_batches >= 1, "prune_batches", "at least 1", self.prune_batches)
        self.threshold(num_epochs=1)

    def threshold(self, num_epochs: int) -> Threshold:
        """A layer's threshold at the start of a training of so many epochs."""
        # With rho = 1, C1 asks for two equal losses and no threshold would ever move: 2 is the shortest that works.
        rho = max(2, round(5 * num_epochs / 1000)) if self.rho is None else self.rho
        return Threshold(self.tau_max, self.kappa, rho, self.mu)


class Sauron(PruningMethod):
    """delta_opt while training, delta_prune against an adjusting threshold after each epoch."""

    Settings = SauronSettings

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        self._thresholds = {unit.name: self.settings.threshold(self.num_epochs) for unit in layout.units}
        self._places = {unit.name: len(unit.feature_maps) for unit in layout.units}
        self._device = next(network.parameters()).device
        self._terms: list[torch.Tensor] = []
        self._measuring = False
        for unit, _, module in feature_map_modules(network, layout):
            module.register_forward_hook(partial(self._observe, unit))

    def start_epoch(self, epoch: int, widths: dict[str, int]) -> None:
        # Seeded by name and epoch: the same after a resume, and on every DDP rank.
        references = {name: random.Random(f"{epoch}:{name}").randrange(width) for name, width in widths.items()}
        # Tensors, and nothing counted in the hook: a compiled graph would be made anew for every other number.
        self._references = {name: torch.tensor([r], device=self._device) for name, r in references.items()}
        self._sums = {name: torch.zeros(width, device=self._device) for name, width in widths.items()}
        self._measured = 0

    def before_step(self, steps_left: int) -> None:
        self._terms.clear()
        self._measuring = steps_left <= self.settings.prune_batches
        self._measured += self._measuring

    def regulariser(self) -> torch.Tensor | None:
        """lambda * mean of delta_opt over the layers of the last forward."""
        mean = mean_of(self._terms)
        return None if mean is None else self.settings.lambda_ * mean

    def redundant(self, progress: Progress) -> dict[str, list[int]]:
        removable = {}
        for name, widths in progress.widths.items():
            tau = self._thresholds[name].update(progress.train_losses, progress.val_losses, widths)
            if len(self._sums[name]) > 1 and self._measured:
                scores = (self._sums[name] / (self._measured * self._places[name])).tolist()
                reference = self._references[name].item()
                below = [c for c, score in enumerate(scores) if score < tau and c != reference]
                removable[name] = sorted(below, key=lambda c: scores[c])
        return removable

    def state(self) -> dict:
        return {
            "tau": {name: threshold.value for name, threshold in self._thresholds.items()},
            "tau_steps": {name: threshold.steps for name, threshold in self._thresholds.items()},
            "waiting": {name: threshold.waiting for name, threshold in self._thresholds.items()},
        }

    def load_state(self, state: dict) -> None:
        for name, threshold in self._thresholds.items():
            threshold.steps, threshold.waiting = state["tau_steps"][name], state["waiting"][name]

    def _observe(self, unit: str, module: nn.Module, inputs, feature_maps: torch.Tensor) -> torch.Tensor:
        if not module.training or feature_maps.shape[1] < 2:
            return feature_maps
        if self._measuring:
            with torch.no_grad():
                self._sums[unit] += _relative_distances(feature_maps, self._references[unit])
        if self.settings.lambda_ > 0:
            feature_maps, term = _with_delta_opt(feature_maps, self.settings.normalisation)
            self._terms.append(term)
        return feature_maps


def _require(condition: bool, name: str, expected: str, value) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}; got {value}.")
