"""Distributed training: one rank decides, and all of them count."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import distributed

Decision = TypeVar("Decision")


def decided_on_one_rank(decide: Callable[[], Decision]) -> Decision:
    """What `decide` returns on rank 0, on every rank: on unlike cards a tie or a rounding may fall either way."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return decide()
    decision = [decide() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(decision, src=0)
    return decision[0]


def summed_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Add up a tensor over all ranks, in place; itself without DDP."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor
