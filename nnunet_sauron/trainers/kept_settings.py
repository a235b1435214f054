"""Settings of a training as its checkpoints, its log and its folder keep them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch
from nnunetv2.training.logging import nnunet_logger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from ..files import read_json_object
from ..model.checkpoints import CHECKPOINT, SETTINGS, logged_settings
from ..model.snapshots import Snapshots, SnapshotSettings
from ..plugin.commands import train_command
from .settings import SETTINGS_FILE, Given, TrainingSettings, write_settings
from .throttled import Throttled

CHANGEABLE = ("save_every", "snapshot_every", "num_val_iterations_per_epoch")
"""Settings of every trainer that may change when a training is continued."""


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
    """The base of all trainers here: settings come from class attributes and the variable, and stay with the training.

    They are read and checked before nnU-Net's constructor, which writes a log. A series of nnU-Net's logger keeps them,
    an entry per finished epoch, and so does every checkpoint.

    Attributes:
        MoreSettings: Settings classes of the trainer's own. All of their fields may change when a training is
            continued, but for `start_from`.
        numbers: nnU-Net's own numbers for which the trainer has other defaults.

    Raises:
        OSError, ValueError: A setting is unknown or bad. Nothing is written then.
        RuntimeError: nnU-Net is too old.
    """

    MoreSettings: tuple[type, ...] = ()
    numbers = TrainingSettings()

    # nnU-Net reads this signature and stores these arguments: it must be exactly its own.
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        if not hasattr(nnunet_logger, "MetaLogger"):
            raise RuntimeError("This nnU-Net is too old for nnunet-sauron; 2.8 is needed: pip install -U nnunetv2")
        self._given = Given(type(self), *self.settings_classes())
        self._take_settings(self._given.settings())
        self._check_before_writing(plans, configuration, fold, dataset_json)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.numbers.apply_to(self)
        self._apply_settings()
        self.kept_settings()  # a series that begins later would cut nnU-Net's progress plot short
        self.logger.plot_progress_png = Throttled(self, self.logger.plot_progress_png)

    @classmethod
    def settings_classes(cls) -> tuple[type, ...]:
        """The dataclasses of all its settings."""
        return TrainingSettings, SnapshotSettings, *cls.MoreSettings

    def _check_before_writing(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        """Refuse what cannot be trained, and read the models to start from, before nnU-Net's constructor."""

    def settings(self, kind: type):
        """Its settings of a class or of a subclass of it."""
        return next(one for one in self._settings if isinstance(one, kind))

    def settings_now(self) -> dict:
        """All settings of this training, by name; of nnU-Net's own numbers those that it has now."""
        numbers = {field.name: getattr(self, field.name) for field in fields(TrainingSettings)}
        others = (one for one in self._settings if not isinstance(one, TrainingSettings))
        return numbers | {name: value for one in others for name, value in asdict(one).items()}

    def series(self) -> dict[str, list]:
        """All series of nnU-Net's logger, by name."""
        return self.logger.local_logger.my_fantastic_logging

    def kept_settings(self) -> list[dict]:
        """An entry per finished epoch."""
        return self.series().setdefault(SETTINGS, [])

    def initialize(self) -> None:
        self._given.enforce(self)
        super().initialize()

    def on_train_start(self) -> None:
        super().on_train_start()
        tell_settings(self, self.settings_now(), self._given)
        self._snapshots.start()

    def on_epoch_end(self) -> None:
        entries, now = self.kept_settings(), self.settings_now()
        del entries[self.current_epoch :]
        entries.append(entries[-1] if entries[-1:] == [now] else now)  # a checkpoint then holds them once
        super().on_epoch_end()
        self._snapshots.after_epoch()

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        entries = self.kept_settings()
        entries += [{} for _ in range(self.current_epoch - len(entries))]  # checkpoints did not hold them at first

    def _take_settings(self, settings: tuple) -> None:
        self._settings = settings

    def _apply_settings(self) -> None:
        self.settings(TrainingSettings).apply_to(self)
        self._snapshots = Snapshots(self, self.settings(SnapshotSettings))

    def _continue_with(self, checkpoint: dict) -> None:
        """Take the settings of the training that is continued, before the network is set up or loaded.

        Raises:
            ValueError: The environment gives another value for a setting that cannot change in a running training.
        """
        before = logged_settings(checkpoint)
        if not before:  # checkpoints did not hold them at first
            return
        had = self.settings_now()
        of_its_own = {field.name for settings in self.MoreSettings for field in fields(settings)} - {"start_from"}
        self._take_settings(self._given.continued(before, {*CHANGEABLE, *of_its_own}))
        self._apply_settings()
        if self.was_initialized and self.settings_now() != had:
            self._settings_changed()

    def _settings_changed(self) -> None:
        """Make anew what was made by other settings."""
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
