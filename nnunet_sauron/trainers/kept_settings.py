"""Settings that travel in a training's checkpoints: an entry an epoch in nnU-Net's logger."""

from __future__ import annotations

from dataclasses import asdict

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from .settings import Given, TrainingSettings
from .snapshots import Snapshots

SERIES = "settings"
CHANGEABLE = ("save_every", "snapshot_every", "num_val_iterations_per_epoch")
"""What may differ when a training is continued."""


class KeepsSettings(nnUNetTrainer):
    """For trainers that remove no channels: nnU-Net's own numbers and the snapshots' settings are kept.

    A subclass sets `_given` and `_snapshots` in its constructor, and reads `TrainingSettings` first and
    `SnapshotSettings` last.
    """

    _given: Given
    _snapshots: Snapshots

    def kept_settings(self) -> list[dict]:
        """An entry per finished epoch."""
        return self.logger.local_logger.my_fantastic_logging.setdefault(SERIES, [])

    def on_epoch_end(self) -> None:
        entries = self.kept_settings()
        del entries[self.current_epoch :]
        entries.append(self._settings_now())
        super().on_epoch_end()
        self._snapshots.after_epoch()

    def _settings_now(self) -> dict:
        training = {name: getattr(self, name) for name in asdict(TrainingSettings())}
        return {**training, **asdict(self._snapshots.settings)}

    def _continue_with(self, checkpoint: dict) -> None:
        """Take the settings of the training that is continued, before the network is set up or loaded.

        Raises:
            ValueError: The environment gives another value for what cannot change in a running training.
        """
        entries = checkpoint.get("logging", {}).get(SERIES)
        if not entries or not entries[-1]:  # of a time when none were kept
            return
        had = self._settings_now()
        training, *_, snapshots = self._given.continued(entries[-1], CHANGEABLE)
        training.apply_to(self)
        self._snapshots = Snapshots(self, snapshots)
        if self.was_initialized and self._settings_now() != had:
            self.optimizer, self.lr_scheduler = self.configure_optimizers()

    def _fill_up(self) -> None:
        """After a load: a shorter series would cut nnU-Net's progress plot."""
        entries = self.kept_settings()
        entries += [{} for _ in range(self.current_epoch - len(entries))]
