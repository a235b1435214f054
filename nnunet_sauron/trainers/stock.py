"""nnU-Net's own trainer, with a length that can be set: the baseline of a comparison at equal length."""

from __future__ import annotations

import torch

from ..model.checkpoints import read_checkpoint
from ..model.compiling import CompilesOnCudaOnly
from ..model.snapshots import Snapshots, SnapshotSettings
from .kept_settings import KeepsSettings
from .resizing import ResizingTrainer
from .settings import Given, TrainingSettings
from .throttled import Throttled


class StockTrainer(KeepsSettings, CompilesOnCudaOnly):
    """nnUNetTrainer; only its own numbers follow the settings (`num_epochs`, ...), nothing else is changed."""

    bare_network = ResizingTrainer.bare_network

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        self._given = Given(type(self), *self.settings_classes())
        settings, snapshot_settings = self._given.settings()
        self._more_settings = []
        super().__init__(plans, configuration, fold, dataset_json, device)
        settings.apply_to(self)
        self.logger.plot_progress_png = Throttled(self, self.logger.plot_progress_png)
        self._snapshots = Snapshots(self, snapshot_settings)
        self.kept_settings()

    @classmethod
    def settings_classes(cls) -> tuple[type, ...]:
        """The dataclasses of all its settings."""
        return TrainingSettings, SnapshotSettings

    def on_train_start(self) -> None:
        super().on_train_start()
        self._snapshots.start()

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        self._continue_with(read_checkpoint(filename_or_checkpoint))
        super().load_checkpoint(filename_or_checkpoint)
        self._fill_up()
