"""Fold what removed channels carried into those that stay, so that a network shrinks without training.

A feature map is redundant when the kept maps of its layer reproduce it. Second moments of the maps on a few inputs tell
which do: a layer's maps are fitted by the kept ones, and whoever read them all reads that fit instead. Known as channel
reconstruction (ThiNet; He, Zhang, Sun: Channel pruning for accelerating very deep neural networks, ICCV 2017) and
interpolative decomposition (Chee et al.: Model preserving compression for neural networks, NeurIPS 2022).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvTransposeNd

from .channels import ChannelLayout, ChannelUnit, channel_layout
from .evaluating import evaluating
from .removal import check_kept, remove_channels

RIDGE = 1e-8  # of the kept channels' mean variance
AIM_RIDGE = 1e-2  # the same for what a fit adds to mend the cuts before it, which may rest on few positions
NEGLIGIBLE = 1e-6  # relative error below which a sensitivity would be one of rounding
NOISE = 1e-9  # what is left of a channel's variance below this is rounding of maps in float32
ROUNDING = 1e-12  # of a covariance, relative to the maps' squares
VALUES_AT_ONCE = 1 << 22  # float64 copies of whole maps would need gigabytes
PROBE = 0.1  # relative error at which a unit's sensitivity is measured
PROBED = 6  # inputs that it is measured on, at most
LEAST_SENSITIVITY = 1e-3
UNSURE = 0.7  # share of `position_weights` that goes by how unsure the network is, the rest to all positions alike


def merge_channels(
    network: nn.Module,
    keep: Mapping[str, Sequence[int]],
    inputs: Sequence[torch.Tensor],
    *,
    weights: Sequence[torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    after_unit: Callable[[str], None] = lambda _: None,
) -> None:
    """Remove channels in place, and let the others carry what they carried.

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
        keep: For each unit to cut, by name: its channels that stay, ascending (`rank_units` tells the best). Units not
            named stay as they are.
        inputs: What to fit on: tensors (B, channels, *patch), run in turn, twice for each unit that is cut.
        weights: How much each of their positions counts, (B, *patch) each, such as `position_weights`; None for all
            alike.
        optimizer: Its parameter groups and its state follow, as in `remove_channels`.
        after_unit: Called with each unit's name when it is done.

    Raises:
        ValueError: An unknown unit, a channel that it does not have, no inputs, or weights of other shapes. Nothing is
            changed then.
    """
    layout = channel_layout(network)
    check_kept(layout, keep)
    if not inputs:
        raise ValueError("Merging needs inputs to fit on; got none.")
    before = _copied(network)
    for unit in layout.units:
        kept = keep.get(unit.name, range(unit.width))
        if len(kept) < unit.width:
            moments = collect_moments(network, unit.feature_maps, inputs, weights, before)
            _fold(network, channel_layout(network), unit, kept, moments)
            remove_channels(network, {unit.name: kept}, optimizer)
        after_unit(unit.name)


def _copied(network: nn.Module) -> nn.Module:
    """A copy with the very hooks of the network's: they may belong to a trainer, which would be copied with them."""
    hooks = [hook for module in network.modules() for hook in module._forward_hooks.values()]
    return copy.deepcopy(network, {id(hook): hook for hook in hooks})


def rank_units(
    network: nn.Module,
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None = None,
    *,
    regions: bool = False,
    after_probe: Callable[[str], None] = lambda _: None,
) -> dict[str, Ranking]:
    """The ranking of every unit's channels, by name.

    Args:
        network: A segmentation network that `channel_layout` knows; run in evaluation mode. Of several outputs the
            first is taken.
        inputs: Tensors (B, channels, *patch): run once, and up to `PROBED` of them once more, also for every unit.
        weights: As in `merge_channels`.
        regions: Whether classes may overlap (sigmoid instead of softmax).
        after_probe: Called with each unit's name, once for each of those.
    """
    layout = channel_layout(network)
    places = [place for unit in layout.units for place in unit.feature_maps]
    moments = collect_moments(network, places, inputs, weights)
    rankings = {}
    for unit in layout.units:
        read_by = {place: torch.zeros_like(moments[place].products) for place in unit.feature_maps}
        for place, _, read, _ in _readers(network, layout, unit):
            filters = read.detach().double().flatten(1)
            read_by[place] += filters @ filters.T
        rankings[unit.name] = rank_channels([moments[place] for place in read_by], list(read_by.values()))
    probed = [inputs[i * len(inputs) // PROBED] for i in range(PROBED)] if len(inputs) > PROBED else inputs
    found = _sensitivities(network, layout, rankings, moments, probed, regions, after_probe)
    return {name: replace(ranking, sensitivity=found.get(name, 1.0)) for name, ranking in rankings.items()}


def _sensitivities(
    network: nn.Module,
    layout: ChannelLayout,
    rankings: Mapping[str, Ranking],
    moments: Mapping[str, Moments],
    inputs: Sequence[torch.Tensor],
    regions: bool,
    after_probe: Callable[[str], None],
) -> dict[str, float]:
    """Of the units that can lose anything; of none if the output tells nothing."""
    refits: dict[str, Mapping[nn.Module, Callable]] = {}
    errors: dict[str, float] = {}
    for unit in layout.units:
        ranking = rankings[unit.name]
        count = min(ranking.least(PROBE), unit.width - 1)
        if count and ranking.errors[count] > NEGLIGIBLE:
            refits[unit.name] = _refits(network, unit, ranking.keep(count), moments)
            errors[unit.name] = ranking.errors[count]
    divergences = dict.fromkeys(refits, 0.0)
    for tensor in inputs:
        before = _log_probabilities(network, tensor, regions)
        for name in rankings:
            if name in refits:
                after = _log_probabilities(network, tensor, regions, refits[name])
                # Both distributions' sums are 1; with them no term is negative, however sure the network is.
                terms = before.exp() * (before - after) - before.exp() + after.exp()
                del after
                divergences[name] += terms.clamp_min_(0).sum(dtype=torch.float64).item() / errors[name]
            after_probe(name)
    logarithms = [math.log(d) for d in divergences.values() if d > 0]
    if not logarithms:
        return {}
    mean = math.exp(sum(logarithms) / len(logarithms))
    return {name: max(d / mean, LEAST_SENSITIVITY) for name, d in divergences.items()}


def _refits(
    network: nn.Module, unit: ChannelUnit, kept: Sequence[int], moments: Mapping[str, Moments]
) -> dict[nn.Module, Callable]:
    """Forward hooks that make a unit's maps, in each of their places, what its kept channels make of them."""
    stay = torch.tensor(list(kept), device=next(network.parameters()).device)

    def hook(place: str):
        fit, offset = _fitted(moments[place], stay, unit.width, intercept=True)

        def refit(module, inputs, maps: torch.Tensor) -> torch.Tensor:
            refitted = torch.einsum("ck,bk...->bc...", fit.to(maps.dtype), maps[:, stay])
            return refitted + offset.to(maps.dtype).view(-1, *[1] * (maps.ndim - 2))

        return refit

    return {network.get_submodule(place): hook(place) for place in unit.feature_maps}


@torch.no_grad()
def position_weights(
    network: nn.Module, inputs: Sequence[torch.Tensor], *, regions: bool = False, unsure: float = UNSURE
) -> list[torch.Tensor]:
    """How much each position should count in a fit: more where the network is unsure.

    An image is mostly background that no error of a feature map turns into anything else; alike for all positions, a
    fit spends its channels there. The second-order term of the divergence between old and new probabilities weights a
    logit's squared error by `sum_k p_k (1 - p_k)`. Its square root, the standard deviation of the label, is what
    kept the segmentations best (benchmarks/results), mixed with a constant, since layers see beyond a voxel.

    Args:
        network: A segmentation network, run in evaluation mode; of several outputs the first is taken.
        inputs: Tensors (B, channels, *patch).
        regions: Whether classes may overlap (sigmoid instead of softmax).
        unsure: The share that goes by how unsure the network is; the rest counts all positions alike.

    Returns:
        (B, *patch) each, float32, on the network's device; their mean over all inputs is 1.
    """
    found = []
    for tensor in inputs:
        probabilities = _log_probabilities(network, tensor, regions).exp()
        found.append((probabilities * (1 - probabilities)).sum(1).sqrt())
        del probabilities
    mean = sum(one.double().sum() for one in found) / sum(one.numel() for one in found)
    if not mean > 0:
        return [torch.ones_like(one) for one in found]
    return [unsure * one / mean.float() + (1 - unsure) for one in found]


@torch.no_grad()
def _log_probabilities(
    network: nn.Module, tensor: torch.Tensor, regions: bool, hooks: Mapping[nn.Module, Callable] | None = None
) -> torch.Tensor:
    """(B, classes, *patch), float32, in evaluation mode; of regions (B, 2 * regions, *patch): in it, and not."""
    with evaluating(network, hooks):
        output = network(tensor.to(next(network.parameters()).device))
    logits = (output[0] if isinstance(output, (list, tuple)) else output).float()
    return functional.logsigmoid(torch.cat([logits, -logits], 1)) if regions else logits.log_softmax(1)


class Moments:
    """Weighted sums over the positions of feature maps, in float64: all that a least squares fit of channels needs.

    Attributes:
        count: Sum of the positions' weights so far, over all samples.
        total: Sums, (C,).
        products: Sums of products, (C, C).
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.products = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, feature_maps: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take in feature maps (B, C, *spatial) of any floating dtype; weights of the positions, (B, *spatial)."""
        step = max(1, VALUES_AT_ONCE // feature_maps.shape[1])
        feature_maps = feature_maps.detach().flatten(2)
        if weights is None:
            weights = feature_maps.new_ones(()).expand(feature_maps.shape[0], feature_maps.shape[2])
        for sample, counts in zip(feature_maps, weights.flatten(1), strict=True):
            for part, count in zip(sample.split(step, dim=1), counts.split(step), strict=True):
                values, count = part.double(), count.double()
                weighted = values * count
                self.count += count.sum()
                self.total += weighted.sum(1)
                self.products += weighted @ values.T

    @property
    def mean(self) -> torch.Tensor:
        """(C,)"""
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """(C, C)"""
        return self.products / self.count - torch.outer(self.mean, self.mean)

    @property
    def second(self) -> torch.Tensor:
        """Mean of products without the mean taken off, (C, C)."""
        return self.products / self.count


@dataclass(frozen=True)
class Ranking:
    """A unit's channels in the order in which they are worth keeping.

    Attributes:
        order: Every channel once, the most valuable first.
        errors: `errors[k]` is the part of what the unit's readers get that is lost when the first k are kept: C + 1
            values from 1 to 0 that never rise.
        sensitivity: What such an error does to the network's output, relative to other units: its divergence
            (Kullback-Leibler) when this unit's maps alone are replaced by their fit from so many channels that the
            error is at most `PROBE`, or from all but one; divided by that error and by the geometric mean over the
            units. 1 where none was measured.
    """

    order: tuple[int, ...]
    errors: tuple[float, ...]
    sensitivity: float = 1.0

    def least(self, tolerance: float) -> int:
        """The fewest channels, at least one, whose error is at most the tolerance."""
        return next(k for k in range(1, len(self.errors)) if self.errors[k] <= tolerance or k == len(self.order))

    def keep(self, count: int) -> list[int]:
        """The `count` most valuable channels, ascending."""
        return sorted(self.order[:count])


def collect_moments(
    network: nn.Module,
    places: Collection[str],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None = None,
    before: nn.Module | None = None,
) -> dict[str, Moments]:
    """Second moments of the outputs of the named modules, in evaluation mode.

    The forward stops after the last of them. Memory: one input's forward and a (C, C) matrix each; with another network
    beside it, that one's outputs as well.

    Args:
        network: The network.
        places: Names of modules; each is run once in a forward.
        inputs: Tensors (B, channels, *patch), on any device.
        weights: Of their positions, (B, *patch) each, averaged to the resolution of the maps; None for all alike.
        before: Another network with modules of these names: its maps follow, as channels C and up of (2C, 2C) moments.

    Raises:
        ValueError: The weights are not of the inputs' shapes.
    """
    if weights is not None:
        shapes, expected = ([tuple(w.shape) for w in weights], [(len(x), *x.shape[2:]) for x in inputs])
        if shapes != expected:
            raise ValueError(
                f"Weights of positions are {shapes}; of these inputs they are {expected}, (B, *patch) each."
            )
    device = next(network.parameters()).device
    moments: dict[str, Moments] = {}
    for index, tensor in enumerate(inputs):
        counts = None if weights is None else weights[index].to(device)
        maps_before: dict[str, torch.Tensor] = {}
        if before is not None:
            _forward_until(before, tensor.to(device), places, maps_before.__setitem__)

        def take(name: str, maps: torch.Tensor, counts=counts, maps_before=maps_before) -> None:
            if name in maps_before:
                maps = torch.cat([maps, maps_before.pop(name)], 1)
            if name not in moments:
                moments[name] = Moments(maps.shape[1], maps.device)
            moments[name].add(maps, counts if counts is None else _averaged(counts, maps.shape[2:]))

        _forward_until(network, tensor.to(device), places, take)
    return moments


def _averaged(weights: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(B, *patch) -> (B, *shape)"""
    pool = functional.adaptive_avg_pool2d if len(shape) == 2 else functional.adaptive_avg_pool3d
    return pool(weights[:, None], tuple(shape))[:, 0]


class _Enough(Exception):  # noqa: N818  (no error)
    """Ends a forward whose later layers nobody needs."""


@torch.no_grad()
def _forward_until(network: nn.Module, tensor: torch.Tensor, places: Collection[str], take) -> None:
    left = set(places)

    def observe(name: str):
        def hook(module, inputs, output) -> None:
            take(name, output)
            left.discard(name)
            if not left:
                raise _Enough

        return hook

    with contextlib.suppress(_Enough), evaluating(network, {network.get_submodule(n): observe(n) for n in places}):
        network(tensor)


def rank_channels(moments: Sequence[Moments], weights: Sequence[torch.Tensor]) -> Ranking:
    """Order channels by what the others, kept before them, cannot reproduce of them.

    Greedy: the next channel is the one whose addition leaves the least error, where the error is that of the readers'
    output. With R the covariance of what the kept channels leave of all, and M the readers' weights times themselves,
    adding channel j takes `R[:, j]^T M R[:, j] / R[j, j]` off the error tr(M R). (With M = 1 this is orthogonal least
    squares; choosing the largest R[j, j] instead would be column-pivoted QR.)

    Args:
        moments: Of each place where the unit's maps lie; the channels are chosen for all of them together.
        weights: M of each place, (C, C).
    """
    residuals = [m.covariance for m in moments]
    totals = [(w * r).sum() for w, r in zip(weights, residuals, strict=True)]
    read = max(1, sum(bool(t > 0) for t in totals))  # a place where all is constant or nobody reads has no say
    weights = [w / (t * read) if t > 0 else torch.zeros_like(w) for w, t in zip(weights, totals, strict=True)]
    channels = len(residuals[0])
    floors = [NOISE * r.diagonal() for r in residuals]
    order: list[int] = []
    errors = [1.0]
    left = torch.ones(channels, dtype=torch.bool, device=residuals[0].device)
    gains = [(r * (w @ r)).sum(0) for w, r in zip(weights, residuals, strict=True)]
    for _ in range(channels):
        gain = torch.zeros(channels, dtype=torch.float64, device=left.device)
        for r, g, floor in zip(residuals, gains, floors, strict=True):
            d = r.diagonal()
            gain += torch.where(d > floor, g.clamp_min(0) / d, 0)
        j = int(torch.where(left, gain, -1).argmax())
        order.append(j)
        left[j] = False
        for r, w, g, floor in zip(residuals, weights, gains, floors, strict=True):
            d = r[j, j].clone()
            if d > floor[j]:
                u = r[:, j].clone()
                m = w @ u
                g += u.square() * (u @ m) / d**2 - 2 * u * (r @ m) / d
                r -= torch.outer(u, u) / d
        # Rounding must not let the error rise, nor fall below what is left.
        error = sum(float((w * r).sum()) for w, r in zip(weights, residuals, strict=True))
        errors.append(min(errors[-1], max(error, 0.0)))
    errors[-1] = 0.0
    return Ranking(tuple(order), tuple(errors))


def _readers(network: nn.Module, layout: ChannelLayout, unit: ChannelUnit):
    """Whoever reads a unit: (place, convolution, its weights for the unit (C, outputs, taps), where they start)."""
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
    kept: Sequence[int],
    moments: Mapping[str, Moments],
) -> None:
    """Let the readers of a unit read its kept channels as all of them (in place; nothing is removed yet)."""
    stay = torch.tensor(list(kept), device=next(network.parameters()).device)
    for place, conv, read, start in _readers(network, layout, unit):
        transposed = isinstance(conv, _ConvTransposeNd)
        fit, offset = _fitted(moments[place], stay, unit.width, conv.bias is not None and not transposed)
        read = read.double()
        folded = torch.einsum("ck,cot->kot", fit, read).to(conv.weight.dtype)
        dim = 0 if transposed else 1
        folded = folded.unflatten(2, conv.weight.shape[2:]).transpose(0, dim)
        if conv.bias is not None:
            conv.bias += torch.einsum("c,cot->o", offset, read).to(conv.bias.dtype)
        conv.weight.index_copy_(dim, start + stay, folded)


def _fitted(moments: Moments, stay: torch.Tensor, channels: int, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """W (C, kept) and b (C) of `x ~ W x'_K + b`, float64; b is 0 without an intercept.

    The moments are of x' and x, (2C), or of x alone, which is fitted by its own kept channels then.
    """
    matrix = moments.covariance if intercept else moments.second
    of_kept, with_aims = matrix[stay][:, stay], matrix[stay][:, -channels:]
    # The second and third term are for maps that hardly vary: something positive to divide by, above their rounding.
    level = moments.second.diagonal().mean()
    diagonal = RIDGE * of_kept.diagonal().mean() + ROUNDING * level + torch.finfo(torch.float64).tiny
    identity = torch.eye(len(stay), dtype=torch.float64, device=stay.device)
    own = torch.linalg.solve(of_kept + diagonal * identity, matrix[stay][:, :channels])
    own[:, stay] = identity
    diagonal = diagonal + AIM_RIDGE * of_kept.diagonal().mean()
    fit = (own + torch.linalg.solve(of_kept + diagonal * identity, with_aims - of_kept @ own)).T
    offset = moments.mean[-channels:] - fit @ moments.mean[stay]
    return fit, offset if intercept else torch.zeros_like(offset)
