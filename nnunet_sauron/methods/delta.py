"""Distances between a layer's feature maps: Sauron's delta_opt and delta_prune, and the same for every pair of maps.

Valverde, Shatillo, Tohka: Sauron U-Net: Simple automated redundancy elimination in medical image segmentation via
filter pruning. arXiv 2209.13590; Neurocomputing 594 (2024) 127817.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

NORMALISATIONS = ("minmax", "none", "max_distance")


def delta_opt(feature_maps: torch.Tensor, *, normalisation: str = "minmax") -> torch.Tensor:
    """How far a layer's feature maps are from its first one; the loss term that draws them together (paper, eq. 2).

    With `phi` average pooling of window 2 and stride 2 (axes of length 1 are left alone) and `n` the min-max
    normalisation of one map over all its spatial axes,

        delta_opt = mean_b mean_{c >= 1} sqrt(mean_space (phi(n(h[b, 0])) - phi(n(h[b, c])))^2)

    Pooling is linear, so `phi(n(h)) = (phi(h) - min h) / (max h - min h)`: the maps are pooled first. Forward and
    backward are written out, since autograd would keep five pooled tensors where one is enough. The gradient is the
    formula's own, extrema included. A map that is constant (up to rounding) is normalised to 0. Where two maps are
    equal, the root's gradient is taken as 0, one of its subgradients.

    Args:
        feature_maps: h, (B, C, *spatial), 2D or 3D, any floating dtype; computed in float32.
        normalisation: "minmax"; "none" (raw distances); or "max_distance" (raw distances of a sample divided by its
            largest one).

    Returns:
        A scalar, float32; 0 for fewer than two channels.

    Raises:
        ValueError: Another normalisation, or a tensor without channels and space.
    """
    return with_delta_opt(feature_maps, normalisation)[1]


@torch.no_grad()
def delta_prune(feature_maps: torch.Tensor, *, reference: int) -> torch.Tensor:
    """How far each feature map is from a reference map, relative to the farthest (paper, eq. 3). No gradient.

        d[b, c] = sqrt(mean_space (phi(h[b, reference]) - phi(h[b, c]))^2)
        delta_prune[c] = mean_b d[b, c] / max_c d[b, c]

    Args:
        feature_maps: h, (B, C, *spatial), 2D or 3D, any floating dtype; computed in float32.
        reference: The reference channel, 0..C-1.

    Returns:
        (C,) in [0, 1], float32; 0 at the reference, and everywhere if all maps are equal.

    Raises:
        ValueError: The reference is no channel, or the tensor has no channels and space.
    """
    _check_feature_maps(feature_maps)
    channels = feature_maps.shape[1]
    if not 0 <= reference < channels:
        raise ValueError(f"reference is a channel, 0..{channels - 1}; got {reference}.")
    pooled = _pooled(feature_maps).flatten(2).float()
    distances = _root_mean_square(pooled - pooled[:, reference : reference + 1])
    return _divided_by_largest(distances).mean(0)


@torch.no_grad()
def pairwise_distances(feature_maps: torch.Tensor) -> torch.Tensor:
    """How far every feature map is from every other one, in the maps' own scale. No gradient.

        d[b, r, c] = sqrt(mean_space (phi(h[b, r]) - phi(h[b, c]))^2)

    with phi as in `delta_opt`.

    Args:
        feature_maps: h, (B, C, *spatial), 2D or 3D, any floating dtype.

    Returns:
        (B, C, C), float32; 0 on the diagonal.

    Raises:
        ValueError: The tensor has no channels and space.
    """
    _check_feature_maps(feature_maps)
    maps = _pooled(feature_maps).flatten(2)
    return (_norms_of_differences(maps) / maps.shape[2] ** 0.5).float()


@torch.no_grad()
def relative_pairwise_distances(feature_maps: torch.Tensor, *, standardise: bool = False) -> torch.Tensor:
    """delta_prune with every channel as the reference in turn: a row each. No gradient.

        distances[r, c] = mean_b d[b, r, c] / max_c d[b, r, c],    d as in `pairwise_distances`

    so that `distances[r, c]` is `delta_prune(h, reference=r)[c]`. Standardised, each pooled map is first brought to
    zero mean and unit norm over space, and distances are divided by 2, the largest that two unit vectors can have:

        u = phi(h) - mean_space phi(h)
        distances[r, c] = mean_b |u[b, r] / |u[b, r]| - u[b, c] / |u[b, c]|| / 2

    which is `sqrt((1 - correlation) / 2)`, whatever the maps' scale. A constant map (up to rounding) becomes 0, at 1/2
    from every other map and at 0 from another constant one.

    Args:
        feature_maps: h, (B, C, *spatial), 2D or 3D, any floating dtype.
        standardise: Compare patterns only, not their level and strength.

    Returns:
        (C, C) in [0, 1], float32; 0 on the diagonal. Rows do not share a divisor, so this is no symmetric matrix
        unless standardised.

    Raises:
        ValueError: The tensor has no channels and space.
    """
    if not standardise:
        return _divided_by_largest(pairwise_distances(feature_maps)).mean(0)
    _check_feature_maps(feature_maps)
    maps = _pooled(feature_maps).flatten(2)
    low, high = torch.aminmax(maps.float(), dim=2, keepdim=True)
    constant = high - low <= _rounding(low, high, feature_maps.dtype)
    maps = maps.to(_precise_dtype(maps.device))
    maps = maps - maps.mean(2, keepdim=True)
    maps = maps / torch.where(constant, torch.inf, torch.linalg.vector_norm(maps, dim=2, keepdim=True))
    return (_norms_of_differences(maps) / 2).mean(0).float()


def with_delta_opt(feature_maps: torch.Tensor, normalisation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The feature maps, for the layers after, and their delta_opt."""
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation is one of {', '.join(NORMALISATIONS)}; got '{normalisation}'.")
    _check_feature_maps(feature_maps)
    if feature_maps.shape[1] < 2:
        return feature_maps, feature_maps.new_zeros((), dtype=torch.float32)
    maps, distances = _DistancesToFirst.apply(feature_maps, normalisation == "minmax")
    if normalisation == "max_distance":
        distances = _divided_by_largest(distances, _smallest_spread(feature_maps.dtype))
    return maps, distances.mean()


def _norms_of_differences(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, n) -> (B, C, C): the norm of the difference of every pair, by one product of matrices."""
    maps = maps.to(_precise_dtype(maps.device))
    # |a - b|^2 = aa + bb - 2 ab cancels where maps are nearly equal. Taken from the first map it cancels against that
    # distance only, and the largest distance of both is at least half of it; equal maps are exactly 0.
    maps = maps - maps[:, :1]
    products = torch.bmm(maps, maps.mT)
    squares = products.diagonal(dim1=1, dim2=2)
    return (squares[:, :, None] + squares[:, None] - 2 * products).clamp_min(0).sqrt()


def _precise_dtype(device: torch.device) -> torch.dtype:
    """float64, so that the root keeps float32's precision; MPS has none, and 3 to 4 digits of the largest are left."""
    return torch.float32 if device.type == "mps" else torch.float64


class _DistancesToFirst(torch.autograd.Function):
    """h (B, C, *spatial) -> h itself, and (B, C - 1): root mean square distance of each pooled map to the first one.

    Using the returned h saves one full-size tensor: backward adds the distances' gradient to that of h, where autograd
    would have to store it and add it afterwards.
    """

    @staticmethod
    def forward(ctx, h: torch.Tensor, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        maps = _pooled(h).flatten(2).float()
        scale = places = None
        if normalise:
            low, high, places = _extremes(h)
            spread = high - low
            constant = spread <= _rounding(low, high, h.dtype)
            scale = torch.where(constant, torch.inf, spread).reciprocal()[..., None]
            maps = maps.sub_(low[..., None]).mul_(scale)
        first = maps[:, :1].clone()
        difference = maps.sub_(first)
        distances = _root_mean_square(difference)[:, 1:]
        # In the maps' own precision, which is all that backward returns: with float16 half as much memory.
        ctx.save_for_backward(difference.to(h.dtype), first, distances, scale, places)
        ctx.shape, ctx.dtype = h.shape, h.dtype
        return h, distances

    @staticmethod
    @once_differentiable
    def backward(ctx, onward: torch.Tensor | None, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        if grad is None:
            return onward, None
        difference, first, distances, scale, places = ctx.saved_tensors
        difference = difference.float()
        voxels = _voxels(_pooling(ctx.shape[2:]))
        # d distance_c / d map_c = weight_c * difference_c, divided among a window's voxels; the first map gets the
        # negative sum. Sums over space are products of matrices, which need no more memory.
        weight = torch.where(distances > 0, grad / distances, 0) / (difference.shape[2] * voxels)
        weight = functional.pad(weight, [1, 0])[..., None]
        to_first = -torch.bmm(weight.mT, difference)
        if scale is not None:
            weight = weight * scale
            to_first *= scale[:, :1]
        to_maps = difference * weight
        to_maps[:, :1] = to_first
        if scale is not None:
            # The extrema's part needs sum(to_maps * maps), and maps = first + difference.
            total = voxels * to_maps.sum(-1, keepdim=True)
            squares = functional.pad(distances.square(), [1, 0])[..., None] * difference.shape[2]
            to_high = -voxels * (torch.bmm(to_maps, first.mT) + weight * squares)
        gradient = _spread(to_maps.to(ctx.dtype), ctx.shape, onward)
        if scale is not None:
            to_extremes = torch.cat([-total - to_high, to_high], -1).to(ctx.dtype)
            gradient.view(*ctx.shape[:2], -1).scatter_add_(2, places, to_extremes)
        return gradient, None


def _pooling(shape: Sequence[int]) -> list[int]:
    """Window and stride of phi for these spatial axes."""
    return [1 if side == 1 else 2 for side in shape]


def _pooled(h: torch.Tensor) -> torch.Tensor:
    """phi. PyTorch pools volumes of half precision on accelerators only, and images on the CPU without vector units:
    there, sums of neighbours are 3 to 4 times faster (not so in 3D)."""
    if h.device.type != "cpu":
        return (functional.avg_pool3d if h.ndim == 5 else functional.avg_pool2d)(h, _pooling(h.shape[2:]))
    h = h.float()
    if h.ndim == 5:
        return functional.avg_pool3d(h, _pooling(h.shape[2:]))
    shape = h.shape[2:]
    for axis in (2, 3):
        if h.shape[axis] > 1:
            pairs = h.narrow(axis, 0, h.shape[axis] // 2 * 2).unflatten(axis, (-1, 2))
            h = pairs.select(axis + 1, 0) + pairs.select(axis + 1, 1)
    voxels = _voxels(_pooling(shape))
    return h.clone() if voxels == 1 else h.mul_(1 / voxels)  # never h itself: the caller writes into it


def _voxels(window: Sequence[int]) -> int:
    return 2 ** sum(step > 1 for step in window)


def _spread(pooled: torch.Tensor, shape: torch.Size, onto: torch.Tensor | None) -> torch.Tensor:
    """(B, C, n) -> (*shape): each value over its whole window, added to `onto`; what no window covers is left alone.

    Axis by axis, last one first, each by writing blocks of memory twice: `interpolate` takes a detour over another
    memory format for most layers, and 3 times as long.
    """
    window = _pooling(shape[2:])
    inner = [side // step for side, step in zip(shape[2:], window, strict=True)]
    if window[-1] == 2:
        if pooled.device.type == "cpu" and pooled.dtype == torch.float32:
            # Real and imaginary part lie side by side: the fastest way on the CPU to write each value twice.
            pooled = torch.view_as_real(torch.complex(pooled, pooled))
        else:
            pooled = pooled[..., None].expand(*pooled.shape, 2)
    covered = [side * step for side, step in zip(inner, window, strict=True)]
    block = covered[-1]
    for axis in range(len(inner) - 2, -1, -1):
        pooled = pooled.reshape(-1, block)
        if axis == 0 and onto is not None and covered == list(shape[2:]) and block >= 32:
            # Long blocks are added as fast as they are copied: that saves a pass.
            blocks = onto.reshape(pooled.shape[0], window[0], block)
            return (pooled[:, None] + blocks).view(shape)
        if window[axis] == 2:
            pooled = torch.cat([pooled, pooled], -1)
        block *= covered[axis]
    spread = pooled.reshape(*shape[:2], *covered)
    if covered != list(shape[2:]):
        margins = [m for side, c in zip(shape[:1:-1], covered[::-1], strict=True) for m in (0, side - c)]
        spread = functional.pad(spread, margins)
    return spread if onto is None else spread.add_(onto)


def _extremes(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The least and the greatest value of each map (B, C), float32, and their places in the flattened map (B, C, 2)."""
    # An extreme alone is vectorised; one with its place is not, and takes 5 times as long. So the places are looked
    # for among the extremes of the map's parts, and then in those two parts by comparing, with floats for booleans,
    # which again is what is vectorised. Of equal values, the last one in the first part that has one is taken.
    size = h.shape[2:].numel()
    parts = 256
    while size % parts or (parts > 1 and size < 8 * parts**2):
        parts //= 2
    rows = h.reshape(-1, size // parts)
    extremes = torch.cat([rows.amin(1).float(), -rows.amax(1).float()]).view(-1, parts)
    maps = rows.shape[0] // parts
    row = torch.arange(0, rows.shape[0], parts, device=h.device).repeat(2)
    part = None
    if parts > 1:
        extremes, part = extremes.min(1, keepdim=True)
        row = row + part[:, 0]
    low, high = extremes[:maps], -extremes[maps:]
    found = rows.index_select(0, row).float().eq_(torch.cat([low, high]))
    # NaN equals nothing, and place 0 is at least in the map.
    place = found.mul_(torch.arange(rows.shape[1], device=h.device, dtype=torch.float32)).amax(1).long()
    if part is not None:
        place = place + part[:, 0] * rows.shape[1]
    return low.view(h.shape[:2]), high.view(h.shape[:2]), place.view(2, *h.shape[:2]).movedim(0, -1)


def _rounding(low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A map whose values spread no wider than this holds rounding noise only, and counts as constant."""
    return (8 * torch.finfo(dtype).eps * torch.maximum(low.abs(), high.abs())).clamp_min(_smallest_spread(dtype))


def _smallest_spread(dtype: torch.dtype) -> float:
    """Dividing by less than this would overflow the gradient."""
    return max(1e-8, torch.finfo(dtype).tiny)


def _root_mean_square(difference: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(difference, dim=-1) / difference.shape[-1] ** 0.5


def _divided_by_largest(distances: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """By the largest along the last axis."""
    largest = distances.amax(dim=-1, keepdim=True)
    return distances / torch.where(largest > floor, largest, torch.inf)


def _check_feature_maps(feature_maps: torch.Tensor) -> None:
    if feature_maps.ndim not in (4, 5) or feature_maps.numel() == 0:
        raise ValueError(f"Feature maps are (B, C, *spatial) with 2 or 3 axes; got {tuple(feature_maps.shape)}.")
