"""Settings that travel in a training's checkpoints, an entry an epoch in nnU-Net's logger, and stand in its folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from ..model.snapshots import Snapshots
from .settings import Given, TrainingSettings, write_settings

SERIES = "settings"
CHANGEABLE = ("save_every", "snapshot_every", "num_val_iterations_per_epoch")


def changeable(more_settings: Iterable) -> set[str]:
    """What may differ when a training is continued: some numbers, and whom it learns from; not what it started from.

    Args:
        more_settings: A trainer's own settings classes, or instances of them.
    """
    return {*CHANGEABLE, *(field.name for settings in more_settings for field in fields(settings))} - {"start_from"}


def tell_settings(trainer: nnUNetTrainer, settings: Mapping, given: Given) -> None:
    """Log the settings of a training that begins or goes on, and leave them as `settings.json` in its fold's folder."""
    line = ", ".join(f"{name}={value}" for name, value in settings.items())
    if given.by_class:
        line += f". Of them class attributes are {', '.join(sorted(given.by_class))}"
    if given.changed:
        changed = (f"{name}={now} (before: {before})" for name, (before, now) in given.changed.items())
        line += f". Changed from here on: {', '.join(changed)}"
    trainer.print_to_log_file(f"{type(trainer).__name__}: {line}")
    if trainer.local_rank == 0:
        write_settings(settings, Path(trainer.output_folder))


def has_begun(trainer_class: type, plans: dict, configuration: str, fold: int | str) -> bool:
    """Whether a training's folder holds a checkpoint already; for a constructor, before nnU-Net's own writes a log."""
    results = os.environ.get("nnUNet_results")
    model = f"{trainer_class.__name__}__{plans['plans_name']}__{configuration}"
    return bool(results) and any(Path(results, plans["dataset_name"], model, f"fold_{fold}").glob("checkpoint_*.pth"))


class KeepsSettings(nnUNetTrainer):
    """For trainers that remove no channels: nnU-Net's own numbers, a subclass's and the snapshots' settings are kept.

    A subclass sets `_given`, `_more_settings` and `_snapshots` in its constructor; `_given` reads `TrainingSettings`
    first, then the classes of `_more_settings`, then `SnapshotSettings`.
    """

    _given: Given
    _more_settings: list
    _snapshots: Snapshots

    def kept_settings(self) -> list[dict]:
        """An entry per finished epoch."""
        return self.logger.local_logger.my_fantastic_logging.setdefault(SERIES, [])

    def on_train_start(self) -> None:
        super().on_train_start()
        tell_settings(self, self._settings_now(), self._given)

    def on_epoch_end(self) -> None:
        entries = self.kept_settings()
        del entries[self.current_epoch :]
        entries.append(self._settings_now())
        super().on_epoch_end()
        self._snapshots.after_epoch()

    def _settings_now(self) -> dict:
        training = {name: getattr(self, name) for name in asdict(TrainingSettings())}
        more = {name: value for settings in self._more_settings for name, value in asdict(settings).items()}
        return {**training, **more, **asdict(self._snapshots.settings)}

    def _continue_with(self, checkpoint: dict) -> None:
        """Take the settings of the training that is continued, before the network is set up or loaded.

        Raises:
            ValueError: The environment gives another value for what cannot change in a running training.
        """
        entries = checkpoint.get("logging", {}).get(SERIES)
        if not entries or not entries[-1]:  # of a time when none were kept
            return
        had = self._settings_now()
        training, *self._more_settings, snapshots = self._given.continued(entries[-1], changeable(self._more_settings))
        training.apply_to(self)
        self._snapshots = Snapshots(self, snapshots)
        if self.was_initialized and self._settings_now() != had:
            self.optimizer, self.lr_scheduler = self.configure_optimizers()

    def _fill_up(self) -> None:
        """After a load: a shorter series would cut nnU-Net's progress plot."""
        entries = self.kept_settings()
        entries += [{} for _ in range(self.current_epoch - len(entries))]
