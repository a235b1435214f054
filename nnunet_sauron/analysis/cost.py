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
from torch.utils._pytree import tree_flatten

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
        self._users: dict[int, int] = {}  # live tensors by storage: PyTorch 2.1's storages are no objects that last

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:  # tree_leaves came later than PyTorch 2.1
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._users:  # else a view, or an operation in place
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= size
