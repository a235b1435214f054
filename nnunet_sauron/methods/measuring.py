"""What methods measure after an epoch: a number per channel, summed over a few training batches of all DDP ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn

from ..pruning.channels import channel_layout, feature_map_modules
from ..pruning.eval_mode import eval_mode
from .distributed import summed_over_ranks
from .gates import register_gates

NOTHING_MEASURED = "nothing could be measured, since no batch of training data gave finite values"


class ChannelSums:
    """Sums over batches of a number per channel of every layer, in float32.

    A batch in which one number is not finite counts in no layer, since layers are compared with each other.

    Args:
        widths: Channels of each layer, by name.
        device: The network's.
    """

    def __init__(self, widths: Mapping[str, int], device: torch.device):
        self._widths = dict(widths)
        self._batch: dict[str, torch.Tensor] = {}
        # One vector, the number of batches last: nothing here waits for the device.
        self._sums = torch.zeros(sum(widths.values()) + 1, device=device)

    @property
    def batches(self) -> int:
        """Number of batches that counted; on all DDP ranks after `share`."""
        return round(self._sums[-1].item())

    def by_layer(self) -> dict[str, torch.Tensor]:
        """The sums by layer, (C,) each; empty where no batch counted."""
        if not self.batches:
            return {}
        return dict(zip(self._widths, self._sums[:-1].split(list(self._widths.values())), strict=True))

    def add(self, unit: str, numbers: torch.Tensor) -> None:
        """Add a layer's numbers (C,) in this batch; several for one layer are summed."""
        numbers = numbers.detach().float()
        self._batch[unit] = self._batch[unit] + numbers if unit in self._batch else numbers

    def end_batch(self) -> None:
        """Count the batch, unless one of its numbers is not finite."""
        batch = torch.cat([*(self._batch[name] for name in self._widths), self._sums.new_ones(1)])
        self._sums += torch.where(batch.isfinite().all(), batch, 0)
        self._batch.clear()

    def share(self) -> None:
        """Sum over all DDP ranks."""
        summed_over_ranks(self._sums)


def map_norms(network: nn.Module, inputs: Iterable[torch.Tensor], order: int) -> dict[str, torch.Tensor]:
    """The norm of each feature map, mean over a batch, summed over the batches of all DDP ranks.

    Args:
        network: A network that `channel_layout` knows, unwrapped; run in evaluation mode, without gradients.
        inputs: Batches (B, channels, *patch).
        order: 1 or 2, the norm's.

    Returns:
        (C,) for each unit, float32; empty where no batch gave finite values.
    """
    layout = channel_layout(network)
    device = next(network.parameters()).device
    sums = ChannelSums(layout.widths, device)

    def add(unit: str, module: nn.Module, _, maps: torch.Tensor) -> None:
        norms = torch.linalg.vector_norm(maps.flatten(2), order, dim=-1, dtype=torch.float32)
        sums.add(unit, norms.mean(0))

    hooks = {module: partial(add, unit) for unit, _, module in feature_map_modules(network, layout)}
    with torch.no_grad(), eval_mode(network, hooks):
        for tensor in inputs:
            network(tensor.to(device))
            sums.end_batch()
    sums.share()
    return sums.by_layer()


def map_gradients(network: nn.Module, losses: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each feature map times its gradient, summed over a batch and space, and over the batches of all DDP ranks.

    No gradient of a weight is computed, and none is kept.

    Args:
        network: A network that `channel_layout` knows, unwrapped; in evaluation mode while losses are drawn.
        losses: Each is drawn when the one before it is done with, and comes of one forward of this network.

    Returns:
        (C,) for each unit, float32; empty where no batch gave finite values.
    """
    layout = channel_layout(network)
    device = next(network.parameters()).device
    sums = ChannelSums(layout.widths, device)
    gates = {name: torch.ones(width, device=device, requires_grad=True) for name, width in layout.widths.items()}
    handles = register_gates(network, layout, gates.__getitem__)
    try:
        with eval_mode(network):
            for loss in losses:
                gradients = torch.autograd.grad(loss, list(gates.values()), materialize_grads=True)
                for name, gradient in zip(gates, gradients, strict=True):
                    sums.add(name, gradient)
                sums.end_batch()
                del loss  # and with it what is left of the graph, before the next forward
    finally:
        for handle in handles:
            handle.remove()
    sums.share()
    return sums.by_layer()
