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

from ..pruning.channels import ChannelLayout, feature_map_modules
from .base import TrainingState
from .gates import register_gates, scaled
from .observed import Observed
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
        self.start_epoch(0, layout.widths)
        if self.ranking == "taylor":
            register_gates(network, layout, lambda unit: self._gates[unit])
            return
        for unit, _, module in feature_map_modules(network, layout):
            module.register_forward_hook(partial(self._measure, unit), prepend=True)  # before any dropout

    def start_epoch(self, epoch: int, widths: dict[str, int]) -> None:
        self._observed = Observed(widths, self._device)
        self._gates = {}
        if self.ranking == "taylor":
            self._gates = {n: torch.ones(w, device=self._device, requires_grad=True) for n, w in widths.items()}

    def before_step(self, steps_left: int) -> None:
        self._observed.drop_batch()

    def after_step(self, loss_scale: float) -> None:
        for name, gate in self._gates.items():
            if gate.grad is not None:
                self._observed.add(name, gate.grad)
                gate.grad = None
        self._observed.end_batch(loss_scale if self._gates else 1.0)

    def end_epoch(self) -> None:
        self._observed.share()

    def reason_to_hold(self) -> str | None:
        return None if self._observed.batches else "activations or gradients were not finite in any batch of the epoch"

    def rank(self, widths: Mapping[str, int], epoch: int) -> dict[str, Sequence[float]]:
        return over_layer_norm({name: sums.abs() for name, sums in self._observed.sums.items()})

    @torch.no_grad()
    def _measure(self, unit: str, module: nn.Module, inputs, feature_maps: torch.Tensor) -> None:
        if module.training:
            order = 1 if self.ranking == "l1" else 2
            norms = torch.linalg.vector_norm(feature_maps.flatten(2), order, dim=-1, dtype=torch.float32)
            self._observed.add(unit, norms.mean(0))


class STAMP(ActivationRanked):
    """The k globally lowest channels go in each step, and layers of low ranks get more dropout.

    The dropout of whole channels follows each block of convolution, norm and nonlinearity. Transposed convolutions have
    none, and do not count where layers are compared for it.
    """

    Settings = STAMPSettings
    cuts_transposed = False

    @property
    def ranking(self) -> str:
        return self.settings.ranking

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        blocks = [unit.name for unit in layout.units if not unit.transposed]
        self._dropout = dict.fromkeys(blocks, min(FIRST_DROPOUT, self.settings.b_drop))
        # No modules of their own: the state dict's keys stay those of the plain network.
        for unit, _, module in feature_map_modules(network, layout):
            if unit in self._dropout:
                module.register_forward_hook(partial(self._drop, unit))
        super().attach(network, layout)  # now: gates come after the dropout

    def redundant(self, progress: TrainingState) -> dict[str, list[int]]:
        going = super().redundant(progress)
        if progress.epoch in self._steps:
            ranks = {name: self._ranks[name] for name in self._dropout}
            self._dropout = targeted_dropout(ranks, going, self.settings.b_drop)
        return going

    def rank(self, widths: Mapping[str, int], epoch: int) -> dict[str, Sequence[float]]:
        self._ranks = super().rank(widths, epoch)
        return self._ranks

    def state(self) -> dict:
        return {"dropout": dict(self._dropout)}

    def load_state(self, state: dict) -> None:
        self._dropout = dict(state["dropout"])

    def _drop(self, unit: str, module: nn.Module, inputs, feature_maps: torch.Tensor) -> torch.Tensor:
        stays = 1 - self._dropout[unit]
        if not module.training or stays == 1:
            return feature_maps
        drawn = torch.empty(feature_maps.shape[:2], device=feature_maps.device).bernoulli_(stays)
        return scaled(module, feature_maps, drawn / stays)


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
