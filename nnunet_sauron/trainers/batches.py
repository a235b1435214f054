"""Training batches that a method measures on, and that a merge is fitted on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer

if TYPE_CHECKING:
    from .pruning import PruningTrainer


def training_batches(trainer: PruningTrainer, count: int) -> list[torch.Tensor]:
    """Draw this number of training batches (B, channels, *patch); those that are not finite are left out."""
    batches = [next(trainer.dataloader_train)["data"] for _ in range(count)]
    finite = [batch for batch in batches if batch.isfinite().all()]
    if len(finite) < len(batches):
        trainer.print_to_log_file(
            f"WARNING: {len(batches) - len(finite)} of {len(batches)} batches hold values that are not finite, and "
            f"nothing is measured on them. Look for nan in the preprocessed images."
        )
    return finite


def training_losses(trainer: PruningTrainer, count: int) -> Iterator[torch.Tensor]:
    """Draw this number of training batches, and yield the loss of each, as `TrainingState.losses` describes it.

    Also of batches that are not finite: with DDP, nnU-Net's loss waits for the other ranks.
    """
    scale = trainer.grad_scaler.get_scale() if trainer.grad_scaler is not None else 1.0
    is_cuda = trainer.device.type == "cuda"
    for _ in range(count):
        batch = next(trainer.dataloader_train)
        data, target = batch["data"].to(trainer.device), batch["target"]
        target = [one.to(trainer.device) for one in target] if isinstance(target, list) else target.to(trainer.device)
        with torch.autocast("cuda") if is_cuda else nnUNetTrainer.dummy_context():  # as in nnU-Net's training step
            loss = trainer.loss(trainer.bare_network(data), target)
        yield loss * scale
