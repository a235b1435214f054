"""Training batches that a method measures on, and that a merge is fitted on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..pruning.eval_mode import mixed_precision

if TYPE_CHECKING:
    from .pruning import PruningTrainer


def training_batches(trainer: PruningTrainer, count: int) -> Iterator[torch.Tensor]:
    """Draw this number of training batches (B, channels, *patch), one after another, without those that are not finite.

    Many may be asked for: they are not held in memory together.
    """
    left_out = 0
    for _ in range(count):
        batch = next(trainer.dataloader_train)["data"]
        if batch.isfinite().all():
            yield batch
        else:
            left_out += 1
    if left_out:
        trainer.print_to_log_file(
            f"WARNING: {left_out} of {count} batches hold values that are not finite, and nothing is measured on them. "
            f"Look for nan in the preprocessed images."
        )


def training_losses(trainer: PruningTrainer, count: int) -> Iterator[torch.Tensor]:
    """Draw this number of training batches, and yield the loss of each, as `TrainingState.losses` describes it.

    Also of batches that are not finite: with DDP, nnU-Net's loss waits for the other ranks. Nothing of a batch is held
    when the next one is drawn.
    """
    # Half of the scale of the next step, which the scaler may just have doubled: if it is too large, no batch counts.
    scale = trainer.grad_scaler.get_scale() / 2 if trainer.grad_scaler is not None else 1.0
    for _ in range(count):
        yield _loss(trainer, next(trainer.dataloader_train)) * scale


def _loss(trainer: PruningTrainer, batch: dict) -> torch.Tensor:
    """As nnU-Net's training step computes it."""
    data, target = batch["data"].to(trainer.device), batch["target"]
    target = [one.to(trainer.device) for one in target] if isinstance(target, list) else target.to(trainer.device)
    with mixed_precision(trainer.device):
        return trainer.loss(trainer.bare_network(data), target)
