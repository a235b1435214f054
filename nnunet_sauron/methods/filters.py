"""A layer's filters: the weights that make its channels, one row per channel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..pruning.channels import ChannelLayout


def tensors_of(network: nn.Module, layout: ChannelLayout, unit: str) -> Iterator[tuple[str, nn.Parameter, int]]:
    """The parameters that make a unit's channels: each convolution's weight and bias, and each norm's weight and bias.

    Yields:
        Name of the tensor in its module, parameter, and the axis of its channels.
    """
    for axis in layout.axes:
        if not axis.reads and axis.segments[0][0] == unit:
            tensor = getattr(network.get_submodule(axis.module), axis.tensor)
            if isinstance(tensor, nn.Parameter):
                yield axis.tensor, tensor, axis.dim


def filters(network: nn.Module, layout: ChannelLayout, unit: str) -> torch.Tensor:
    """The kernels of all convolutions that make the unit's channels: (C, weights per channel), float32, no gradient."""
    kernels = [
        tensor.detach().movedim(dim, 0).flatten(1).float()
        for _, tensor, dim in tensors_of(network, layout, unit)
        if tensor.ndim > 1
    ]
    return torch.cat(kernels, 1)
