"""A compressed model trained on, at its own widths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..pruning import widths_of
from .checkpoints import read_checkpoint
from .plots import NowAndThen
from .resizing import ResizingTrainer
from .settings import TrainingSettings, read_settings
from .snapshots import Snapshots, SnapshotSettings

NUM_EPOCHS = 50
INITIAL_LR = 1e-3  # a tenth of nnU-Net's
MIRRORING = "inference_allowed_mirroring_axes"


@dataclass(frozen=True, kw_only=True)
class CompressedSettings:
    """Where to begin.

    Attributes:
        start_from: The folder that `nnUNetv2_sauron compress` wrote (the same fold is taken), or a .pth file; None
            only to continue or to predict.
    """

    start_from: str | None = None


class CompressedTrainer(ResizingTrainer):
    """nnU-Net's training from a compressed checkpoint: 50 epochs of the poly schedule from a tenth of its rate.

    It mirrors the axes that the model was trained with, since left and right may be classes. Loss and the rest of the
    augmentation are nnU-Net's own, whatever that model's trainer did.

    nnunet_sauron="start_from=MODEL_FOLDER" nnUNetv2_train DATASET CONFIGURATION FOLD -tr CompressedTrainer

    Raises:
        FileNotFoundError, ValueError: The checkpoint is missing, cannot be read, or is of another architecture.
    """

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        training, settings, snapshot_settings = read_settings(
            type(self), TrainingSettings, CompressedSettings, SnapshotSettings
        )
        self._start = settings.start_from and read_checkpoint(_checkpoint(Path(settings.start_from), fold))
        self._start_name = settings.start_from
        self._mirroring = _mirroring(self._start or {})
        self._no_training: str | None = None
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.initial_lr = NUM_EPOCHS, INITIAL_LR
        training.apply_to(self)
        self.logger.plot_progress_png = NowAndThen(self, self.logger.plot_progress_png)
        self._snapshots = Snapshots(self, snapshot_settings)

    def initialize(self) -> None:
        super().initialize()
        if self._start:
            self.take_widths(self._widths(self._start, self._start_name))
            self.bare_network.load_state_dict(self._start["network_weights"])
            self._start = None  # its memory

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):  # noqa: N802  (nnU-Net's)
        *others, mirror_axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self._mirroring:
            self.inference_allowed_mirroring_axes = mirror_axes = self._mirroring[MIRRORING]
        return *others, mirror_axes

    def on_train_start(self) -> None:
        if self._no_training:
            raise ValueError(
                f"{self._no_training} was written by compress and is no training to continue. Move it away, or train "
                f"without --c and with start_from naming another folder than the training's own."
            )
        if not self._start_name and self.current_epoch == 0:
            raise ValueError(
                "CompressedTrainer has nothing to start from. Name the folder that compress wrote: "
                'nnunet_sauron="start_from=MODEL_FOLDER" nnUNetv2_train ... -tr CompressedTrainer'
            )
        super().on_train_start()
        if self._start_name and self.current_epoch == 0:
            self.print_to_log_file(f"{type(self).__name__}: started from {self._start_name}")
        self._snapshots.start()

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        self._snapshots.after_epoch()

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        if not self.was_initialized:
            self.initialize()
        checkpoint = read_checkpoint(filename_or_checkpoint)
        self.take_widths(self._widths(checkpoint, filename_or_checkpoint))
        self._mirroring = _mirroring(checkpoint)
        if "optimizer_state" in checkpoint:
            super().load_checkpoint(filename_or_checkpoint)
        else:  # written by compress: to be validated (--val)
            self._no_training = filename_or_checkpoint
            self.bare_network.load_state_dict(checkpoint["network_weights"])
            self.inference_allowed_mirroring_axes = self._mirroring.get(MIRRORING)

    def _widths(self, checkpoint: dict, name: str) -> dict[str, int]:
        widths = widths_of(self.bare_network, checkpoint["network_weights"])
        if widths is None:
            raise ValueError(
                f"{name} is of another architecture than these plans: only the numbers of channels may differ. "
                f"Train with the configuration and the plans (-p) of the model that was compressed."
            )
        return widths


def _mirroring(checkpoint: dict) -> dict:
    return {key: value for key, value in checkpoint.items() if key == MIRRORING}


def _checkpoint(start: Path, fold: int | str) -> Path:
    return start / f"fold_{fold}" / "checkpoint_final.pth" if start.is_dir() else start
