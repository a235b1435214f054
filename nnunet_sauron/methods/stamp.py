"""STAMP: prune while training, by the size of the activations, with dropout aimed at the layers that will lose most.

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
from .gates import scaled
from .limits import require
from .measuring import map_gradients, map_norms
from .stepwise import Stepwise, StepwiseSettings, over_layer_norm, random_scores

RANKINGS = ("l2", "l1", "taylor", "random")
FIRST_DROPOUT = 0.005


@dataclass(frozen=True, kw_only=True)
class ActivationSettings(StepwiseSettings):
    """Settings of a pruning in steps by activations.

    Attributes:
        prune_batches: Training batches that channels are ranked on before a step, on each DDP rank. (STAMP's published
            code takes all batches of an epoch.)
    """

    prune_batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prune_batches >= 1, "prune_batches", "at least 1", self.prune_batches)


@dataclass(frozen=True, kw_only=True)
class STAMPSettings(ActivationSettings):
    """STAMP's settings.

    Attributes:
        ranking: A channel's rank, summed over batches: "l2" or "l1", the norm of its map (mean over the batch), or
            "taylor", |sum of mean(activation * gradient)|; or "random", a number from 0 to 1.
        b_drop: Largest probability of the targeted dropout; 0: none.
    """

    ranking: str = "l2"
    b_drop: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ranking in RANKINGS, "ranking", f"one of {', '.join(RANKINGS)}", self.ranking)
        require(0 <= self.b_drop < 1, "b_drop", "a probability in [0, 1)", self.b_drop)


class ActivationRanked(Stepwise):
    """Ranks channels by their activations after the epoch; each layer's ranks are divided by their L2 norm.

    The weights do not change while batches are ranked, and there is no dropout, as in STAMP's published code.
    """

    ranking: str

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        self._network = network

    def score(self, training: TrainingState) -> dict[str, Sequence[float]]:
        count = self.settings.prune_batches
        if self.ranking == "taylor":
            sums = map_gradients(self._network, training.losses(count))
        else:
            sums = map_norms(self._network, training.batches(count), 1 if self.ranking == "l1" else 2)
        return over_layer_norm({name: numbers.abs() for name, numbers in sums.items()})


class STAMP(ActivationRanked):
    """Removes the k globally lowest channels in each step; layers of low ranks get more dropout.

    The dropout of whole channels follows each block of convolution, norm and nonlinearity. Transposed convolutions have
    none, and do not count where layers are compared for it.
    """

    Settings = STAMPSettings
    cuts_transposed = False

    @property
    def ranking(self) -> str:
        return self.settings.ranking

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        super().attach(network, layout)
        blocks = [unit.name for unit in layout.units if not unit.transposed]
        self._dropout = dict.fromkeys(blocks, min(FIRST_DROPOUT, self.settings.b_drop))
        # No modules of their own: the state dict's keys stay those of the plain network.
        for unit, _, module in feature_map_modules(network, layout):
            if unit in self._dropout:
                module.register_forward_hook(partial(self._drop, unit))

    def measure(self, training: TrainingState) -> dict[str, list[int]]:
        self._ranks: dict[str, Sequence[float]] = {}
        keep = super().measure(training)
        if self._ranks:
            ranks = {name: self._ranks[name] for name in self._dropout}
            of_kept = {name: [of[c] for c in keep.get(name, range(len(of)))] for name, of in ranks.items()}
            self._dropout = targeted_dropout(of_kept, self.settings.b_drop)
        return keep

    def score(self, training: TrainingState) -> dict[str, Sequence[float]]:
        if self.ranking == "random":  # not over the layer's norm
            self._ranks = random_scores(training, self.settings.seed)
        else:
            self._ranks = super().score(training)
        return self._ranks

    def state(self) -> dict:
        return {"dropout": dict(self._dropout)}

    def load_state(self, state: dict) -> None:
        self._dropout = dict(state["dropout"])

    def _drop(self, unit: str, module: nn.Module, inputs, feature_maps: torch.Tensor) -> torch.Tensor:
        probability = 1 - self._dropout[unit]  # that a channel is kept
        if not module.training or probability == 1:
            return feature_maps
        kept = torch.empty(feature_maps.shape[:2], device=feature_maps.device).bernoulli_(probability)
        return scaled(module, feature_maps, kept / probability)


class STAMPRandomChannel(STAMP):
    """STAMP picks the layers; the channels in them are random (Hassler et al.)."""

    def order(self, unit: str, scores: Sequence[float], epoch: int) -> list[int]:
        return random.Random(f"{self.settings.seed}:{epoch}:{unit}").sample(range(len(scores)), len(scores))


def targeted_dropout(ranks: Mapping[str, Sequence[float]], b_drop: float) -> dict[str, float]:
    """A dropout probability per unit, from the ranks of its channels.

    With all N channels sorted, lowest first, the one at position q scores N - 1 - q; a unit's score S is its channels'
    mean, and p = b_drop * S / max S.
    """
    ascending = sorted(((rank, name) for name, of_unit in ranks.items() for rank in of_unit), key=lambda pair: pair[0])
    scores: dict[str, list[int]] = {name: [] for name in ranks}
    for position, (_, name) in enumerate(ascending):
        scores[name].append(len(ascending) - 1 - position)
    means = {name: sum(s) / len(s) for name, s in scores.items()}
    highest = max(means.values()) or 1
    return {name: b_drop * mean / highest for name, mean in means.items()}
