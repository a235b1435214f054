"""What `compress` takes, a trained model whose network can be pruned, and what it writes: one of the same plans."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from ..console.json_data import json_data
from ..files import new_folder
from ..model.networks import BUILT_BY
from ..model.trained import CHECKPOINT, COMPRESSION, TrainedModel
from ..pruning.channels import check_prunable
from ..pruning.merging import check_mergeable

TRAINER = "CompressedTrainer"
STOCK = "nnUNetTrainer"
OF_STOCK = ("current_epoch", "inference_allowed_mirroring_axes", "_best_ema")  # keys of its checkpoints, with `changed`


def read_prunable(folder: Path, folds: list[str] | None = None, checkpoint_name: str = CHECKPOINT) -> TrainedModel:
    """Read a model's folder.

    Raises:
        FileNotFoundError: The folder, a file in it or a fold is missing.
        ValueError: A checkpoint cannot be read, its network cannot be pruned, or it is the second stage of a cascade.
    """
    model = TrainedModel.read(folder, folds, checkpoint_name)
    configuration = model.manager.get_configuration(model.configuration)
    if configuration.previous_stage_name is not None:
        raise ValueError(
            f"{folder} is the second stage of a cascade, which reads segmentations beside images; give a model of "
            f"2d, 3d_lowres or 3d_fullres."
        )
    try:
        if not model.builder.differs:
            check_prunable(configuration.network_arch_class_name)
        check_mergeable(model.builder.build())
    except ValueError as error:
        trainer = model.builder.trainer_name
        raise ValueError(f"{folder} was trained by {trainer}, whose network cannot be compressed: {error}") from error
    return model


def write_model(
    model: TrainedModel,
    target: Path,
    weights: Mapping[str, dict],
    notes: dict,
    pictures: Mapping[str, Path],
    plans: dict | None = None,
) -> None:
    """Write a model with other weights, beside and then in one move.

    Args:
        model: Where plans and checkpoints are taken from.
        target: The new folder, which must not exist.
        weights: By fold.
        notes: Where the weights come from; stored in every checkpoint and as compression.json.
        pictures: By fold, a picture for those that have none of their training.
        plans: In the place of the model's own: what is written is nnU-Net's own trainer's then, and nothing in it
            needs this package.
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
            changed = {"network_weights": weights[fold], "trainer_name": TRAINER, COMPRESSION: notes}
            if plans is not None:
                changed |= {"trainer_name": STOCK, "init_args": {**checkpoint["init_args"], "plans": plans}}
                # Other trainers may keep what only they can read.
                checkpoint = {key: value for key, value in checkpoint.items() if key in OF_STOCK}
            elif model.builder.differs:
                arguments = checkpoint["init_args"]
                changed["init_args"] = {**arguments, "plans": _naming_builder(arguments["plans"], model)}
            torch.save({**checkpoint, **changed}, folder / CHECKPOINT)
            # nnUNetv2_export_model_to_zip wants these two of every model.
            of_training = model.folder / f"fold_{fold}" / "progress.png"
            shutil.copyfile(of_training if of_training.is_file() else pictures[fold], folder / "progress.png")
            (folder / "validation" / "summary.json").write_text(json.dumps(json_data(notes["summary"]), indent=2))


def _naming_builder(plans: dict, model: TrainedModel) -> dict:
    """Plans that tell `CompressedTrainer` whose network the weights are of."""
    plans = copy.deepcopy(plans)
    plans["configurations"][model.configuration][BUILT_BY] = model.builder.trainer_name
    return plans
