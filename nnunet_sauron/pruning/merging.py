"""Merge removed channels into those that are kept, so that a network shrinks without training.

A feature map is redundant when the kept maps of its layer reproduce it. Second moments of the maps on a few inputs give
the fit of a layer's maps by the kept ones, and the layers that read them read that fit instead. Known as channel
reconstruction (ThiNet; He, Zhang, Sun: Channel pruning for accelerating very deep neural networks, ICCV 2017) and
interpolative decomposition (Chee et al.: Model preserving compression for neural networks, NeurIPS 2022).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from .channels import ChannelLayout, ChannelUnit, channel_layout
from .cost import feature_map_voxels
from .eval_mode import copy_network
from .moments import Moments, averaged, check_inputs, collect_moments, forward_until
from .removal import check_kept, remove_channels

RIDGE = 1e-8  # of the kept channels' mean variance
AIM_RIDGE = 1e-2  # the same for what a fit adds to mend the cuts before it, which may rest on few positions
VALUES_IN_ONE_PASS = 1 << 28  # of all maps, a gigabyte in float32; more are computed anew for every unit
ROUNDING = 1e-12  # of a covariance, relative to the maps' squares


def merge_channels(
    network: nn.Module,
    keep: Mapping[str, Sequence[int]],
    inputs: Sequence[torch.Tensor],
    *,
    weights: Sequence[torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    after_unit: Callable[[str], None] = lambda _: None,
) -> None:
    """Remove channels in place, and merge what they carried into the others.

    Unit by unit in the data's order. The maps x that the network had before any cut are fitted by what it makes of the
    kept ones after the cuts before this one: `x ~ W x'_K + b`, by least squares. So every fit mends what the cuts
    before it left wrong (asymmetric reconstruction: Zhang et al., TPAMI 38, 2016, arXiv 1505.06798). It begins with the
    fit of x' itself, in which kept channels stay as they are, and a ridge (`AIM_RIDGE`) keeps it near that. Every
    reader's weights take W on, and its bias takes b times the weights' sum. A reader without a bias, or a transposed
    convolution, whose taps fall on different voxels, gets a fit without b. Where x is a linear combination of x'_K the
    output stays the same; if it needs b, up to the zero padding: a tap outside of the image reads 0, not b, so a
    reader's output is off by at most `sum_c |b_c| sum_taps |weight|` there.

    Args:
        network: A network that `channel_layout` knows, unwrapped; run in evaluation mode.
        keep: For each unit to cut, by name: its channels to keep, ascending (`rank_units` finds the best). Units that
            are not named stay as they are.
        inputs: Tensors (B, channels, *patch) to fit on. Run together, once before and once during the merge, if all
            maps fit into a gigabyte; else one after another, twice for each unit that is cut.
        weights: Weights of their positions, (B, *patch) each, such as `position_weights`; None for equal weights.
        optimizer: Its parameter groups and its state follow, as in `remove_channels`.
        after_unit: Called with each unit's name when it is done.

    Raises:
        ValueError: An unknown unit, a channel that it does not have, no inputs, or weights of other shapes. Nothing is
            changed then.
        RuntimeError: There is no memory for a fit (`OutOfMemoryError`), or no finite solution (`LinAlgError`). Some
            units may be merged already and others not; `remove_channels` can cut those.
    """
    layout = channel_layout(network)
    check_kept(layout, keep)
    check_inputs(inputs, weights)
    cut = [unit for unit in layout.units if len(keep.get(unit.name, range(unit.width))) < unit.width]
    for unit in layout.units:
        if unit not in cut:
            after_unit(unit.name)
    if cut and _values(network, layout.units, inputs) <= VALUES_IN_ONE_PASS:
        _fold_in_one_pass(network, layout, cut, keep, inputs, weights, after_unit)
        remove_channels(network, {unit.name: keep[unit.name] for unit in cut}, optimizer)
        return
    before = copy_network(network)
    for unit in cut:
        moments = collect_moments(network, unit.feature_maps, inputs, weights, before)
        now = channel_layout(network)
        for place in unit.feature_maps:
            _fold(network, now, unit, place, keep[unit.name], moments[place])
        remove_channels(network, {unit.name: keep[unit.name]}, optimizer)
        after_unit(unit.name)


def check_mergeable(network: nn.Module) -> None:
    """Raise ValueError unless every convolution of this network reads feature maps as they are.

    A convolution is linear in its input maps, which a fit relies on; with a norm or an activation before it, it is not.
    """
    channel_layout(network)  # refuses what it does not know
    for name, module in network.named_modules():
        if type(module).__name__ == "ConvDropoutNormReLU":
            first = next((m for m in module.all_modules if not isinstance(m, (_DropoutNd, nn.Identity))), None)
            if not isinstance(first, _ConvNd):
                raise ValueError(
                    f"In the block '{name}' {type(first).__name__} stands before the convolution. Merging needs "
                    f"convolutions that read feature maps as they are."
                )


def _values(network: nn.Module, units: Sequence[ChannelUnit], inputs: Sequence[torch.Tensor]) -> int:
    """The number of values of all maps of these units, for all inputs; `sys.maxsize` where inputs differ in size."""
    channels = inputs[0].shape[1]
    patches = {tuple(tensor.shape[2:]) for tensor in inputs}
    if len(patches) > 1:
        return sys.maxsize
    voxels = feature_map_voxels(network, inputs[0].shape[2:], channels)
    return sum(map(len, inputs)) * sum(unit.width * len(unit.feature_maps) * voxels[unit.name] for unit in units)


def _fold_in_one_pass(
    network: nn.Module,
    layout: ChannelLayout,
    units: Sequence[ChannelUnit],
    keep: Mapping[str, Sequence[int]],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None,
    after_unit: Callable[[str], None],
) -> None:
    """Fold every unit during one forward of all inputs together: a layer runs after those that it reads.

    No layer reads the removed channels then, but they are still there.
    """
    device = next(network.parameters()).device
    together = torch.cat([tensor.to(device) for tensor in inputs])
    counts = None if weights is None else torch.cat([one.to(device) for one in weights])
    unit_at = {place: unit for unit in units for place in unit.feature_maps}
    maps_before: dict[str, torch.Tensor] = {}
    forward_until(network, together, unit_at, maps_before.__setitem__)

    def fold(place: str, maps: torch.Tensor) -> None:
        unit = unit_at[place]
        both = Moments(2 * unit.width, device)
        both.add(maps, counts if counts is None else averaged(counts, maps), maps_before.pop(place))
        _fold(network, layout, unit, place, keep[unit.name], both)
        if place == unit.feature_maps[-1]:
            after_unit(unit.name)

    forward_until(network, together, unit_at, fold)


def readers(
    network: nn.Module, layout: ChannelLayout, unit: ChannelUnit
) -> Iterator[tuple[str, _ConvNd, torch.Tensor, int]]:
    """The convolutions that read a unit: (place, convolution, its weights for the unit (C, outputs, taps), start)."""
    for axis in layout.axes:
        start = 0
        for (name, width), place in zip(axis.segments, axis.places, strict=True):
            if axis.reads and name == unit.name:
                conv = network.get_submodule(axis.module)
                read = conv.weight.narrow(axis.dim, start, width).transpose(0, axis.dim).flatten(2)
                yield place, conv, read, start
            start += width


@torch.no_grad()
def _fold(
    network: nn.Module,
    layout: ChannelLayout,
    unit: ChannelUnit,
    place: str,
    kept: Sequence[int],
    moments: Moments,
) -> None:
    """Let all layers that read a unit in one place read the fit by its kept channels, in place; removes nothing."""
    indices = torch.tensor(list(kept), device=next(network.parameters()).device)
    for where, conv, read, start in readers(network, layout, unit):
        if where != place:
            continue
        transposed = isinstance(conv, _ConvTransposeNd)
        fit, offset = fitted(moments, indices, unit.width, conv.bias is not None and not transposed)
        read = read.double()
        folded = torch.einsum("ck,cot->kot", fit, read).to(conv.weight.dtype)
        dim = 0 if transposed else 1
        folded = folded.unflatten(2, conv.weight.shape[2:]).transpose(0, dim)
        if conv.bias is not None:
            conv.bias += torch.einsum("c,cot->o", offset, read).to(conv.bias.dtype)
        conv.weight.narrow(dim, start, unit.width).zero_()
        conv.weight.index_copy_(dim, start + indices, folded)


def fitted(moments: Moments, kept: torch.Tensor, channels: int, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The least-squares fit of feature maps by some of their channels.

    Args:
        moments: Of x' and x, (2C), or of x alone, which is fitted by its own kept channels then.
        kept: Indices of the kept channels of x', (K), int64.
        channels: C.
        intercept: Whether the fit has a constant.

    Returns:
        W (C, K) and b (C) of `x ~ W x'_K + b`, float64; b is 0 without an intercept.

    Raises:
        LinAlgError: The fit has no finite solution.
    """
    matrix = moments.covariance if intercept else moments.second
    of_kept, with_aims = matrix[kept][:, kept], matrix[kept][:, -channels:]
    # The second and third term are for maps that hardly vary: something positive to divide by, above their rounding.
    level = moments.second.diagonal().mean()
    diagonal = RIDGE * of_kept.diagonal().mean() + ROUNDING * level + torch.finfo(torch.float64).tiny
    identity = torch.eye(len(kept), dtype=torch.float64, device=kept.device)
    of_now = torch.linalg.solve(of_kept + diagonal * identity, matrix[kept][:, :channels])
    of_now[:, kept] = identity
    diagonal = diagonal + AIM_RIDGE * of_kept.diagonal().mean()
    fit = (of_now + torch.linalg.solve(of_kept + diagonal * identity, with_aims - of_kept @ of_now)).T
    if not fit.isfinite().all():
        raise torch.linalg.LinAlgError("A fit of feature maps has no finite solution: they are not finite, or huge.")
    offset = moments.mean[-channels:] - fit @ moments.mean[kept]
    return fit, offset if intercept else torch.zeros_like(offset)
