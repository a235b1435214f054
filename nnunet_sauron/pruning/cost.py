"""What a network costs: parameters and multiply-accumulates."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .channels import Segment, channel_layout, feature_map_modules
from .eval_mode import eval_mode


def count_parameters(network: nn.Module) -> int:
    """Number of trainable and fixed parameters, each counted once."""
    return sum(p.numel() for p in network.parameters())


def count_macs(network: nn.Module, patch_size: Sequence[int], input_channels: int) -> int:
    """Multiply-accumulates of convolutions and transposed convolutions for one patch, as in prediction.

    Counted by PyTorch's own counter on the meta device (half of its FLOPs), with deep supervision off and without
    running anything on the real weights. Norms, activations and biases are not counted, as is usual.

    Args:
        network: A network of nnU-Net, unwrapped.
        patch_size: Voxels per axis.
        input_channels: Channels of the network's input.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        forward_on_meta(network, patch_size, input_channels)
    return counter.get_total_flops() // 2


def feature_map_voxels(network: nn.Module, patch_size: Sequence[int], input_channels: int) -> dict[str, int]:
    """Voxels of each unit's feature maps for one patch, by the unit's name; of the smallest, where it has several.

    Args:
        network: A network that `channel_layout` knows, unwrapped; shapes only are run.
        patch_size: Voxels per axis.
        input_channels: Channels of the network's input.
    """
    found: dict[str, int] = {}

    def note(name: str, module: nn.Module, inputs, output: torch.Tensor) -> None:
        found[name] = min(found.get(name, sys.maxsize), math.prod(output.shape[2:]))

    maps = feature_map_modules(network, channel_layout(network))
    forward_on_meta(network, patch_size, input_channels, {module: partial(note, name) for name, _, module in maps})
    return found


class CostModel:
    """What a network would cost at other widths, counted once: for choosing widths, thousands of times a second.

    A convolution's multiply-accumulates are its input channels times its output channels, its kernel's voxels, and the
    positions of its output (of its input, if transposed). Equal to `count_parameters` and `count_macs`.

    Args:
        network: A network that `channel_layout` knows, unwrapped.
        patch_size: Voxels per axis.
        input_channels: Channels of the network's input.

    Attributes:
        input_shape: Of one patch, (1, channels, *patch).
    """

    def __init__(self, network: nn.Module, patch_size: Sequence[int], input_channels: int):
        self.input_shape = (1, input_channels, *patch_size)
        positions = _positions(network, patch_size, input_channels)
        axes: dict[tuple[str, str], list[tuple[int, tuple[Segment, ...]]]] = {}
        for axis in channel_layout(network).axes:
            axes.setdefault((axis.module, axis.tensor), []).append((axis.dim, axis.segments))
        # Per tensor: what does not change, its positions (0: no convolution that prediction runs), its channel axes.
        self._tensors: list[tuple[int, int, list[tuple[Segment, ...]]]] = []
        self._fixed_parameters = count_parameters(network)
        for (module_name, tensor_name), dims in axes.items():
            module = network.get_submodule(module_name)
            tensor = getattr(module, tensor_name)
            if not isinstance(tensor, nn.Parameter):
                continue
            self._fixed_parameters -= tensor.numel()
            constant = math.prod(size for dim, size in enumerate(tensor.shape) if dim not in dict(dims))
            visited = positions.get(module, 0) if tensor_name == "weight" else 0
            self._tensors.append((constant, visited, [segments for _, segments in dims]))

    def parameters(self, widths: Mapping[str, int]) -> int:
        """Number of parameters with these channels per unit."""
        return self._fixed_parameters + sum(n for n, _ in self._sizes(widths))

    def macs(self, widths: Mapping[str, int]) -> int:
        """Multiply-accumulates of one patch with these channels per unit."""
        return sum(n * positions for n, positions in self._sizes(widths))

    def _sizes(self, widths: Mapping[str, int]) -> Iterator[tuple[int, int]]:
        for constant, positions, axes in self._tensors:
            size = constant
            for segments in axes:
                size *= sum(width if name is None else widths[name] for name, width in segments)
            yield size, positions


def _positions(network: nn.Module, patch_size: Sequence[int], input_channels: int) -> dict[nn.Module, int]:
    """How often each convolution's kernel is applied for one patch."""
    positions = {}

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        visited = inputs[0] if isinstance(module, _ConvTransposeNd) else output
        positions[module] = math.prod(visited.shape[2:])

    convolutions = [module for module in network.modules() if isinstance(module, _ConvNd)]
    forward_on_meta(network, patch_size, input_channels, dict.fromkeys(convolutions, count))
    return positions


def forward_on_meta(
    network: nn.Module,
    patch_size: Sequence[int],
    input_channels: int,
    hooks: Mapping[nn.Module, Callable] | None = None,
    during: AbstractContextManager | None = None,
) -> None:
    """One patch through the network, shapes only, in evaluation mode and without deep supervision.

    Args:
        network: A network of nnU-Net, unwrapped; its weights are neither read nor moved.
        patch_size: Voxels per axis.
        input_channels: Channels of the network's input.
        hooks: Forward hooks by module.
        during: Entered around the forward alone.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    patch = torch.empty((1, input_channels, *patch_size), device="meta")
    decoder = getattr(network, "decoder", None)
    supervised = getattr(decoder, "deep_supervision", None)
    try:
        if supervised is not None:
            decoder.deep_supervision = False
        with torch.no_grad(), eval_mode(network, hooks), _ShapesOfNorms(), during or nullcontext():
            # tie_weights: nnU-Net holds its modules under several names, and with it each would be swapped once per
            # name, the last time for the meta tensor itself: that is what the network would be left with.
            functional_call(network, tensors, (patch,), tie_weights=False)
    finally:
        if supervised is not None:
            decoder.deep_supervision = supervised


class _ShapesOfNorms(TorchFunctionMode):
    """Norms and leaky ReLUs give a tensor of their input's shape at once.

    On the meta device PyTorch decomposes them into a dozen operations in Python: four fifths of the time.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (functional.instance_norm, functional.batch_norm):
            return torch.empty_like(args[0])
        if function is functional.leaky_relu:
            return args[0] if (kwargs or {}).get("inplace", args[2:] == (True,)) else torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))
