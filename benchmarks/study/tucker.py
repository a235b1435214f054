"""Tucker-2: a convolution as three, from its channels to fewer, the kernel between those, and back; the rival.

Dexl et al. replace the convolutions of a trained nnU-Net (TotalSegmentator) in this way and train on (Radiology: AI
2025, 10.1148/ryai.240353; code: ClinicalDataScience/tucker-cnn). As there, ranks are one part of the channels for all
layers, and no less than a minimum; the input layer and the heads stay. Here the part follows from the
multiply-accumulates asked for, and transposed convolutions are factored as well: kept whole, they alone are much of a
tenth.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from nnunet_sauron.pruning import count_macs
from nnunet_sauron.pruning.loading import call_before_load

ITERATIONS = 10
STEPS = 8  # of the search: parts of a 256th of the channels
Ranks = Mapping[str, tuple[int, int]]


class LowRank(nn.Sequential):
    """A convolution's three factors, with weights of no meaning yet.

    Args:
        conv: The convolution, plain or transposed; left alone.
        ranks: Channels that its kernel reads and makes.
    """

    def __init__(self, conv: _ConvNd, ranks: tuple[int, int]):
        kind = type(conv)
        plain = {"1": nn.Conv1d, "2": nn.Conv2d, "3": nn.Conv3d}[kind.__name__[-2]]
        where = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        core = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        if isinstance(conv, _ConvTransposeNd):
            core["output_padding"] = conv.output_padding
        super().__init__(
            plain(conv.in_channels, ranks[0], 1, bias=False, **where),
            kind(*ranks, bias=False, **core, **where),
            plain(ranks[1], conv.out_channels, 1, bias=conv.bias is not None, **where),
        )


def tucker2(weight: torch.Tensor, ranks: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel nearest to a convolution's of these ranks, by HOSVD and then HOOI (De Lathauwer et al. 2000).

    Args:
        weight: (out, in, *kernel).
        ranks: Of the input and of the output channels.

    Returns:
        (rank in, in), (rank out, rank in, *kernel) and (out, rank out), in the weight's dtype: the first and the last
        have orthonormal rows and columns.
    """
    kernel = weight.double().flatten(2)
    first, last = _leading(kernel.transpose(0, 1), ranks[0]), _leading(kernel, ranks[1])
    for _ in range(ITERATIONS):
        last = _leading(torch.einsum("oik,ir->ork", kernel, first), ranks[1])
        first = _leading(torch.einsum("oik,or->irk", kernel, last), ranks[0])
    core = torch.einsum("oik,ir,os->srk", kernel, first, last)
    core = core.unflatten(2, weight.shape[2:])
    return tuple(factor.to(weight.dtype) for factor in (first.T.contiguous(), core, last))


def lower_ranks(network: nn.Module, ranks: Ranks, *, weights: bool = True) -> None:
    """Put three convolutions into the place of each that is named, wherever nnU-Net's network holds it.

    Args:
        network: Unwrapped; changed in place.
        ranks: By the convolution's name.
        weights: Factor its weights; False leaves those that follow without meaning.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, of_layer in ranks.items():
        conv = network.get_submodule(name)
        made[conv] = LowRank(conv, of_layer)
        if weights:
            _factor(conv, made[conv], of_layer)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if child in made:
                setattr(parent, name, made[child])


def ranks_in(network: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """The ranks of those convolutions of a network that are three in a state dict."""
    found = {}
    for name, module in network.named_modules():
        factors = [state_dict.get(f"{name}.{i}.weight") for i in (0, 2)]
        if isinstance(module, _ConvNd) and all(factor is not None for factor in factors):
            found[name] = factors[0].shape[0], factors[1].shape[1]
    return found


def ranks_for(
    network: nn.Module, target_macs: float, patch_size: Sequence[int], input_channels: int, min_rank: int
) -> dict[str, tuple[int, int]]:
    """The largest ranks, one part of the channels in all layers, that leave a part of the multiply-accumulates.

    Args:
        network: Unwrapped.
        target_macs: The part that may stay, in (0, 1).
        patch_size, input_channels: Of one patch.
        min_rank: No rank is below it, where a layer has that many channels.

    Raises:
        ValueError: So few multiply-accumulates cannot be reached.
    """
    meta = copy.deepcopy(network).to("meta")
    dense = count_macs(meta, patch_size, input_channels)

    def left(part: float) -> float:
        tried = copy.deepcopy(meta)
        lower_ranks(tried, _ranks_at(meta, part, min_rank), weights=False)
        return count_macs(tried, patch_size, input_channels) / dense

    low, high = 0.0, 1.0
    if left(low) > target_macs:
        raise ValueError(
            f"target_macs={target_macs:g} cannot be met: with min_rank={min_rank}, {left(low):.4f} is the least. "
            f"Choose a larger target, or a smaller min_rank."
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) <= target_macs else (low, middle)
    return _ranks_at(network, low, min_rank)


def accept_low_ranks(network: nn.Module) -> nn.Module:
    """Make `network.load_state_dict` take the ranks of what it is given; the same network."""
    # Not on the network itself: this package's own hook, which is there, must see a network that it knows.
    for part in network.children():
        call_before_load(part, _lower_before_load)
    return network


def _lower_before_load(part: nn.Module, state_dict, prefix, *_) -> None:
    own = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    lower_ranks(part, ranks_in(part, own), weights=False)


def _layers(network: nn.Module) -> Iterator[tuple[str, _ConvNd]]:
    """The convolutions that can be factored: those with a kernel, but for the one that reads the image."""
    first = True
    for name, module in network.named_modules():
        if isinstance(module, _ConvNd):
            if not first and math.prod(module.kernel_size) > 1 and module.groups == 1:
                yield name, module
            first = False


def _ranks_at(network: nn.Module, part: float, min_rank: int) -> dict[str, tuple[int, int]]:
    found = {}
    for name, conv in _layers(network):
        voxels, made, read = math.prod(conv.kernel_size), conv.out_channels, conv.in_channels
        rank_in, rank_out = (min(width, max(min_rank, math.ceil(part * width))) for width in (read, made))
        rank_in, rank_out = min(rank_in, rank_out * voxels), min(rank_out, rank_in * voxels)
        if read * rank_in + rank_in * rank_out * voxels + rank_out * made < read * made * voxels:
            found[name] = rank_in, rank_out
    return found


def _leading(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading left singular vectors of a tensor unfolded along its first axis, (size, rank)."""
    return torch.linalg.svd(tensor.flatten(1), full_matrices=False).U[:, :rank]


@torch.no_grad()
def _factor(conv: _ConvNd, factors: LowRank, ranks: tuple[int, int]) -> None:
    transposed = isinstance(conv, _ConvTransposeNd)
    weight = conv.weight.transpose(0, 1) if transposed else conv.weight
    first, core, last = tucker2(weight, ranks)
    for module, value in zip(factors, (first, core.transpose(0, 1) if transposed else core, last), strict=True):
        module.weight.copy_(value.view_as(module.weight) if value.ndim == 2 else value)
    if conv.bias is not None:
        factors[2].bias.copy_(conv.bias)
