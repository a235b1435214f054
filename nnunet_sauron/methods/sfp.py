"""SFP: after every epoch the filters of the smallest norm are set to zero, and may grow back.

He et al.: Soft filter pruning for accelerating deep convolutional neural networks. IJCAI 2018, arXiv 1808.06866.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .distributed import decided_on_one_rank
from .filters import filters, tensors_of
from .layerwise import Layerwise


class SoftPruning(Layerwise):
    """Sets to zero, after every epoch, the filters that would be removed then, until they are removed.

    A subclass scores the filters, of which the lowest are zeroed. A zeroed channel's maps are zero: its kernel, its
    convolution's bias and its norm's bias are set to zero. The norm's weight is left, or no gradient would ever reach
    the kernel again.
    """

    def start_epoch(self, epoch: int, widths: dict[str, int]) -> None:
        # Here, and not at the end of the last epoch, whose checkpoint holds the network that was validated.
        if 0 < epoch <= self.cut_epoch and self.settings.may_cut_after(epoch - 1, self.num_epochs):
            zeroed = decided_on_one_rank(lambda: {name: self.surplus(name, width) for name, width in widths.items()})
            for name, channels in zeroed.items():
                zero_channels(self._network, self._layout, name, torch.tensor(channels, dtype=torch.long))

    def order(self, unit: str) -> Sequence[int]:
        return self.score(filters(self._network, self._layout, unit)).argsort().tolist()

    def score(self, kernels: torch.Tensor) -> torch.Tensor:
        """(C, n) -> (C,): the lowest are zeroed."""
        raise NotImplementedError


class SFP(SoftPruning):
    """By the L2 norm."""

    def score(self, kernels: torch.Tensor) -> torch.Tensor:
        return kernels.norm(dim=1)


@torch.no_grad()
def zero_channels(network: torch.nn.Module, layout, unit: str, channels: torch.Tensor) -> None:
    """Set to zero, in place, the parameters that make these channels' maps differ from zero."""
    for name, tensor, dim in tensors_of(network, layout, unit):
        is_norm_weight = name == "weight" and tensor.ndim == 1
        if not is_norm_weight:
            tensor.index_fill_(dim, channels.to(tensor.device), 0)
