"""A network looked at, and left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(network: nn.Module, hooks: Mapping[nn.Module, Callable] | None = None) -> Iterator[None]:
    """Evaluation mode, with forward hooks by module, as long as it lasts; also after an error."""
    was_training = network.training
    handles = [module.register_forward_hook(hook) for module, hook in (hooks or {}).items()]
    try:
        network.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        network.train(was_training)
