"""The folder of the model to compress, and that of the compressed model."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .. import __version__
from ..console.json_data import json_data
from ..files import new_folder
from ..model.cases import Case
from ..model.checkpoints import CHECKPOINT, COMPRESSION, MIRRORING
from ..model.evaluation import mean_score
from ..model.networks import BUILT_BY
from ..model.trained import TrainedModel
from ..pruning.channels import check_prunable
from ..pruning.merging import check_mergeable
from .agreement import Measured
from .compressor import Compressed
from .goal import Goal
from .plots import plot_widths

TRAINER = "CompressedTrainer"
STOCK = "nnUNetTrainer"
# Keys that are copied into a checkpoint of the stock trainer; other trainers may keep what only they can read.
COPIED_FOR_STOCK = ("current_epoch", MIRRORING, "_best_ema")


def read_prunable(
    folder: Path, folds: list[str] | None = None, checkpoint_name: str = CHECKPOINT, *, first_only: bool = False
) -> TrainedModel:
    """Read the folder of a model whose network can be pruned.

    Raises:
        FileNotFoundError: The folder, a file in it or a fold is missing.
        ValueError: A checkpoint cannot be read, its network cannot be pruned, or it is the second stage of a cascade.
    """
    model = TrainedModel.read(folder, folds, checkpoint_name, first_only=first_only)
    model.check_reads_images_alone()
    configuration = model.manager.get_configuration(model.configuration)
    try:
        if not model.builder.differs:
            check_prunable(configuration.network_arch_class_name)
        check_mergeable(model.builder.build())
    except ValueError as error:
        trainer = model.builder.trainer_name
        raise ValueError(f"{folder} was trained by {trainer}, whose network cannot be compressed: {error}") from error
    return model


def notes_of(
    model: TrainedModel, goal: Goal, round_to: int, fitted_on: Sequence[Case], found: Mapping[str, Compressed],
    measured: Measured,
) -> dict:  # fmt: skip
    """Where a compressed model comes from and how it was scored, for its checkpoints and its compression.json."""
    return {
        "made_by": f"nnunet-sauron {__version__}",
        "source": str(model.folder.resolve()),
        "source_checkpoint": model.checkpoint_name,
        "source_trainer": model.trainer_names[0],
        "network": described_network(model),
        "goal": {name: value for name, value in asdict(goal).items() if value is not None},
        "round_to": round_to,
        "fitted_on": [case.name for case in fitted_on],
        "folds": {fold: one.numbers() for fold, one in found.items()},
        "summary": _summary(measured),
    }


def described_network(model: TrainedModel) -> dict:
    """Whose network was compressed, and what had to be assumed about it."""
    builder = model.builder
    return {"built_by": builder.trainer_name, "differs_from_plans": builder.differs, "assumed": builder.assumed}


def write_model(
    model: TrainedModel, target: Path, found: Mapping[str, Compressed], notes: dict, plans: dict | None = None
) -> None:
    """Write the compressed model beside its place, then move it there.

    Args:
        model: The old model, whose plans and checkpoints are copied.
        target: The new folder, which must not exist.
        found: By fold.
        notes: Stored in every checkpoint and as compression.json.
        plans: Other plans: the model is then one of nnU-Net's own trainer, and needs this package no more.

    Raises:
        OSError: It could not be written, with what to do; nothing is left of it.
    """
    with new_folder(target) as beside:
        for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
            if (model.folder / name).is_file():
                shutil.copyfile(model.folder / name, beside / name)
        if plans is not None:
            (beside / "plans.json").write_text(json.dumps(plans, indent=4), encoding="utf-8")
        elif model.builder.differs:
            described = _naming_builder(model.plans, model)
            (beside / "plans.json").write_text(json.dumps(described, indent=4), encoding="utf-8")
        (beside / f"{COMPRESSION}.json").write_text(json.dumps(json_data(notes), indent=2))
        for fold, checkpoint in model.checkpoints.items():
            folder = beside / f"fold_{fold}"
            (folder / "validation").mkdir(parents=True)
            changed = {"network_weights": found[fold].weights, "trainer_name": TRAINER, COMPRESSION: notes}
            if plans is not None:
                changed |= {"trainer_name": STOCK, "init_args": {**checkpoint["init_args"], "plans": plans}}
                checkpoint = {key: value for key, value in checkpoint.items() if key in COPIED_FOR_STOCK}
            elif model.builder.differs:
                arguments = checkpoint["init_args"]
                changed["init_args"] = {**arguments, "plans": _naming_builder(arguments["plans"], model)}
            torch.save({**checkpoint, **changed}, folder / CHECKPOINT)
            # nnUNetv2_export_model_to_zip needs these two files of every model.
            of_training = model.folder / f"fold_{fold}" / "progress.png"
            if of_training.is_file():
                shutil.copyfile(of_training, folder / "progress.png")
            else:
                plot_widths(found[fold], folder / "progress.png")
            (folder / "validation" / "summary.json").write_text(json.dumps(json_data(notes["summary"]), indent=2))


def _naming_builder(plans: dict, model: TrainedModel) -> dict:
    """Plans that tell `CompressedTrainer` whose network the weights are of."""
    plans = copy.deepcopy(plans)
    plans["configurations"][model.configuration][BUILT_BY] = model.builder.trainer_name
    return plans


def _summary(measured: Measured) -> dict:
    """In the form of nnU-Net's validation/summary.json, where Dice is always against references."""
    return {
        "agreement_with_the_old_model": {"Dice": mean_score(measured.agreement, "dice").value},
        "foreground_mean": {"Dice": mean_score(measured.new or (), "dice").value},
        "metric_per_case": [asdict(score) for score in measured.new or ()],
    }
