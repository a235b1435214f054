"""Which channels of a layer are worth keeping, and what its errors do to the network's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .channels import ChannelLayout, ChannelUnit, channel_layout
from .merging import fitted, readers
from .moments import Moments, Output, collect_moments

NEGLIGIBLE = 1e-6  # relative error below which a sensitivity would be one of rounding
NOISE = 1e-9  # what is left of a channel's variance below this is rounding of maps in float32
PROBE = 0.1  # relative error at which a unit's sensitivity is measured
PROBED = 6  # inputs that it is measured on, at most
LEAST_SENSITIVITY = 1e-3


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

    @classmethod
    def whole(cls, channels: int) -> Ranking:
        """A ranking that keeps every channel at any tolerance: the errors are infinite."""
        return cls(tuple(range(channels)), (*[math.inf] * channels, 0.0))

    def least(self, tolerance: float) -> int:
        """The fewest channels, at least one, whose error is at most the tolerance."""
        return next(k for k in range(1, len(self.errors)) if self.errors[k] <= tolerance or k == len(self.order))

    def keep(self, count: int) -> list[int]:
        """The `count` most valuable channels, ascending."""
        return sorted(self.order[:count])


def rank_units(
    network: nn.Module,
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None = None,
    *,
    regions: bool = False,
    probed: int = PROBED,
    left_alone: Collection[str] = (),
    after_probe: Callable[[str], None] = lambda _: None,
) -> dict[str, Ranking]:
    """The ranking of every unit's channels, by name.

    Args:
        network: A segmentation network that `channel_layout` knows; run in evaluation mode. Of several outputs the
            first is taken.
        inputs: Tensors (B, channels, *patch): run once, and up to `probed` of them once more, also for every unit.
        weights: As in `merge_channels`.
        regions: Whether classes may overlap (sigmoid instead of softmax).
        probed: How many of the inputs the sensitivities are measured on, at most.
        left_alone: Units that are to keep all of their channels, such as those that have too few positions for a fit.
        after_probe: Called with each unit's name, once for each of those.

    Raises:
        ValueError: There are no inputs, or the weights are not of their shapes.
    """
    layout = channel_layout(network)
    ranked = [unit for unit in layout.units if unit.name not in left_alone]
    places = [place for unit in ranked for place in unit.feature_maps]
    moments = collect_moments(network, places, inputs, weights)
    rankings = {unit.name: Ranking.whole(unit.width) for unit in layout.units}
    for unit in ranked:
        read_by = {place: torch.zeros_like(moments[place].products) for place in unit.feature_maps}
        for place, _, read, _ in readers(network, layout, unit):
            filters = read.detach().double().flatten(1)
            read_by[place] += filters @ filters.T
        rankings[unit.name] = rank_channels([moments[place] for place in read_by], list(read_by.values()))
    chosen = [inputs[i * len(inputs) // probed] for i in range(probed)] if len(inputs) > probed else inputs
    found = _sensitivities(network, layout, rankings, moments, chosen, regions, after_probe)
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
        if count and NEGLIGIBLE < ranking.errors[count] < math.inf:
            refits[unit.name] = _refits(network, unit, ranking.keep(count), moments)
            errors[unit.name] = ranking.errors[count]
    divergences = dict.fromkeys(refits, 0.0)
    for tensor in inputs:
        before = Output.of(network, tensor)
        for name in rankings:
            if name in refits:
                after = Output.of(network, tensor, refits[name])
                divergences[name] += _divergence(before, after, regions) / errors[name]
                del after
            after_probe(name)
    logarithms = [math.log(d) for d in divergences.values() if d > 0]
    if not logarithms:
        return {}
    mean = math.exp(sum(logarithms) / len(logarithms))
    return {name: max(d / mean, LEAST_SENSITIVITY) for name, d in divergences.items()}


def _divergence(before: Output, after: Output, regions: bool) -> float:
    """Kullback-Leibler, summed over all positions."""
    divergence = 0.0
    for p, q in zip(before.log_probabilities(regions), after.log_probabilities(regions), strict=True):
        # Both distributions' sums are 1; with them no term is negative, however sure the network is.
        terms = p.exp() * (p - q) - p.exp() + q.exp()
        divergence += terms.clamp_min_(0).sum(dtype=torch.float64).item()
    return divergence


def _refits(
    network: nn.Module, unit: ChannelUnit, kept: Sequence[int], moments: Mapping[str, Moments]
) -> dict[nn.Module, Callable]:
    """Forward hooks that make a unit's maps, in each of their places, what its kept channels make of them."""
    stay = torch.tensor(list(kept), device=next(network.parameters()).device)

    def hook(place: str):
        fit, offset = fitted(moments[place], stay, unit.width, intercept=True)

        def refit(module, inputs, maps: torch.Tensor) -> torch.Tensor:
            refitted = torch.einsum("ck,bk...->bc...", fit.to(maps.dtype), maps[:, stay])
            return refitted.add_(offset.to(maps.dtype).view(-1, *[1] * (maps.ndim - 2)))

        return refit

    return {network.get_submodule(place): hook(place) for place in unit.feature_maps}


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
    # On the CPU: thousands of small steps, each of which would start several kernels on a GPU and wait for them.
    residuals, weights = [m.covariance.cpu() for m in moments], [w.cpu() for w in weights]
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
