"""Feature maps scaled, and their product with their gradient summed, in the memory that a training step needs anyway.

nnU-Net's plans fill a card. Autograd would keep one more tensor of full size for each layer that is multiplied by
something; here nothing of that size is kept that the network does not keep itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..pruning.channels import ChannelLayout, feature_map_modules

try:
    from torch.compiler import is_compiling
except ImportError:  # before torch 2.3
    from torch._dynamo import is_compiling

VALUES_AT_ONCE = 1 << 24  # float32 copies of whole maps would need gigabytes


def register_gates(network: nn.Module, layout: ChannelLayout, gate_of: Callable[[str], torch.Tensor | None]) -> None:
    """Let each unit's gate get `sum over batch and space of h * gradient of h` as its gradient in training mode.

    That is the derivative by a factor at 1 that is multiplied onto the maps h, and by the logarithm of any factor that
    h contains already.

    Args:
        network: The network; its output and its gradients stay the same.
        layout: Its channel layout.
        gate_of: Told a unit's name, its gate (C,), float32, for this forward; None for none.
    """

    def after(unit: str, module: nn.Module, inputs, maps: torch.Tensor) -> torch.Tensor:
        return _gated(maps, gate_of(unit)) if module.training else maps

    def before(unit: str, module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (_gated(inputs[0], gate_of(unit)),) if module.training else inputs

    transposed = {unit.name for unit in layout.units if unit.transposed}
    for unit, _, module in feature_map_modules(network, layout):
        if unit not in transposed:
            module.register_forward_hook(partial(after, unit))
    for axis in layout.axes:
        # Nobody keeps what a transposed convolution makes, but its reader keeps it, as the first part of what it reads.
        if axis.reads and axis.segments[0][0] in transposed:
            module = network.get_submodule(axis.module)
            module.register_forward_pre_hook(partial(before, axis.segments[0][0]))


def scaled(module: nn.Module, feature_maps: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """A module's feature maps (B, C, *spatial) times factors (B or 1, C), at least 0, through which no gradient flows.

    After a (leaky) ReLU, a norm or a convolution this writes into the maps: the first keeps its result for the backward
    pass, and looks only at its sign; the others do not keep it. Where a factor is 0 the gradient is 0 as well.
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
    """h -> h * factors, in place. As `data`, or autograd would refuse the result that the nonlinearity keeps."""

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
    """h -> h itself. Of more channels than the gate has, the first ones count."""

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
    """(B, C, *spatial) twice -> (C,), in float32 whatever they are: a product of float16 overflows, and underflows."""
    sums = torch.zeros(h.shape[1], device=h.device)
    channels = max(1, VALUES_AT_ONCE // h[0, 0].numel())
    for of_sample, grad_of_sample in zip(h, grad, strict=True):
        parts = zip(of_sample.split(channels), grad_of_sample.split(channels), strict=True)
        sums += torch.cat([(a.float() * b.float()).flatten(1).sum(1) for a, b in parts])
    return sums
