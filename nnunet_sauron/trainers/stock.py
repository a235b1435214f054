"""nnU-Net's own trainer, with a length that can be set: the baseline of a comparison at equal length."""

from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from .plots import NowAndThen
from .settings import TrainingSettings, read_settings


class StockTrainer(nnUNetTrainer):
    """nnUNetTrainer; only its own numbers follow the settings (`num_epochs`, ...), nothing else is changed."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        (settings,) = read_settings(type(self), TrainingSettings)
        super().__init__(plans, configuration, fold, dataset_json, device)
        settings.apply_to(self)
        self.logger.plot_progress_png = NowAndThen(self, self.logger.plot_progress_png)
