"""Settings of a training as its checkpoints, its log and its folder keep them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from ..files import read_json_object
from ..model.checkpoints import CHECKPOINT, SETTINGS, logged
from ..model.snapshots import Snapshots
from ..plugin.commands import train_command
from .settings import SETTINGS_FILE, Given, TrainingSettings, write_settings

CHANGEABLE = ("save_every", "snapshot_every", "num_val_iterations_per_epoch")


def changeable(more_settings: Iterable) -> set[str]:
    """The settings that may change when a training is continued: some numbers, and its teacher; not its start.

    Args:
        more_settings: A trainer's own settings classes, or instances of them.
    """
    return {*CHANGEABLE, *(field.name for settings in more_settings for field in fields(settings))} - {"start_from"}


def settings_of(trainer: nnUNetTrainer, *settings) -> dict:
    """nnU-Net's own numbers that a trainer has now, and all fields of these settings, by name."""
    training = {name: getattr(trainer, name) for name in asdict(TrainingSettings())}
    return training | {name: value for one in settings for name, value in asdict(one).items()}


def tell_settings(trainer: nnUNetTrainer, settings: Mapping, given: Given) -> None:
    """Log the settings of a training that begins or is continued, and write `settings.json` into its fold's folder.

    Raises:
        ValueError: It was asked to continue (`--c`) a training that has no checkpoint yet and had been begun with other
            settings: nnU-Net would begin another one. Or another training was begun over a finished one: nnU-Net would
            take the finished one, and remove what the other has.
    """
    folder = Path(trainer.output_folder)
    final, latest = folder / CHECKPOINT, folder / "checkpoint_latest.pth"
    if trainer.current_epoch > 0 and newer(latest, final):
        raise ValueError(
            f"{final} is of a finished training, and {latest.name} beside it of another one that was begun later. "
            f"nnU-Net's --c takes the first: move {final.name} away to continue the second, or remove {latest.name}."
        )
    if trainer.current_epoch == 0 and (earlier := _other_settings(folder, settings)):
        if trainer.logger.resume:  # nnU-Net's --c
            names = trainer.plans_manager.dataset_name, trainer.configuration_name, trainer.fold, type(trainer).__name__
            file = folder / SETTINGS_FILE
            again = train_command(*names, trainer.plans_manager.plans_name, "--c", settings=f"@{file}")
            raise ValueError(
                f"There is no checkpoint to continue from in {trainer.output_folder}, and the training that was begun "
                f"there had other settings: {earlier}. Begin anew without --c, or give them again: {again}"
            )
        trainer.print_to_log_file(f"WARNING: an earlier training in this folder had other settings: {earlier}.")
    line = ", ".join(f"{name}={value}" for name, value in settings.items())
    if given.by_class:
        line += f". Of them class attributes are {', '.join(sorted(given.by_class))}"
    for name, (begun, of_class) in given.passed_over.items():
        trainer.print_to_log_file(
            f"WARNING: the class attribute {name}={of_class} is not used: this training was begun with {begun}, which "
            f"stays. Begin anew without --c for the other."
        )
    if given.changed:
        changed = (f"{name}={now} (before: {before})" for name, (before, now) in given.changed.items())
        line += f". Changed from here on: {', '.join(changed)}"
    trainer.print_to_log_file(f"{type(trainer).__name__}: {line}")
    if trainer.local_rank == 0:
        write_settings(settings, folder)


def newer(file: Path, other: Path) -> bool:
    """Whether both are there, and the first was written later."""
    return file.is_file() and other.is_file() and file.stat().st_mtime > other.stat().st_mtime


def _other_settings(folder: Path, settings: Mapping) -> str:
    """How `settings.json` in a fold's folder differs from these settings, in words; empty without a difference."""
    try:
        earlier = read_json_object(folder / SETTINGS_FILE, "remove it")
    except (OSError, ValueError):
        return ""
    now = json.loads(json.dumps(dict(settings)))
    names = [name for name in earlier if name in now and earlier[name] != now[name]]
    return ", ".join(f"{name}={earlier[name]} (now {now[name]})" for name in names)


def has_begun(trainer_class: type, plans: dict, configuration: str, fold: int | str) -> bool:
    """Whether a training's folder holds a checkpoint already; usable before nnU-Net's constructor writes a log."""
    folder = fold_folder(trainer_class, plans, configuration, fold)
    return folder is not None and any(folder.glob("checkpoint_*.pth"))


def fold_folder(trainer_class: type, plans: dict, configuration: str, fold: int | str) -> Path | None:
    """Where nnU-Net's constructor will let a training write; None where its variable is not set."""
    results = os.environ.get("nnUNet_results")
    model = f"{trainer_class.__name__}__{plans['plans_name']}__{configuration}"
    return Path(results, plans["dataset_name"], model, f"fold_{fold}") if results else None


def check_not_own(
    name: str, files: Iterable[Path], trainer_class: type, plans: dict, configuration: str, fold: int | str
) -> None:
    """Raise ValueError if one of the files that a setting names lies where this training writes its own."""
    own = fold_folder(trainer_class, plans, configuration, fold)
    for file in files:
        if own is not None and file.resolve().parent == own.resolve():
            raise ValueError(
                f"{name}: {file} lies in the folder that this training writes its own checkpoints into. Move that "
                f"model to another folder first, and name it there."
            )


class KeepsSettings(nnUNetTrainer):
    """For trainers that remove no channels: keeps the settings in a series of nnU-Net's logger, an entry per epoch.

    A subclass sets `_given`, `_more_settings` and `_snapshots` in its constructor; `_given` reads `TrainingSettings`
    first, then the classes of `_more_settings`, then `SnapshotSettings`.
    """

    _given: Given
    _more_settings: list
    _snapshots: Snapshots

    def kept_settings(self) -> list[dict]:
        """An entry per finished epoch."""
        return self.logger.local_logger.my_fantastic_logging.setdefault(SETTINGS, [])

    def initialize(self) -> None:
        self._given.enforce(self)
        super().initialize()

    def on_train_start(self) -> None:
        super().on_train_start()
        tell_settings(self, self.settings_now(), self._given)

    def on_epoch_end(self) -> None:
        entries = self.kept_settings()
        del entries[self.current_epoch :]
        entries.append(self.settings_now())
        super().on_epoch_end()
        self._snapshots.after_epoch()

    def settings_now(self) -> dict:
        """All settings of this training, by name."""
        return settings_of(self, *self._more_settings, self._snapshots.settings)

    def _continue_with(self, checkpoint: dict) -> None:
        """Take the settings of the training that is continued, before the network is set up or loaded.

        Raises:
            ValueError: The environment gives another value for a setting that cannot change in a running training.
        """
        entries = logged(checkpoint).get(SETTINGS)
        if not entries or not entries[-1]:  # checkpoints did not hold them at first
            return
        had = self.settings_now()
        training, *self._more_settings, snapshots = self._given.continued(entries[-1], changeable(self._more_settings))
        training.apply_to(self)
        self._snapshots = Snapshots(self, snapshots)
        if self.was_initialized and self.settings_now() != had:
            self.optimizer, self.lr_scheduler = self.configure_optimizers()

    def _fill_up(self) -> None:
        """Fill the series up after a load: a shorter one would cut nnU-Net's progress plot short."""
        entries = self.kept_settings()
        entries += [{} for _ in range(self.current_epoch - len(entries))]
