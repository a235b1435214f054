"""A network as an ONNX file: one output, and norms that every engine computes alike."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import itertools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

OPSET = 17
SUMMED_AT_ONCE = 64
_POOL = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


class SteadyInstanceNorm(nn.Module):
    """Instance norm whose sums are taken in small groups, so that all engines compute the same.

    Engines add up a channel's voxels one after the other. Where a tile is constant but for its border, as padded and
    masked images have them, each addition is rounded the same way, and the norm divides what that leaves by a small
    standard deviation.

    Args:
        norm: Whose weights and eps it takes.
    """

    def __init__(self, norm: _InstanceNorm):
        super().__init__()
        self.eps = norm.eps
        shape = (1, -1, *[1] * (norm._get_no_batch_dim() - 1))
        weight, bias = norm.weight, norm.bias
        if weight is None:
            weight, bias = torch.ones(norm.num_features), torch.zeros(norm.num_features)
        # In this shape from the start: PyTorch loses equal constants that it folds while it exports.
        self.weight, self.bias = (nn.Parameter(tensor.detach().reshape(shape)) for tensor in (weight, bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, channels, *voxels) of a fixed size to the same shape."""
        centred = x - steady_mean(x)
        rest = steady_mean(centred)  # what rounding left of the mean; of a constant map, all of it
        scale = self.weight * torch.rsqrt(steady_mean(centred * centred) - rest * rest + self.eps)
        return centred * scale + (self.bias - rest * scale)


def steady_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean over all voxels, (N, channels, 1, ...): of the means of boxes of at most `SUMMED_AT_ONCE` voxels."""
    sizes = [int(side) for side in x.shape[2:]]
    while math.prod(sizes) > SUMMED_AT_ONCE:
        box = _box(sizes)
        x = _POOL[len(sizes)](x, box, box)
        sizes = [side // length for side, length in zip(sizes, box, strict=True)]
    return x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)


def _box(sizes: Sequence[int]) -> list[int]:
    """Sides that divide an image's, for a box of not many more than `SUMMED_AT_ONCE` voxels and at least two."""
    box = [1] * len(sizes)
    for axis in reversed(range(len(sizes))):  # the last one lies together in memory
        room = SUMMED_AT_ONCE // math.prod(box)
        box[axis] = max(length for length in range(1, max(1, room) + 1) if sizes[axis] % length == 0)
    if math.prod(box) == 1:  # all sides are primes
        axis = max(range(len(sizes)), key=lambda axis: sizes[axis])
        box[axis] = sizes[axis]
    return box


def write_network(network: nn.Module, input_channels: int, patch_size: Sequence[int], path: Path) -> None:
    """Write an ONNX file: `image` (N, input_channels, *patch_size) to `logits` (N, outputs, *patch_size), float32.

    Args:
        network: In evaluation mode, without deep supervision; it is left as it is.
        input_channels: Of its input.
        patch_size: The only size that it will take.
        path: The file to write.

    Raises:
        ValueError: PyTorch cannot export it; what it cannot is named.
        OSError: The file could not be written.
    """
    network = with_steady_norms(without_idle_biases(network))
    example = torch.zeros(2, input_channels, *patch_size)
    # Traced rather than captured as a graph: a second instead of twenty, and PyTorch has had it since long.
    traced = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (example,),
                str(path),
                input_names=["image"],
                output_names=["logits"],
                dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
                opset_version=OPSET,
                **traced,
            )
        _give_each_its_own(path)
    except OSError:  # of the file, not of the network
        raise
    except Exception as error:  # torch.onnx has a class for each kind of what it cannot do
        raise ValueError(
            f"PyTorch cannot write this network as ONNX: {type(error).__name__}: {str(error)[:500]}"
        ) from error


def without_idle_biases(network: nn.Module) -> nn.Module:
    """A copy without the biases that the next instance norm takes back.

    It is the same function, but on an all-zero patch such a bias leaves rounding noise, which norm after norm
    multiplies by up to 1 / sqrt(eps) where their own biases are zero, as in a network that was hardly trained.
    """
    network = copy.deepcopy(network)
    for sequence in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        computing = [module for module in sequence if not isinstance(module, (_DropoutNd, nn.Identity))]
        for one, following in itertools.pairwise(computing):
            if isinstance(one, _ConvNd) and isinstance(following, _InstanceNorm) and not following.track_running_stats:
                one.bias = None
    return network


def _give_each_its_own(path: Path) -> None:
    """PyTorch lets equal weights share one constant, which ONNX Runtime 1.32 loses when it optimises the graph."""
    import onnx

    model = onnx.load(path)
    constants = {constant.name: constant for constant in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type == "Identity" and node.input[0] in constants:
            own = model.graph.initializer.add()
            own.CopyFrom(constants[node.input[0]])
            own.name = node.output[0]
            model.graph.node.remove(node)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def with_steady_norms(network: nn.Module) -> nn.Module:
    """A copy whose instance norms are `SteadyInstanceNorm`s, but for those with running statistics."""
    network = copy.deepcopy(network)
    steady: dict[nn.Module, nn.Module] = {}
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _InstanceNorm) and not child.track_running_stats:
                # nnU-Net has several names for one module, and each is in use somewhere.
                setattr(module, name, steady.setdefault(child, SteadyInstanceNorm(child)))
    return network
