"""The model that a training starts or learns from: its weights, and what its fold has seen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from ..console.errors import first_of
from ..model.checkpoints import CHECKPOINT, fitted_on, read_checkpoint
from ..model.networks import builder_of


class Start:
    """A trained model whose weights a training begins with.

    Args:
        path: Its checkpoint, as `start_path` finds it.
        fold: The fold being trained.
        dataset: Name of the data set being trained on.

    Attributes:
        path: The checkpoint's.
        checkpoint: Its contents, until `load_into` has used them; None from then on.
        builder: Who builds its network; None where the checkpoint does not say.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or its trainer builds no network.
    """

    def __init__(self, path: Path, fold: int | str, dataset: str):
        self.path = path
        self.checkpoint: dict | None = read_checkpoint(path)
        self.builder = builder_of(self.checkpoint, path)
        self._seen = seen_cases(self.checkpoint, path, fold, dataset)
        plans = self.checkpoint.get("init_args", {}).get("plans", {})
        is_same_data = plans.get("dataset_name") == dataset
        self._fitted_on = fitted_on(self.checkpoint) if is_same_data else set()
        self._loaded: dict[str, str] | None = None

    def __str__(self) -> str:
        """The file, and what a reader of the log should know of it."""
        assumed = f" ({self.builder.assumed})" if self.builder and self.builder.assumed else ""
        return f"{self.path}{assumed}" + (f". {self._seen}" if self._seen else "")

    def warn_of_fitted_cases(self, trainer: nnUNetTrainer) -> None:
        """Say in a training's log if `compress` fitted the model on images of cases that validate the fold."""
        validation = validation_cases(trainer.preprocessed_dataset_folder_base, trainer.fold)
        if seen := sorted(self._fitted_on.intersection(validation)):
            trainer.print_to_log_file(
                f"WARNING: compress fitted that model on images of {len(seen)} of the {len(validation)} validation "
                f"cases of this fold ({first_of(seen)}): the validation Dice of this training is no cross-validation. "
                f"For one, give compress a folder of the training cases' images (-i)"
            )

    def load_into(self, network: nn.Module) -> None:
        """Give a network of the same widths these weights; the checkpoint's memory is free then."""
        network.load_state_dict(self.checkpoint["network_weights"])
        self._loaded = _digests(network)
        self.checkpoint = None

    def check_unchanged(self, network: nn.Module) -> None:
        """Raise ValueError if a network's weights are not those any more that `load_into` gave it.

        Args:
            network: As its first step will find it. Where a subclass has given it other layers, nothing is compared.
        """
        if self._loaded is None:
            return
        now = _digests(network)
        if now.keys() == self._loaded.keys() and now != self._loaded:
            raise ValueError(
                f"start_from={self.path} and -pretrained_weights are both given, and nnU-Net has put the weights of "
                f"the second over most of the first's. Leave one of them out."
            )


def validation_cases(preprocessed: str | Path, fold: int | str) -> list[str]:
    """The cases that nnU-Net validates a fold with; empty where its file of folds does not tell.

    Args:
        preprocessed: The data set's folder in nnUNet_preprocessed.
        fold: The fold; nnU-Net draws one that is not in the file by chance.
    """
    file = Path(preprocessed) / "splits_final.json"
    folds = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return folds[fold]["val"] if isinstance(fold, int) and fold < len(folds) else []


def why_it_does_not_fit(checkpoint: Mapping, network: nn.Module) -> str:
    """Why the weights of a checkpoint cannot be those of a network at any widths, in words that follow its name."""
    outputs = [
        weights[last[-1]].shape[0]
        for weights in (checkpoint["network_weights"], network.state_dict())
        if (last := [name for name in weights if ".seg_layers." in name and name.endswith(".weight")])
    ]
    if len(set(outputs)) == 2:
        trained_on = checkpoint.get("init_args", {}).get("plans", {}).get("dataset_name", "another data set")
        return (
            f"has {outputs[0]} outputs, and this data set needs {outputs[1]}: it was trained on {trained_on}. Name a "
            f"model of the same classes."
        )
    return (
        "is of another architecture than these plans: only the numbers of channels may differ. Train with the "
        "configuration and the plans (-p) of that model."
    )


def start_path(given: str, fold: int | str) -> Path:
    """The absolute path of a start's checkpoint: of this fold, where a model's folder is given, or the file itself."""
    path = Path(given).resolve()  # for --c from another folder
    return path / f"fold_{fold}" / CHECKPOINT if path.is_dir() else path


def seen_cases(checkpoint: dict, path: str | Path, fold: int | str, dataset: str) -> str | None:
    """A warning if a model was trained on cases that validate the fold; None where it was not, or where it is unknown.

    Args:
        checkpoint: The model's.
        path: Its file, for the warning.
        fold: The fold being trained.
        dataset: Name of the data set being trained on.
    """
    arguments = checkpoint.get("init_args", {})
    of_model, plans = arguments.get("fold"), arguments.get("plans", {})
    if of_model is None or fold == "all" or str(of_model) == str(fold) or plans.get("dataset_name") != dataset:
        return None
    return (
        f"WARNING: {path} is a model of fold {of_model}, which was trained on validation cases of fold {fold}: the "
        f"validation Dice of this training is no cross-validation"
    )


def has_begun(trainer_class: type, plans: dict, configuration: str, fold: int | str) -> bool:
    """Whether a training's folder holds a checkpoint already; usable before nnU-Net's constructor writes a log."""
    folder = _fold_folder(trainer_class, plans, configuration, fold)
    return folder is not None and any(folder.glob("checkpoint_*.pth"))


def _fold_folder(trainer_class: type, plans: dict, configuration: str, fold: int | str) -> Path | None:
    """Where nnU-Net's constructor will let a training write; None where its variable is not set."""
    results = os.environ.get("nnUNet_results")
    model = f"{trainer_class.__name__}__{plans['plans_name']}__{configuration}"
    return Path(results, plans["dataset_name"], model, f"fold_{fold}") if results else None


def check_not_own(
    name: str, files: Iterable[Path], trainer_class: type, plans: dict, configuration: str, fold: int | str
) -> None:
    """Raise ValueError if one of the files that a setting names lies where this training writes its own."""
    own = _fold_folder(trainer_class, plans, configuration, fold)
    for file in files:
        if own is not None and file.resolve().parent == own.resolve():
            raise ValueError(
                f"{name}: {file} lies in the folder that this training writes its own checkpoints into. Move that "
                f"model to another folder first, and name it there."
            )


def _digests(network: nn.Module) -> dict[str, str]:
    """Of each tensor that -pretrained_weights loads: all but the segmentation heads'."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in network.state_dict().items()
        if ".seg_layers." not in name
    }
