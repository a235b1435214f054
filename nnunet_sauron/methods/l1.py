"""L1: the filters of the smallest L1 norm go, step by step.

Li et al.: Pruning filters for efficient ConvNets. ICLR 2017, arXiv 1608.08710.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..pruning.channels import ChannelLayout
from .filters import filters
from .stepwise import Stepwise, over_layer_norm


class L1(Stepwise):
    """Ranks filters by their L1 norm. Layers are compared by norms over the layer's L2 norm of them, as in STAMP."""

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        self._network, self._layout = network, layout

    def rank(self, widths: Mapping[str, int], epoch: int) -> dict[str, Sequence[float]]:
        return over_layer_norm({name: filters(self._network, self._layout, name).abs().sum(1) for name in widths})
