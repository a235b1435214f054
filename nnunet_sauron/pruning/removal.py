"""Take channels out of a live network and its optimiser.

Every tensor that counts the channels is replaced at once: new parameters on the same module objects (nnU-Net holds a
module under several names, so a replaced module would silently stay unused), the optimiser's groups point to them, and
its per-element state is cut by the same indices. `param.data` is never shrunk: a live graph would keep the old shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .channels import ChannelLayout, Segment, channel_layout


def remove_channels(
    network: nn.Module, keep: Mapping[str, Sequence[int]], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Keep only the given channels of the given units, in place.

    Gradients of cut parameters are dropped, so call it between training steps.

    Args:
        network: A network that `channel_layout` knows, unwrapped (no DDP, no torch.compile wrapper).
        keep: For each unit to cut, by name: its channels to keep, ascending. Units that are not named stay as they are.
        optimizer: Its parameter groups and its per-element state (momentum, Adam's moments) follow.

    Raises:
        ValueError: An unknown unit, an index out of range or repeated, or no channel left. Nothing is changed then.
    """
    layout = channel_layout(network)
    check_kept(layout, keep)
    rebuild(network, layout, {name: Selection(tuple(kept), len(kept)) for name, kept in keep.items()}, optimizer)


@dataclass(frozen=True)
class Selection:
    """A unit's new channels: first the old ones at `kept`, then zeros up to `width`."""

    kept: tuple[int, ...]
    width: int


def rebuild(
    network: nn.Module,
    layout: ChannelLayout,
    selections: Mapping[str, Selection],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Give each named unit the channels of its selection, everywhere and at once (in place)."""
    # Loading under inference_mode would otherwise leave parameters that can never be trained.
    with torch.inference_mode(False), torch.no_grad():
        changes: dict[tuple[str, str], list[tuple[int, tuple[Segment, ...]]]] = {}
        for axis in layout.axes:
            if any(name in selections for name, _ in axis.segments):
                changes.setdefault((axis.module, axis.tensor), []).append((axis.dim, axis.segments))

        replaced: dict[torch.Tensor, tuple[torch.Tensor, list]] = {}
        for (module_name, tensor_name), dims in changes.items():
            old = getattr(network.get_submodule(module_name), tensor_name)
            moves = [(dim, *_indices(segments, selections, old.device)) for dim, segments in dims]
            new = _moved(old, moves, fill=1.0 if tensor_name == "running_var" else 0.0)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            replaced[old] = (new, moves)
        _replace(network, replaced)

        for attribute in layout.attributes:
            if any(name in selections for name, _ in attribute.segments):
                _set_count(network, attribute, selections)
        if optimizer is not None:
            _follow(optimizer, replaced)


def check_kept(layout: ChannelLayout, keep: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless every unit is known, and its channels to keep are distinct, ascending, and not none."""
    widths = layout.widths
    for name, kept in keep.items():
        if name not in widths:
            raise ValueError(f"There is no channel unit '{name}'. Units: {', '.join(widths)}.")
        if len(kept) == 0:
            raise ValueError(f"Unit '{name}' would lose all of its {widths[name]} channels; keep at least one.")
        if sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= widths[name]:
            raise ValueError(
                f"The channels to keep of unit '{name}' must be distinct, ascending and in 0..{widths[name] - 1}; "
                f"got {list(kept)}."
            )


def _indices(
    segments: tuple[Segment, ...], selections: Mapping[str, Selection], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Old positions, their new positions, and the new length of one axis."""
    old, new, old_start, new_start = [], [], 0, 0
    for name, width in segments:
        selection = selections.get(name, Selection(tuple(range(width)), width))
        old += [old_start + i for i in selection.kept]
        new += range(new_start, new_start + len(selection.kept))
        old_start, new_start = old_start + width, new_start + selection.width
    return torch.tensor(old, device=device), torch.tensor(new, device=device), new_start


def _moved(tensor: torch.Tensor, moves: list[tuple[int, torch.Tensor, torch.Tensor, int]], fill: float = 0.0):
    tensor = tensor.detach()
    for dim, old, new, length in moves:
        tensor = tensor.index_select(dim, old)
        if length != len(new):
            shape = [*tensor.shape]
            shape[dim] = length
            tensor = torch.full(shape, fill, dtype=tensor.dtype, device=tensor.device).index_copy_(dim, new, tensor)
    return tensor


def _replace(network: nn.Module, replaced: Mapping[torch.Tensor, tuple[torch.Tensor, list]]) -> None:
    # By identity, wherever a tensor is held: SyncBatchNorm.convert_sync_batchnorm, which nnU-Net calls under DDP, makes
    # two modules of the one norm that a block holds under two names, around the same tensors.
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor in replaced:
                    held[name] = replaced[tensor][0]
                    if isinstance(module, _NormBase):
                        module.num_features = len(held[name])


def _set_count(network: nn.Module, attribute, selections: Mapping[str, Selection]) -> None:
    module = network.get_submodule(attribute.module)
    count = sum(selections[name].width if name in selections else width for name, width in attribute.segments)
    if attribute.index is not None:
        # A new list: nnU-Net's encoder holds the very list that stands in the plans.
        counts = list(getattr(module, attribute.attribute))
        counts[attribute.index] = count
        count = counts
    setattr(module, attribute.attribute, count)


def _follow(optimizer: torch.optim.Optimizer, replaced: Mapping[torch.Tensor, tuple[torch.Tensor, list]]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [replaced[p][0] if p in replaced else p for p in group["params"]]
    for old, (new, moves) in replaced.items():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {
                key: _moved(value, moves) if torch.is_tensor(value) and value.shape == old.shape else value
                for key, value in state.items()
            }
