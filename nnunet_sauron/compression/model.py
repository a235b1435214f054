"""A trained model's folder, as nnU-Net writes it: its networks read, and a smaller one written beside it."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from ..architecture import network_of_plans
from ..pruning import accept_pruned_weights
from ..pruning.channels import check_prunable
from ..trainers.checkpoints import read_checkpoint, trained_with

CHECKPOINT = "checkpoint_final.pth"
TRAINER = "CompressedTrainer"
COMPRESSION = "compression"  # key of a checkpoint: where its weights come from
# Of the training that is over; the optimiser's tensors have the old shapes.
NOT_TAKEN_ALONG = ("optimizer_state", "grad_scaler_state")


@dataclass(frozen=True)
class TrainedModel:
    """What `nnUNetv2_predict_from_modelfolder -m` takes.

    Attributes:
        folder: Where it lies.
        plans, dataset_json: As they stand there.
        configuration: The configuration's name.
        checkpoints: By fold, "0", "1", ... or "all".
    """

    folder: Path
    plans: dict
    dataset_json: dict
    configuration: str
    checkpoints: Mapping[str, dict]

    @classmethod
    def read(cls, folder: Path, folds: list[str] | None = None) -> TrainedModel:
        """Read a model's folder.

        Args:
            folder: With plans.json, dataset.json and fold_*/checkpoint_final.pth.
            folds: Only these; None for all that are there.

        Raises:
            FileNotFoundError: The folder, a file in it or a fold is missing.
            ValueError: A checkpoint cannot be read, its network cannot be pruned, or it is the second stage of a
                cascade.
        """
        for name in ("plans.json", "dataset.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}; give the folder of a trained model, such as "
                    f"nnUNet_results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__2d."
                )
        there = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{CHECKPOINT}"))
        missing = [fold for fold in folds or there if fold not in there]
        if missing or not there:
            raise FileNotFoundError(
                f"{folder} has no fold_{missing[0] if missing else '*'}/{CHECKPOINT}; "
                f"folds with one: {', '.join(there) or 'none'}."
            )
        checkpoints = {fold: _read(folder / f"fold_{fold}" / CHECKPOINT) for fold in folds or there}
        first, checkpoint = next(iter(checkpoints.items()))
        _, configuration, _ = trained_with(checkpoint, folder / f"fold_{first}" / CHECKPOINT)
        plans, dataset_json = (json.loads((folder / name).read_text()) for name in ("plans.json", "dataset.json"))
        model = cls(folder, plans, dataset_json, configuration, checkpoints)
        manager = model.manager.get_configuration(configuration)
        check_prunable(manager.network_arch_class_name)
        if manager.previous_stage_name is not None:
            raise ValueError(
                f"{folder} is the second stage of a cascade, which reads segmentations beside images; give a model of "
                f"2d, 3d_lowres or 3d_fullres."
            )
        return model

    @property
    def manager(self) -> PlansManager:
        """The plans, as nnU-Net handles them."""
        return PlansManager(copy.deepcopy(self.plans))

    @property
    def labels(self) -> dict[str, int]:
        """Foreground classes of its segmentations: names and values. Regions overlap, so their values stand alone."""
        labels = self.manager.get_label_manager(self.dataset_json)
        if labels.has_regions:
            return {f"label {value}": value for value in self.dataset_json["regions_class_order"]}
        return {n: v for n, v in self.dataset_json["labels"].items() if v not in (0, labels.ignore_label)}

    def network(self, fold: str) -> nn.Module:
        """A fold's network, in evaluation mode; it takes weights of any widths.

        Raises:
            ValueError: The checkpoint is of another architecture than the plans.
        """
        network, _ = network_of_plans(self.manager, self.configuration, self.dataset_json, device="cpu")
        try:
            accept_pruned_weights(network).load_state_dict(self.checkpoints[fold]["network_weights"])
        except RuntimeError as error:
            raise ValueError(
                f"{self.folder / f'fold_{fold}' / CHECKPOINT} is of another architecture than plans.json says; a "
                f"trainer that builds a network of its own ({self.checkpoints[fold]['trainer_name']}?) cannot be "
                f"compressed. {str(error)[:300]}"
            ) from error
        return network.eval()

    def predictor(self, device: torch.device, weights: list[dict] | None = None) -> nnUNetPredictor:
        """nnU-Net's own prediction with this model, or with other weights of it; without mirroring, for speed."""
        weights = weights or [checkpoint["network_weights"] for checkpoint in self.checkpoints.values()]
        first = next(iter(self.checkpoints))
        predictor = nnUNetPredictor(
            use_mirroring=False, perform_everything_on_device=device.type == "cuda", device=device, allow_tqdm=False
        )
        predictor.manual_initialization(
            self.network(first),
            self.manager,
            self.manager.get_configuration(self.configuration),
            weights,
            self.dataset_json,
            self.checkpoints[first]["trainer_name"],
            self.checkpoints[first].get("inference_allowed_mirroring_axes"),
        )
        return predictor

    def write(self, target: Path, weights: Mapping[str, dict], notes: dict, pictures: Mapping[str, Path]) -> None:
        """Write a model of the same plans with other weights, beside and then in one move.

        Args:
            target: The new folder, which must not exist.
            weights: By fold.
            notes: Where the weights come from; stored in every checkpoint and as compression.json.
            pictures: By fold, a picture for those that have none of their training.
        """
        beside = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, beside / name)
            (beside / f"{COMPRESSION}.json").write_text(json.dumps(notes, indent=2))
            for fold, checkpoint in self.checkpoints.items():
                folder = beside / f"fold_{fold}"
                (folder / "validation").mkdir(parents=True)
                changed = {"network_weights": weights[fold], "trainer_name": TRAINER, COMPRESSION: notes}
                torch.save({**checkpoint, **changed}, folder / CHECKPOINT)
                # nnUNetv2_export_model_to_zip wants these two of every model.
                of_training = self.folder / f"fold_{fold}" / "progress.png"
                shutil.copyfile(of_training if of_training.is_file() else pictures[fold], folder / "progress.png")
                (folder / "validation" / "summary.json").write_text(json.dumps(notes["summary"], indent=2))
            os.replace(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _read(path: Path) -> dict:
    return {key: value for key, value in read_checkpoint(path).items() if key not in NOT_TAKEN_ALONG}
