"""nnU-Net's own trainer, with a length that can be set: the baseline of a comparison at equal length."""

from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from .plots import NowAndThen
from .resizing import ResizingTrainer
from .settings import TrainingSettings, read_settings
from .snapshots import Snapshots, SnapshotSettings


class StockTrainer(nnUNetTrainer):
    """nnUNetTrainer; only its own numbers follow the settings (`num_epochs`, ...), nothing else is changed."""

    bare_network = ResizingTrainer.bare_network

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        settings, snapshot_settings = read_settings(type(self), TrainingSettings, SnapshotSettings)
        super().__init__(plans, configuration, fold, dataset_json, device)
        settings.apply_to(self)
        self.logger.plot_progress_png = NowAndThen(self, self.logger.plot_progress_png)
        self._snapshots = Snapshots(self, snapshot_settings)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._snapshots.start()

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        self._snapshots.after_epoch()
