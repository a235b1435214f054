"""Distributed training: one rank decides, and the scores of all ranks count."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import distributed

Decision = TypeVar("Decision")


def decided_on_one_rank(decide: Callable[[], Decision]) -> Decision:
    """Call `decide` on rank 0 alone, and return its result on every rank.

    On different GPUs a tie, or rounding, may come out differently.
    """
    if number_of_ranks() == 1:
        return decide()
    decision = [decide() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(decision, src=0)
    return decision[0]


def summed_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place; without DDP it stays as it is."""
    if number_of_ranks() > 1:
        distributed.all_reduce(tensor)
    return tensor


def number_of_ranks() -> int:
    """1 without DDP, also where PyTorch was built without it."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
