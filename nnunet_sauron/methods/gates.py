"""Scale feature maps, and sum their product with their gradient, in the memory that a training step needs anyway.

nnU-Net's plans fill a GPU. Autograd would keep one more tensor of full size for each layer whose maps are multiplied by
something; nothing of that size is kept here that the network does not keep itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from ..pruning.channels import ChannelLayout, feature_map_modules

try:
    from torch.compiler import is_compiling
except ImportError:  # before torch 2.3
    from torch._dynamo import is_compiling

VALUES_AT_ONCE = 1 << 24  # float32 copies of whole maps would need gigabytes


def register_gates(
    network: nn.Module, layout: ChannelLayout, gate_of: Callable[[str], torch.Tensor | None]
) -> list[RemovableHandle]:
    """Give each unit's gate the gradient `sum over batch and space of h * gradient of h`.

    That is the derivative by a factor at 1 that is multiplied onto the maps h, and by the logarithm of any factor that
    h contains already.

    Args:
        network: The network; its output and its gradients stay the same.
        layout: Its channel layout.
        gate_of: From a unit's name to its gate (C,), float32, for this forward, or to None.

    Returns:
        Handles that remove the hooks.
    """

    def after(unit: str, module: nn.Module, inputs, maps: torch.Tensor) -> torch.Tensor:
        return _gated(maps, gate_of(unit))

    def before(unit: str, module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (_gated(inputs[0], gate_of(unit)),)

    transposed = {unit.name for unit in layout.units if unit.transposed}
    handles = [
        module.register_forward_hook(partial(after, unit))
        for unit, _, module in feature_map_modules(network, layout)
        if unit not in transposed
    ]
    for axis in layout.axes:
        # The output of a transposed convolution is not kept for the backward pass, but its reader's input is, which
        # begins with that output.
        if axis.reads and axis.segments[0][0] in transposed:
            module = network.get_submodule(axis.module)
            handles.append(module.register_forward_pre_hook(partial(before, axis.segments[0][0])))
    return handles


def scaled(module: nn.Module, feature_maps: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """A module's feature maps (B, C, *spatial) times factors (B or 1, C), at least 0, which get no gradient.

    After a (leaky) ReLU, a norm or a convolution the maps are changed in place: a ReLU keeps its result for the
    backward pass, but uses only its sign, and the others keep no result. Where a factor is 0 the gradient is 0 as well.
    """
    factors = factors.detach().to(feature_maps.dtype).view(*factors.shape, *[1] * (feature_maps.ndim - 2))
    if is_compiling() or not _signs_are_enough(module):
        return feature_maps * factors
    return _Scaled.apply(feature_maps, factors)


def _signs_are_enough(module: nn.Module) -> bool:
    # Those of dynamic_network_architectures' blocks: bottleneck, residual, plain; a transposed convolution has none.
    names = ("nonlin3", "nonlin2", "nonlin")
    return all(isinstance(getattr(module, n), (nn.ReLU, nn.LeakyReLU)) for n in names if hasattr(module, n))


def _gated(maps: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return maps if gate is None else _Gated.apply(maps, gate)


class _Scaled(torch.autograd.Function):
    """h -> h * factors, in place. On `data`, or autograd would refuse the changed result that a nonlinearity keeps."""

    @staticmethod
    def forward(ctx, h: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factors)
        h.data.mul_(factors)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (factors,) = ctx.saved_tensors
        return grad * factors, None


class _Gated(torch.autograd.Function):
    """h -> h itself. If h has more channels than the gate, the first ones count."""

    @staticmethod
    def forward(ctx, h: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h)
        ctx.channels = len(gate)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (h,) = ctx.saved_tensors
        return grad, _summed_products(h[:, : ctx.channels], grad[:, : ctx.channels])


def _summed_products(h: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """(B, C, *spatial) twice -> (C,), in float32 for any dtype: a product in float16 overflows, and underflows."""
    sums = torch.zeros(h.shape[1], device=h.device)
    channels = max(1, VALUES_AT_ONCE // h[0, 0].numel())
    for of_sample, grad_of_sample in zip(h, grad, strict=True):
        parts = zip(of_sample.split(channels), grad_of_sample.split(channels), strict=True)
        sums += torch.cat([(a.float() * b.float()).flatten(1).sum(1) for a, b in parts])
    return sums
