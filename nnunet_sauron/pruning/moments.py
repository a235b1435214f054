"""Second moments of feature maps, from which channels are fitted by least squares, and weights of their positions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from .eval_mode import eval_mode

VALUES_AT_ONCE = 1 << 22  # float64 copies of whole maps would need gigabytes
SAMPLES_PER_CHANNEL = 4  # positions for each channel of a layer, so that a fit does not overfit
LEAST_SAMPLES_PER_CHANNEL = 2
UNSURE = 0.7  # share of `position_weights` that follows the network's uncertainty; the rest is the same everywhere


class Moments:
    """Weighted sums over the positions of feature maps, in float64, from which channels are fitted by least squares.

    Attributes:
        count: Sum of the positions' weights so far, over all samples.
        total: Sums, (C,).
        products: Sums of products, (C, C).
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.products = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, feature_maps: torch.Tensor, weights: torch.Tensor | None = None, *more: torch.Tensor) -> None:
        """Add feature maps (B, C, *spatial) of any floating dtype; weights of the positions, (B, *spatial).

        The channels of `more` maps follow, without a copy as large as all maps together.
        """
        if weights is None:
            weights = feature_maps.new_ones(()).expand(len(feature_maps), *feature_maps.shape[2:])
        samples = max(1, VALUES_AT_ONCE // (len(self.total) * feature_maps[0, 0].numel()))
        step = max(1, VALUES_AT_ONCE // len(self.total))
        by_samples = (tensor.detach().flatten(2).split(samples) for tensor in (feature_maps, *more))
        for *maps, counts in zip(*by_samples, weights.split(samples), strict=True):
            parts = (some.transpose(0, 1).flatten(1).split(step, 1) for some in maps)  # (C, positions)
            for *part, count in zip(*parts, counts.flatten().split(step), strict=True):
                part, count = torch.cat(part).double(), count.double()
                weighted = part * count
                self.count += count.sum()
                self.total += weighted.sum(1)
                self.products += weighted @ part.T

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
        """Mean of products, without subtracting the means, (C, C)."""
        return self.products / self.count


def collect_moments(
    network: nn.Module,
    places: Collection[str],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None = None,
    before: nn.Module | None = None,
) -> dict[str, Moments]:
    """Second moments of the outputs of the named modules, in evaluation mode.

    The forward stops after the last of them. Memory: one input's forward and a (C, C) matrix per module; with a second
    network, its outputs as well.

    Args:
        network: The network.
        places: Names of modules; each is run once in a forward.
        inputs: Tensors (B, channels, *patch), on any device.
        weights: Of their positions, (B, *patch) each, averaged to the resolution of the maps; None for equal weights.
        before: Another network with modules of these names: its maps are channels C to 2C - 1 of (2C, 2C) moments.

    Raises:
        ValueError: There are no inputs, or the weights are not of their shapes.
    """
    check_inputs(inputs, weights)
    device = next(network.parameters()).device
    moments: dict[str, Moments] = {}
    for index, tensor in enumerate(inputs):
        counts = None if weights is None else weights[index].to(device)
        maps_before: dict[str, torch.Tensor] = {}
        if before is not None:
            forward_until(before, tensor.to(device), places, maps_before.__setitem__)

        def take(name: str, maps: torch.Tensor, counts=counts, maps_before=maps_before) -> None:
            more = [maps_before.pop(name)] if name in maps_before else []
            if name not in moments:
                moments[name] = Moments(maps.shape[1] + sum(other.shape[1] for other in more), maps.device)
            moments[name].add(maps, counts if counts is None else averaged(counts, maps), *more)

        forward_until(network, tensor.to(device), places, take)
    return moments


def check_inputs(inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor] | None = None) -> None:
    """Raise ValueError unless there are inputs (B, channels, *patch), and weights (B, *patch) for each or for none."""
    if not inputs:
        raise ValueError("There are no inputs to measure feature maps on; give at least one batch.")
    if weights is not None:
        shapes, expected = ([tuple(w.shape) for w in weights], [(len(x), *x.shape[2:]) for x in inputs])
        if shapes != expected:
            raise ValueError(
                f"Weights of positions have the shapes {shapes}; for these inputs they must be {expected}, "
                f"(B, *patch) each."
            )


def averaged(weights: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Weights of positions (B, *patch) at the resolution of maps (B, C, *spatial): (B, *spatial)."""
    pool = functional.adaptive_avg_pool2d if maps.ndim == 4 else functional.adaptive_avg_pool3d
    return pool(weights[:, None], tuple(maps.shape[2:]))[:, 0]


class _Reached(Exception):  # noqa: N818  (no error)
    """Ends a forward once the last module of interest has run."""


@torch.no_grad()
def forward_until(
    network: nn.Module, tensor: torch.Tensor, places: Collection[str], take: Callable[[str, torch.Tensor], None]
) -> None:
    """A forward in evaluation mode that ends after the last of the named modules; `take` gets each one's output."""
    left = set(places)

    def observe(name: str):
        def hook(module, inputs, output) -> None:
            take(name, output)
            left.discard(name)
            if not left:
                raise _Reached

        return hook

    with contextlib.suppress(_Reached), eval_mode(network, {network.get_submodule(n): observe(n) for n in places}):
        network(tensor)


def patches_needed(positions: Mapping[str, int], widths: Mapping[str, int], samples_per_channel: int) -> int:
    """The number of patches that gives every unit this number of positions per channel.

    Args:
        positions: Of every unit's feature maps in one patch, as `feature_map_voxels` counts them.
        widths: Its channels.
        samples_per_channel: `SAMPLES_PER_CHANNEL` for a good fit, `LEAST_SAMPLES_PER_CHANNEL` for a stable one.
    """
    return max(-(-samples_per_channel * widths[name] // n) for name, n in positions.items())


@torch.no_grad()
def position_weights(
    network: nn.Module, inputs: Sequence[torch.Tensor], *, regions: bool = False, unsure: float = UNSURE
) -> list[torch.Tensor]:
    """The weight of each position in a fit: higher where the network is unsure.

    Most of an image is background whose segmentation no error of a feature map changes; with equal weights, a fit would
    spend its channels there. The second-order term of the divergence between old and new probabilities weights a
    logit's squared error by `sum_k p_k (1 - p_k)`. Its square root, the standard deviation of the label, mixed with a
    constant, since a layer's positions affect more than one voxel, kept the segmentations best (benchmarks/results).

    Args:
        network: A segmentation network, run in evaluation mode; of several outputs the first is taken.
        inputs: Tensors (B, channels, *patch).
        regions: Whether classes may overlap (sigmoid instead of softmax).
        unsure: The share of the weights that follows the network's uncertainty; the rest is the same everywhere.

    Returns:
        (B, *patch) each, float32, on the network's device; their mean over all inputs is 1.

    Raises:
        ValueError: There are no inputs.
    """
    check_inputs(inputs)
    found = []
    for tensor in inputs:
        output = Output.of(network, tensor)
        spread = [(p * (1 - p)).sum(1).sqrt() for p in (part.exp_() for part in output.log_probabilities(regions))]
        found.append(torch.cat(spread, 1).view(len(tensor), *tensor.shape[2:]))
        del output
    mean = sum(one.double().sum() for one in found) / sum(one.numel() for one in found)
    if not mean > 0:
        return [torch.ones_like(one) for one in found]
    return [unsure * one / mean.float() + (1 - unsure) for one in found]


@dataclass(frozen=True)
class Output:
    """A network's output for an input, given for some of the positions at a time.

    With many classes, the probabilities of all positions would need several times the memory of a prediction. nnU-Net's
    last layer is a convolution of one voxel: its input is kept, and the layer is applied to one part after another.

    Attributes:
        maps: (B, C, positions): the last layer's input, or the logits where the network ends in another layer.
        head: The last layer's weights (classes, C) and bias (classes); None where `maps` are the logits.
    """

    maps: torch.Tensor
    head: tuple[torch.Tensor, torch.Tensor | None] | None

    @classmethod
    @torch.no_grad()
    def of(cls, network: nn.Module, tensor: torch.Tensor, hooks: Mapping[nn.Module, Callable] | None = None) -> Output:
        """Run a network in evaluation mode; of several outputs the first is taken.

        Args:
            network: A segmentation network.
            tensor: (B, channels, *patch).
            hooks: Forward hooks by module.
        """
        tensor = tensor.to(next(network.parameters()).device)
        last = _last_layer(network)
        read: list[torch.Tensor] = []

        def stop(module, inputs) -> None:
            read.append(inputs[0])
            raise _Reached

        with eval_mode(network, hooks):
            if last is None:
                output = network(tensor)
                output = output[0] if isinstance(output, (list, tuple)) else output
                return cls(output.flatten(2), None)
            handle = last.register_forward_pre_hook(stop)
            try:
                with contextlib.suppress(_Reached):
                    network(tensor)
            finally:
                handle.remove()
        bias = None if last.bias is None else last.bias.float()[:, None]
        return cls(read[0].flatten(2), (last.weight.flatten(1).float(), bias))

    def log_probabilities(self, regions: bool) -> Iterator[torch.Tensor]:
        """(B, classes, some of the positions), float32; of regions (B, 2 * regions, ...): inside, then outside."""
        classes = self.maps.shape[1] if self.head is None else len(self.head[0])
        for part in self.maps.split(max(1, VALUES_AT_ONCE // (len(self.maps) * classes)), 2):
            logits = part.float()
            if self.head is not None:
                weight, bias = self.head
                logits = weight @ logits if bias is None else weight @ logits + bias
            if regions:
                yield functional.logsigmoid(torch.cat([logits, -logits], 1))
            else:
                yield logits.log_softmax(1)


def _last_layer(network: nn.Module) -> nn.Module | None:
    """nnU-Net's head of the highest resolution, if it is a convolution of one voxel; else None."""
    heads = getattr(getattr(network, "decoder", None), "seg_layers", None)
    last = heads[-1] if heads else None
    if not isinstance(last, _ConvNd) or last.groups != 1:
        return None
    of_one_voxel = {*last.kernel_size, *last.stride} == {1} and {*last.padding} == {0}
    return last if of_one_voxel else None
