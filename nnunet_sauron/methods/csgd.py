"""cSGD: the filters of a cluster are drawn together until they are equal, and then merged without loss.

Ding et al.: Centripetal SGD for pruning very deep convolutional networks with complicated structure. CVPR 2019,
arXiv 1904.03837.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import nn

from ..pruning.channels import ChannelLayout, channel_layout
from .distributed import decided_on_one_rank
from .filters import filters, tensors_of
from .layerwise import Layerwise
from .limits import require
from .targets import TargetSettings


@dataclass(frozen=True, kw_only=True)
class CSGDSettings(TargetSettings):
    """cSGD's settings.

    Attributes:
        eps: Strength of the pull to the cluster's mean. 0.01 is for U-Nets; 0.05 diverged there (Valverde et al.).
        seed: Of k-means.
    """

    eps: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge:
            raise ValueError("merge must be False: cSGD merges its clusters itself.")
        require(self.eps > 0, "eps", "above 0", self.eps)
        require(0 <= self.seed < 2**32, "seed", "a whole number from 0 to 4294967295", self.seed)


class CSGD(Layerwise):
    """k-means at the start; the same update for all filters of a cluster and a pull to its mean; merged at the end.

    A filter here is every parameter that makes a channel: kernel, biases and the norm's weight.
    """

    Settings = CSGDSettings
    latest_only = ("clusters",)

    def attach(self, network: nn.Module, layout: ChannelLayout) -> None:
        super().attach(network, layout)
        self._clusters = decided_on_one_rank(
            lambda: {
                name: cluster(filters(network, layout, name), self.final_widths[name], self.settings.seed)
                for name, width in layout.widths.items()
                if width > self.final_widths[name]
            }
        )

    def start_epoch(self, epoch: int, widths: dict[str, int]) -> None:
        device = next(self._network.parameters()).device
        self._pulled = []
        for name, labels in self._clusters.items():
            means = _to_means(labels, device)
            self._pulled += [(tensor, dim, means) for _, tensor, dim in tensors_of(self._network, self._layout, name)]

    @torch.no_grad()
    def before_update(self) -> None:
        # The optimiser itself adds its weight decay. The rest of the paper's equation 5 is mean and pull,
        # mean(gradient) + eps (w - mean(w)) = mean(gradient - eps w) + eps w.
        eps = self.settings.eps
        for tensor, dim, means in self._pulled:
            if tensor.grad is not None:
                pushed = _along(dim, means, tensor.grad.sub(tensor, alpha=eps))
                tensor.grad.copy_(pushed.add_(tensor, alpha=eps))

    def order(self, unit: str) -> Sequence[int]:
        """All but the first channel of each cluster."""
        labels = self._clusters.get(unit, [])
        return [channel for channel, label in enumerate(labels) if label in labels[:channel]]

    def before_removal(self, keep: Mapping[str, Sequence[int]]) -> None:
        for name in keep.keys() & self._clusters.keys():
            merge_clusters(self._network, channel_layout(self._network), name, self._clusters.pop(name), keep[name])

    def state(self) -> dict:
        return {"clusters": dict(self._clusters)}

    def load_state(self, state: dict) -> None:
        self._clusters = dict(state["clusters"])


def cluster(kernels: torch.Tensor, count: int, seed: int = 0) -> list[int]:
    """The cluster, 0..`count` - 1, of each filter (C, n), by k-means."""
    return KMeans(count, n_init=1, random_state=seed).fit(kernels.cpu().numpy()).labels_.tolist()


@torch.no_grad()
def merge_clusters(
    network: nn.Module, layout: ChannelLayout, unit: str, labels: Sequence[int], keep: Sequence[int]
) -> None:
    """Let the first kept channel of each cluster replace the cluster's removed channels, in place.

    It gets the cluster's mean filter, and the layers that read it get the sum of their weights for the cluster. Nothing
    is removed yet.

    Args:
        network: The network.
        layout: Its channel layout now.
        unit: The unit's name.
        labels: The cluster of each of its channels.
        keep: Its channels that are kept.
    """
    kept = set(keep)
    first = {labels[channel]: channel for channel in sorted(kept, reverse=True)}  # kept channel, by cluster
    merged = [channel for channel, label in enumerate(labels) if channel not in kept and label in first]
    if not merged:
        return
    device = next(network.parameters()).device
    onto = torch.tensor([first[labels[channel]] for channel in merged], device=device)
    removed = torch.tensor(merged, device=device)
    means = _to_means(labels, device)
    for _, tensor, dim in tensors_of(network, layout, unit):
        tensor.index_copy_(dim, onto, _along(dim, means, tensor).index_select(dim, onto))
    for axis in layout.axes:
        start = 0
        for name, width in axis.segments:
            if axis.reads and name == unit:
                weight = getattr(network.get_submodule(axis.module), axis.tensor)
                weight.index_add_(axis.dim, start + onto, weight.index_select(axis.dim, start + removed))
            start += width


def _to_means(labels: Sequence[int], device: torch.device) -> torch.Tensor:
    """The matrix (C, C) that replaces each of C channels by the mean of its cluster.

    A product of matrices does not wait for the GPU, and sums in the same order every time, unlike CUDA's `index_add_`.
    """
    assigned = torch.tensor(labels, device=device)
    together = (assigned[:, None] == assigned).float()
    return together / together.sum(1, keepdim=True)


def _along(dim: int, matrix: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The matrix times the tensor along one of its axes."""
    channels = tensor.movedim(dim, 0)
    return (matrix @ channels.reshape(len(channels), -1)).view(channels.shape).movedim(0, dim)
