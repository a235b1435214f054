"""The settings of a training, compared with those that its folder tells of, and logged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from ..files import read_json_object
from ..model.checkpoints import CHECKPOINT, LATEST
from ..plugin.commands import train_command
from .settings import SETTINGS_FILE, Given


def check_not_mixed(trainer: nnUNetTrainer, settings: Mapping) -> None:
    """Refuse to continue (`--c`) where nnU-Net would take another training than the one that is meant.

    Raises:
        ValueError: There is no checkpoint yet, and the training had been begun with other settings: nnU-Net would begin
            another one. Or another training was begun over a finished one: nnU-Net would take the finished one, and
            remove what the other has.
    """
    folder = Path(trainer.output_folder)
    final, latest = folder / CHECKPOINT, folder / LATEST
    if trainer.current_epoch > 0 and _newer(latest, final):
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


def log_settings(trainer: nnUNetTrainer, settings: Mapping, given: Given) -> None:
    """The settings of a training that begins or is continued, where they come from, and what is not used."""
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


def _newer(file: Path, other: Path) -> bool:
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
