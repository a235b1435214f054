"""Run a network in evaluation mode for a while, or copy it, without a trace in it; and with which precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def eval_mode(network: nn.Module, hooks: Mapping[nn.Module, Callable] | None = None) -> Iterator[None]:
    """A context with the network in evaluation mode, in exact float32, and with these forward hooks by module.

    Each module gets back its own mode, also after an error: a norm may be frozen. TensorFloat-32, PyTorch's default for
    convolutions on CUDA, rounds to three digits; fits and rankings need more.
    """
    modes = {module: module.training for module in network.modules()}
    handles = [module.register_forward_hook(hook) for module, hook in (hooks or {}).items()]
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        network.eval()
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """nnU-Net's rule: autocast on CUDA alone."""
    return torch.autocast("cuda") if device.type == "cuda" else nullcontext()


def copy_network(network: nn.Module) -> nn.Module:
    """A copy that shares the network's hooks: a hook's trainer would else be copied with its data loaders."""
    kept = {}
    for module in network.modules():
        for name, hooks in vars(module).items():
            if name.endswith("_hooks"):
                for hook in hooks.values():
                    # PyTorch wraps hooks of the state dict with their module, which must be the copy's own.
                    hook = getattr(hook, "hook", hook)
                    kept[id(hook)] = hook
    return copy.deepcopy(network, kept)
