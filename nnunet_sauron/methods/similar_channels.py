"""Sauron's measuring and choosing: how far feature maps are from each other, and which channel of a pair is removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import nn

from ..pruning.channels import channel_layout, feature_map_modules
from ..pruning.eval_mode import eval_mode
from .delta import relative_pairwise_distances
from .distributed import summed_over_ranks
from .limits import channels_to_keep
from .sauron_settings import SauronSettings

PAIRS_AT_ONCE = 10_000


def mean_distances(
    network: nn.Module, inputs: Iterable[torch.Tensor], *, standardise: bool = False
) -> dict[str, torch.Tensor]:
    """delta_prune of every channel with every other as the reference.

    Args:
        network: A network that `channel_layout` knows, unwrapped; run in evaluation mode, without gradients.
        inputs: Batches (B, channels, *patch); distances are averaged over the patches of all DDP ranks, and over the
            modules that make a unit's feature maps.
        standardise: As in `relative_pairwise_distances`.

    Returns:
        (C, C) for each unit, float32, on the CPU; empty without inputs.
    """
    layout = channel_layout(network)
    device = next(network.parameters()).device
    sums = {unit.name: torch.zeros(unit.width, unit.width, device=device) for unit in layout.units}

    def add(unit: str, module: nn.Module, _, maps: torch.Tensor) -> None:
        sums[unit] += relative_pairwise_distances(maps, standardise=standardise) * len(maps)

    hooks = {module: partial(add, unit) for unit, _, module in feature_map_modules(network, layout)}
    patches = 0
    with torch.no_grad(), eval_mode(network, hooks):
        for tensor in inputs:
            network(tensor.to(device))
            patches += len(tensor)
    patches = int(summed_over_ranks(torch.tensor(patches, device=device)))
    if not patches:
        return {}
    return {u.name: (summed_over_ranks(sums[u.name]) / (patches * len(u.feature_maps))).cpu() for u in layout.units}


def nearest_pairs(
    distances: Mapping[str, torch.Tensor], factors: Mapping[str, float]
) -> Callable[[], Iterator[tuple[float, str, int, int]]]:
    """All pairs of channels of a layer, (level, unit, channel, channel), nearest first; each call starts again.

    A pair's level is the smaller of its two distances over the layer's factor: the common level above which the
    layer's threshold, level times factor, exceeds that distance.
    """
    names, levels, ones, others = list(distances), [], [], []
    for of_unit in distances.values():
        one, other = torch.triu_indices(len(of_unit), len(of_unit), 1)
        ones.append(one)
        others.append(other)
        levels.append(torch.minimum(of_unit, of_unit.T)[one, other])
    units = torch.cat([torch.full((len(level),), i) for i, level in enumerate(levels)])
    levels = torch.cat([level / factors[name] for name, level in zip(names, levels, strict=True)])
    order = levels.argsort(stable=True)
    columns = [column[order] for column in (levels, units, torch.cat(ones), torch.cat(others))]

    def pairs() -> Iterator[tuple[float, str, int, int]]:
        # A wide network has millions of them, of which a cut takes the nearest few.
        for part in zip(*(column.split(PAIRS_AT_ONCE) for column in columns), strict=True):
            for level, unit, one, other in zip(*(column.tolist() for column in part), strict=True):
                yield level, names[unit], one, other

    return pairs


def remove_from_pairs(
    pairs: Callable[[], Iterator[tuple[float, str, int, int]]],
    value: Mapping[str, Mapping[int, int]],
    widths: Mapping[str, int],
    settings: SauronSettings,
    reached: Callable[[Mapping[str, int], float], bool],
    *,
    must_reach: bool,
) -> tuple[dict[str, list[int]], float]:
    """Remove one channel of each pair and keep the other, nearest pairs first, until this cut has gone far enough.

    Args:
        pairs: As `nearest_pairs` gives them.
        value: The position of each channel in its unit's ranking, 0 the most valuable: of a pair, the less valuable
            one is removed.
        widths: Channels of every unit.
        settings: `max_fraction_per_epoch` and `min_channels` apply.
        reached: Whether these widths, or the level of the next pair, are as far as this cut should go.
        must_reach: Whether to go on when no pair is left, without a layer's limit and with the channels that pairs
            have kept.

    Returns:
        The removed channels by unit, in that order, and the level of the last pair.
    """
    # A layer may always lose as many as lead to its next multiple; `reached` counts widths in between as that multiple.
    limits = {name: width - len(channels_to_keep(range(width), width, settings)) for name, width in widths.items()}
    left, level = dict(widths), 0.0
    removed: dict[str, list[int]] = {name: [] for name in widths}
    kept: dict[str, set[int]] = {name: set() for name in widths}
    for last in (False, True) if must_reach else (False,):
        for at, name, one, other in pairs():
            limit = widths[name] - settings.min_channels if last else limits[name]
            too_few = len(removed[name]) >= limit or left[name] <= settings.min_channels
            if too_few or {one, other} & set(removed[name]):
                continue
            candidates = [c for c in (one, other) if last or c not in kept[name]]
            if not candidates:
                continue
            if reached(left, at):
                return removed, level
            worse = max(candidates, key=value[name].__getitem__)
            removed[name].append(worse)
            kept[name].add(other if worse == one else one)
            left[name] -= 1
            level = max(level, at)
    return removed, level
