"""A network in evaluation mode for a while, or copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(network: nn.Module, hooks: Mapping[nn.Module, Callable] | None = None) -> Iterator[None]:
    """Evaluation mode and exact float32, with forward hooks by module, as long as it lasts; also after an error.

    Each module gets back its own mode: a norm may be frozen. TensorFloat-32, PyTorch's default for convolutions on
    CUDA, rounds to three digits, where fits and rankings tell channels apart by far less.
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


def copy_network(network: nn.Module) -> nn.Module:
    """A copy with the network's very hooks: a trainer that one belongs to would be copied with its data loaders."""
    kept = {}
    for module in network.modules():
        for name, hooks in vars(module).items():
            if name.endswith("_hooks"):
                for hook in hooks.values():
                    # PyTorch wraps those of the state dict together with their module, and that is to be the copy.
                    hook = getattr(hook, "hook", hook)
                    kept[id(hook)] = hook
    return copy.deepcopy(network, kept)
