"""L1: removes the filters of the smallest L1 norm, step by step.

Li et al.: Pruning filters for efficient ConvNets. ICLR 2017, arXiv 1608.08710.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..pruning.channels import ChannelLayout
from .base import TrainingState
from .filters import filters
from .stepwise import Stepwise, over_layer_norm


class L1(Stepwise):
    """Scores filters by their L1 norm, divided by the L2 norm of the layer's scores as in STAMP."""

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        self._network, self._layout = network, layout

    def score(self, training: TrainingState) -> dict[str, Sequence[float]]:
        norms = {name: filters(self._network, self._layout, name).abs().sum(1) for name in training.widths}
        return over_layer_norm(norms)
