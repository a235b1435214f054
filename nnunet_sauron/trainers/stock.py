"""nnU-Net's own trainer, with a length that can be set: the baseline of a comparison at equal length."""

from __future__ import annotations

from ..model.checkpoints import read_checkpoint
from .base import BaseTrainer


class StockTrainer(BaseTrainer):
    """nnUNetTrainer; only its own numbers follow the settings (`num_epochs`, ...), nothing else is changed."""

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        self._continue_with(read_checkpoint(filename_or_checkpoint))
        super().load_checkpoint(filename_or_checkpoint)
