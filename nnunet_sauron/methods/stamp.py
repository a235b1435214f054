"""STAMP: prune while training, by the activations of the last epoch, with dropout aimed at what will go next.

Dinsdale, Jenkinson, Namburete: STAMP: Simultaneous training and model pruning for low data regimes in medical image
segmentation. Medical Image Analysis 81 (2022) 102583. The variant with random channels: Hassler et al., Lean Unet,
arXiv 2512.03834.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from ..pruning.channels import ChannelLayout, feature_map_modules
from .base import Progress
from .stepwise import Stepwise, StepwiseSettings, over_layer_norm

RANKINGS = ("l2", "l1", "taylor")
FIRST_DROPOUT = 0.005


@dataclass(frozen=True, kw_only=True)
class STAMPSettings(StepwiseSettings):
    """STAMP's settings.

    Attributes:
        ranking: A channel's rank, summed over an epoch's batches: "l2" or "l1", the norm of its map (mean over the
            batch), or "taylor", |sum of mean(activation * gradient)|.
        b_drop: Largest probability of the targeted dropout; 0: none.
    """

    ranking: str = "l2"
    b_drop: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranking not in RANKINGS:
            raise ValueError(f"ranking must be one of {', '.join(RANKINGS)}; got {self.ranking}.")
        if not 0 <= self.b_drop < 1:
            raise ValueError(f"b_drop must be a probability in [0, 1); got {self.b_drop}.")


class ActivationRanked(Stepwise):
    """Ranks channels by what was observed in the epoch; each layer's ranks are divided by their L2 norm."""

    ranking: str

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        self._device = next(network.parameters()).device
        for unit, _, module in feature_map_modules(network, layout):
            module.register_forward_hook(partial(self._observe, unit))

    def start_epoch(self, epoch: int, widths: dict[str, int]) -> None:
        self._sums = {name: torch.zeros(width, device=self._device) for name, width in widths.items()}
        # Multiplied onto the maps: a gate's gradient is the sum of activation times gradient over batch and space.
        self._gates = {}
        if self.ranking == "taylor":
            self._gates = {name: torch.ones_like(s, requires_grad=True) for name, s in self._sums.items()}

    def before_update(self) -> None:
        for name, gate in self._gates.items():
            if gate.grad is not None:
                # Under a gradient scaler a step may overflow, and is left out of the training as well.
                self._sums[name] += torch.where(gate.grad.isfinite().all(), gate.grad, 0)
                gate.grad = None

    def rank(self, widths: Mapping[str, int], epoch: int) -> dict[str, Sequence[float]]:
        return over_layer_norm({name: sums.abs() for name, sums in self._sums.items()})

    def _observe(self, unit: str, module: nn.Module, inputs, feature_maps: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return feature_maps
        if self.ranking == "taylor":
            shape = [1, -1] + [1] * (feature_maps.ndim - 2)
            return feature_maps * self._gates[unit].to(feature_maps.dtype).view(shape)
        with torch.no_grad():
            order = 1 if self.ranking == "l1" else 2
            norms = torch.linalg.vector_norm(feature_maps.flatten(2).float(), order, dim=-1)
            self._sums[unit] += norms.mean(0)
        return feature_maps


class STAMP(ActivationRanked):
    """The k globally lowest channels go in each step, and layers of low ranks get more dropout."""

    Settings = STAMPSettings
    cuts_transposed = False

    @property
    def ranking(self) -> str:
        return self.settings.ranking

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        super().attach(network, layout)
        self._dropout = {name: min(FIRST_DROPOUT, self.settings.b_drop) for name in layout.widths}

    def redundant(self, progress: Progress) -> dict[str, list[int]]:
        going = super().redundant(progress)
        if progress.epoch in self._steps:
            self._dropout = targeted_dropout(self._ranks, going, self.settings.b_drop)
        return going

    def rank(self, widths: Mapping[str, int], epoch: int) -> dict[str, Sequence[float]]:
        self._ranks = super().rank(widths, epoch)
        return self._ranks

    def state(self) -> dict:
        return {"dropout": dict(self._dropout)}

    def load_state(self, state: dict) -> None:
        self._dropout = dict(state["dropout"])

    def _observe(self, unit: str, module: nn.Module, inputs, feature_maps: torch.Tensor) -> torch.Tensor:
        feature_maps = super()._observe(unit, module, inputs, feature_maps)
        # Whole channels, and no module of its own: the state dict's keys stay those of the plain network.
        if module.training and self._dropout[unit] > 0:
            drop = functional.dropout3d if feature_maps.ndim == 5 else functional.dropout2d
            feature_maps = drop(feature_maps, self._dropout[unit], training=True)
        return feature_maps


class STAMPRandomChannel(STAMP):
    """STAMP picks the layers, chance picks the channels in them (Hassler et al.)."""

    def order(self, unit: str, ranks: Sequence[float], epoch: int) -> list[int]:
        return random.Random(f"{self.settings.seed}:{epoch}:{unit}").sample(range(len(ranks)), len(ranks))


def targeted_dropout(
    ranks: Mapping[str, Sequence[float]], going: Mapping[str, Sequence[int]], b_drop: float
) -> dict[str, float]:
    """A dropout probability per unit, from the ranks of the channels that stay.

    With all N channels sorted, lowest first, the one at position q scores N - 1 - q; a unit's score S is its channels'
    mean, and p = b_drop * S / max S.
    """
    gone = {name: set(channels) for name, channels in going.items()}
    staying = [
        (rank, name)
        for name, values in ranks.items()
        for channel, rank in enumerate(values)
        if channel not in gone.get(name, ())
    ]
    staying.sort(key=lambda pair: pair[0])
    scores: dict[str, list[int]] = {name: [] for name in ranks}
    for position, (_, name) in enumerate(staying):
        scores[name].append(len(staying) - 1 - position)
    means = {name: sum(s) / len(s) for name, s in scores.items()}
    highest = max(means.values()) or 1
    return {name: b_drop * mean / highest for name, mean in means.items()}
