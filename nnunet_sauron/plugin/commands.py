"""Commands for the user to paste into a shell: quoted, and with the variable by which nnU-Net finds the trainer."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from .installation import TRAINERS, find_nnunet, shim_state, trainer_folder, trainer_names

EXTERNAL = "nnUNet_extTrainer"
SETTINGS = "nnunet_sauron"
RESULTS = "nnUNet_results"
DEFAULT_CHECKPOINT = "checkpoint_final.pth"  # of nnU-Net's and our -chk


def command(
    *words: object, trainers: Iterable[str] = (), settings: str | None = None, results: Path | None = None
) -> str:
    """A line for a POSIX shell.

    Args:
        words: The program and its arguments; words such as FOLD, for the user to replace, stay as they are.
        trainers: Names of trainers that the program must find: `nnUNet_extTrainer` is set where nnU-Net does not have
            one of them in its own folder.
        settings: Value of the environment variable `nnunet_sauron`.
        results: The folder of results that the program must use; set where `nnUNet_results` is another one.
    """
    elsewhere = results is not None and results.absolute() != Path(os.environ.get(RESULTS) or os.sep).absolute()
    environment = {
        RESULTS: str(results.absolute()) if elsewhere else None,
        SETTINGS: settings, EXTERNAL: _folders_with(trainers),
    }  # fmt: skip
    before = [f"{name}={shlex.quote(value)}" for name, value in environment.items() if value]
    return " ".join([*before, shlex.join(str(word) for word in words)])


def train_command(
    dataset: str,
    configuration: str,
    fold: object,
    trainer: str,
    plans: str,
    *flags: object,
    settings: str | None = None,
    model_folder: Path | None = None,
) -> str:
    """nnU-Net's command that trains, continues or validates a fold; `flags` such as --c.

    nnU-Net takes the model of these names in `nnUNet_results`: `model_folder` is the one that is meant.
    """
    named_so = model_folder is not None and model_folder.absolute().parent.name == dataset
    words = "nnUNetv2_train", dataset, configuration, fold, "-tr", trainer, "-p", plans, *flags
    results = model_folder.absolute().parent.parent if named_so else None
    return command(*words, trainers=[trainer], settings=settings, results=results)


def continue_command(model_folder: Path, fold: object) -> str:
    """nnU-Net's command that continues the training of a folder `DATASET/TRAINER__PLANS__CONFIGURATION/fold_X`."""
    dataset, trainer, plans, configuration = told_by_name(model_folder)
    return train_command(dataset, configuration, fold, trainer, plans, "--c", model_folder=model_folder)


def told_by_name(model_folder: Path) -> tuple[str, str, str, str]:
    """Dataset, trainer, plans and configuration, from nnU-Net's names of folders; in capitals where they are others."""
    parts = model_folder.name.split("__")
    if len(parts) != 3:
        return "DATASET", "TRAINER", "PLANS", "CONFIGURATION"
    return model_folder.parent.name, *parts


def predict_command(
    model_folder: Path, folds: Iterable[object], trainers: Iterable[str], checkpoint_name: str = DEFAULT_CHECKPOINT
) -> str:
    """nnU-Net's command that predicts images IN with a model's folds; it must find all of the trainers."""
    words = "nnUNetv2_predict_from_modelfolder", "-m", model_folder, "-f", *folds, "-i", "IN", "-o", "OUT"
    return command(*words, *checkpoint_flag(checkpoint_name), trainers=trainers)


def checkpoint_flag(checkpoint_name: str) -> tuple[str, ...]:
    """-chk and a checkpoint's name where it is not the default."""
    return () if checkpoint_name == DEFAULT_CHECKPOINT else ("-chk", checkpoint_name)


def _folders_with(trainers: Iterable[str]) -> str | None:
    """The value of `nnUNet_extTrainer` for these trainers; None where nnU-Net has them, or they are unknown."""
    nnunet, given, needed = find_nnunet(), os.environ.get(EXTERNAL, ""), False
    folders = [str(Path(folder).absolute()) for folder in given.split(os.pathsep) if folder.strip()]
    for trainer in trainers:
        if trainer in trainer_names():
            if nnunet is not None and shim_state(nnunet) in ("current", "outdated"):
                continue
            if not any((Path(folder) / TRAINERS.file).is_file() for folder in folders):
                folders.insert(0, str(trainer_folder()))
        elif nnunet is not None and _defined_in(nnunet / "training" / "nnUNetTrainer", trainer):
            continue
        needed = True
    return os.pathsep.join(folders) or None if needed else None


def _defined_in(folder: Path, trainer: str) -> bool:
    definition = re.compile(rf"^class {re.escape(trainer)}\b", re.MULTILINE)
    return any(definition.search(file.read_text("utf-8", "replace")) for file in folder.rglob("*.py"))
