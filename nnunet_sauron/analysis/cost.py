"""The cost of a network for one patch: parameters, multiply-accumulates, memory, and its size on disk."""

from __future__ import annotations

import io
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..pruning.cost import count_macs, count_parameters, forward_on_meta


@dataclass(frozen=True)
class NetworkCost:
    """What one network costs, for a batch of one patch in float32.

    Attributes, nan where they are not known:
        parameters: Each counted once.
        macs: Multiply-accumulates of convolutions and transposed convolutions: half of the operations that PyTorch's
            flop counter counts. Norms, activations and biases are not counted, as is usual.
        weights_bytes: A file with the weights alone, as `torch.save` writes it.
        peak_memory_bytes: Weights, input, and the tensors alive at the forward pass's most crowded moment. What a
            convolution's implementation allocates for itself comes on top, and differs from machine to machine.
    """

    parameters: float
    macs: float
    weights_bytes: int
    peak_memory_bytes: float

    @property
    def flops(self) -> float:
        """Floating point operations: a multiplication and an addition for each multiply-accumulate."""
        return 2 * self.macs


def network_cost(network: nn.Module, patch_size: Sequence[int], input_channels: int) -> NetworkCost:
    """Count a network's cost without running it on real numbers.

    Args:
        network: A network of nnU-Net, unwrapped.
        patch_size: Voxels per axis.
        input_channels: Channels of the network's input.
    """
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    live = _LiveTensors()
    forward_on_meta(network, patch_size, input_channels, during=live)
    patch = 4 * input_channels * math.prod(patch_size)
    weights = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in network.state_dict().values()}
    return NetworkCost(
        parameters=count_parameters(network),
        macs=count_macs(network, patch_size, input_channels),
        weights_bytes=file.tell(),
        peak_memory_bytes=sum(weights.values()) + patch + live.peak,
    )


class _LiveTensors(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still in use, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:  # a view, or an operation in place
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
