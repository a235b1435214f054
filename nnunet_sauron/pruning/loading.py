"""Let a network take the widths of the checkpoint it is given, and make a pruned network dense again.

nnU-Net builds the dense network from the plans and then calls `load_state_dict`; in prediction once per fold and case,
into one network, and the folds of a pruned model differ in their widths. A load pre-hook resizes the network, up or
down, in channel dimensions only. Anything else stays PyTorch's own error about shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .channels import channel_layout
from .removal import Selection, rebuild


def accept_pruned_weights(network: nn.Module) -> nn.Module:
    """Make `network.load_state_dict` resize the network to the widths of what it is given.

    Args:
        network: A network that `channel_layout` knows.

    Returns:
        The same network.

    Raises:
        ValueError: The network's class is unknown.
    """
    channel_layout(network)  # refuses what it does not know, here and not at the first load
    call_before_load(network, _resize_before_load)
    return network


def call_before_load(module: nn.Module, hook: Callable) -> None:
    """`module.register_load_state_dict_pre_hook(hook)`, which came with PyTorch 2.5."""
    if hasattr(module, "register_load_state_dict_pre_hook"):
        module.register_load_state_dict_pre_hook(hook)
    else:
        module._register_load_state_dict_pre_hook(hook, with_module=True)


def accepts_pruned_weights(network: nn.Module) -> bool:
    """Whether `accept_pruned_weights` was called for a network."""
    hooks = network._load_state_dict_pre_hooks.values()
    return any(getattr(hook, "hook", hook) is _resize_before_load for hook in hooks)


def widths_of(network: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, int] | None:
    """Channels of each unit in a state dict of the same topology.

    Args:
        network: A network of the same plans, of any widths.
        state_dict: The weights.
        prefix: What stands before the network's own names in it.

    Returns:
        Widths by unit name, or None when the state dict differs from the network in more than channel counts.
    """
    layout = channel_layout(network)
    widths: dict[str, int] = {}
    producers = {name: unit.name for unit in layout.units for name in unit.producers}
    for axis in layout.axes:
        # One segment alone tells its width; concatenations are checked below.
        key = f"{prefix}{axis.module}.{axis.tensor}"
        if axis.module in producers and axis.tensor == "weight" and axis.segments[0][0] == producers[axis.module]:
            tensor = state_dict.get(key)
            if len(axis.segments) == 1 and tensor is not None and tensor.ndim > axis.dim:
                widths.setdefault(producers[axis.module], tensor.shape[axis.dim])
    if len(widths) != len(layout.units):
        return None

    expected = {}
    for axis in layout.axes:
        key = f"{prefix}{axis.module}.{axis.tensor}"
        shape = expected.setdefault(key, [*getattr(network.get_submodule(axis.module), axis.tensor).shape])
        shape[axis.dim] = sum(widths.get(name, width) for name, width in axis.segments)
    if any(key not in state_dict or [*state_dict[key].shape] != shape for key, shape in expected.items()):
        return None
    return widths


def resize(network: nn.Module, widths: Mapping[str, int]) -> None:
    """Give units new widths in place: the first channels stay, new ones are zero everywhere and add nothing.

    Args:
        network: A network that `channel_layout` knows, unwrapped.
        widths: New number of channels by unit name.

    Raises:
        ValueError: An unknown unit, or a width below 1.
    """
    layout = channel_layout(network)
    unknown = [name for name in widths if name not in layout.widths]
    if unknown:
        raise ValueError(f"There is no channel unit '{unknown[0]}'. Units: {', '.join(layout.widths)}.")
    for name, width in widths.items():
        if width < 1:
            raise ValueError(f"Unit '{name}' needs at least one channel, got {width}.")
    selections = {
        name: Selection(tuple(range(min(width, layout.widths[name]))), width)
        for name, width in widths.items()
        if width != layout.widths[name]
    }
    if selections:
        rebuild(network, layout, selections)


def densify(network: nn.Module, widths: Mapping[str, int]) -> nn.Module:
    """Write a pruned network back at larger widths, with zeros; its output stays the same.

    The zero channels have zero weights on both sides and receive no gradient: training goes on as if they were not
    there. A norm's new running variance is one.

    Args:
        network: The pruned network, changed in place.
        widths: Channels of every unit of the dense network, for example `channel_layout(dense).widths`.

    Returns:
        The same network.

    Raises:
        ValueError: The units are not the same, or one would have to shrink.
    """
    now = channel_layout(network).widths
    if set(now) != set(widths):
        missing, unknown = sorted(set(now) - set(widths)), sorted(set(widths) - set(now))
        raise ValueError(f"These are the widths of another topology: units missing {missing}, unknown {unknown}.")
    for name, width in widths.items():
        if width < now[name]:
            raise ValueError(f"Unit '{name}' has {now[name]} channels, more than the {width} to write it back at.")
    resize(network, widths)
    return network


def _resize_before_load(network: nn.Module, state_dict, prefix, *_) -> None:
    widths = widths_of(network, state_dict, prefix)
    if widths is not None:
        resize(network, widths)
