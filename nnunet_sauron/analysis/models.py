"""A trained model's folder, as nnU-Net writes it: its networks and what they were trained with."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from ..architecture import network_of_plans
from ..commands import continue_command
from ..json_files import read_json_object
from ..labels import class_values, foreground_values
from ..pruning import accept_pruned_weights
from ..pruning.channels import is_prunable
from ..trainers.checkpoints import CHECKPOINT, COMPRESSION, read_checkpoint, trained_with
from .evaluation import Segmentations

__all__ = ["CHECKPOINT", "COMPRESSION", "TrainedModel"]
# Of the training that is over; the optimiser's tensors may have other shapes than the weights.
NOT_TAKEN_ALONG = ("optimizer_state", "grad_scaler_state")


@dataclass(frozen=True)
class TrainedModel:
    """What `nnUNetv2_predict_from_modelfolder -m` takes.

    Attributes:
        folder: Where it lies.
        plans, dataset_json: As they stand there.
        configuration: The configuration's name.
        checkpoints: By fold, "0", "1", ... or "all"; without the optimiser.
        checkpoint_name: The file that they were read from.
    """

    folder: Path
    plans: dict
    dataset_json: dict
    configuration: str
    checkpoints: Mapping[str, dict]
    checkpoint_name: str = CHECKPOINT

    @classmethod
    def read(
        cls,
        folder: Path,
        folds: list[str] | None = None,
        checkpoint_name: str = CHECKPOINT,
        on_error: Callable[[str], None] | None = None,
    ) -> TrainedModel:
        """Read a model's folder.

        Args:
            folder: With plans.json, dataset.json and fold_*/`checkpoint_name`.
            folds: Only these; None for all that are there.
            checkpoint_name: Such as checkpoint_best.pth.
            on_error: Given what is wrong with a fold, which is then left out; without it, that is raised.

        Raises:
            FileNotFoundError: The folder, a file in it or a fold is missing.
            ValueError: A checkpoint cannot be read, or plans.json or dataset.json are not those of a model.
        """
        folder = folder.resolve()
        for name in ("plans.json", "dataset.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}; give the folder of a trained model, such as "
                    f"nnUNet_results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__2d."
                )
        plans, dataset_json = (
            read_json_object(folder / name, f"copy {name} anew from where the model was trained")
            for name in ("plans.json", "dataset.json")
        )
        there = sorted(
            path.name.removeprefix("fold_") for path in folder.glob("fold_*") if (path / checkpoint_name).is_file()
        )
        missing = [fold for fold in folds or there if fold not in there]
        if missing or not there:
            raise FileNotFoundError(
                f"{folder} has no fold_{missing[0] if missing else '*'}/{checkpoint_name}; folds with one: "
                f"{', '.join(there) or 'none'}. A training writes it at its end. To go on: "
                f"{continue_command(folder, missing[0] if missing else 'FOLD')}"
            )
        checkpoints = {}
        for fold in folds or there:
            try:
                checkpoints[fold] = _read(folder / f"fold_{fold}" / checkpoint_name)
            except (ValueError, OSError, MemoryError) as error:
                if on_error is None or len(folds or there) == 1:
                    raise
                on_error(str(error))
        if not checkpoints:
            raise ValueError(f"No fold of {folder} can be read.")
        first, checkpoint = next(iter(checkpoints.items()))
        _, configuration, _ = trained_with(checkpoint, folder / f"fold_{first}" / checkpoint_name)
        model = cls(folder, plans, dataset_json, configuration, checkpoints, checkpoint_name)
        model._check()
        return model

    def _check(self) -> None:
        """Raise ValueError if nnU-Net can do nothing with the two JSON files."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                self.manager.get_configuration(self.configuration)
                _ = self.segmentations, self.input_channels, self.channel_names
        except Exception as error:  # nnU-Net's own: AssertionError, KeyError, TypeError, ...
            raise ValueError(
                f"plans.json and dataset.json of {self.folder} are not those of a model of configuration "
                f"{self.configuration}: {type(error).__name__}: {error} {' '.join(said.getvalue().split())} Copy them "
                f"anew from where the model was trained."
            ) from error

    @property
    def manager(self) -> PlansManager:
        """The plans, as nnU-Net handles them."""
        return PlansManager(copy.deepcopy(self.plans))

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels per axis of what the network sees."""
        return tuple(self.manager.get_configuration(self.configuration).patch_size)

    @property
    def classes(self) -> dict[str, tuple[int, ...]]:
        """Foreground classes or regions: names, and the values that belong to them in a segmentation."""
        return foreground_values(self.dataset_json["labels"], self.ignore_label)

    @property
    def ignore_label(self) -> int | None:
        """The value of voxels that nobody judged, if references have them."""
        return self.manager.get_label_manager(self.dataset_json).ignore_label

    @property
    def segmentations(self) -> Segmentations:
        """How its segmentations are stored, for `evaluate_folder`."""
        values = {value for values in class_values(self.dataset_json["labels"]).values() for value in values}
        values.update(self.dataset_json.get("regions_class_order") or ())  # what nnU-Net writes for regions
        reader = self.manager.image_reader_writer_class()
        return Segmentations(
            self.classes, self.ignore_label, self.dataset_json["file_ending"], reader, frozenset(values)
        )

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of a case's images, in the order of their files."""
        # As nnU-Net reads it; older data sets call it modality.
        names = self.dataset_json.get("channel_names") or self.dataset_json["modality"]
        return tuple(str(name) for name in names.values())

    @property
    def input_channels(self) -> int:
        """Channels of the network's input."""
        manager = self.manager
        return determine_num_input_channels(manager, manager.get_configuration(self.configuration), self.dataset_json)

    def network(self, fold: str) -> nn.Module:
        """A fold's network at its own widths, in evaluation mode, on the CPU; one that we can prune takes any weights.

        Raises:
            ValueError: The checkpoint is of another architecture than the plans.
        """
        network, _ = network_of_plans(self.manager, self.configuration, self.dataset_json, device="cpu")
        if is_prunable(network):
            accept_pruned_weights(network)
        try:
            network.load_state_dict(self.checkpoints[fold]["network_weights"])
        except RuntimeError as error:
            raise ValueError(
                f"{self.folder / f'fold_{fold}' / self.checkpoint_name} is of another architecture than plans.json "
                f"says; a trainer that builds a network of its own ({self.checkpoints[fold]['trainer_name']}?) cannot "
                f"be read. {str(error)[:300]}"
            ) from error
        return network.eval()

    def network_of_trainer(self, fold: str) -> nn.Module:
        """A fold's network as its trainer builds it, where that is not what the plans say; such as nnUNetTrainerBN.

        Raises:
            ValueError: nnU-Net cannot build it either.
        """
        predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
        try:
            predictor.initialize_from_trained_model_folder(str(self.folder), (fold,), self.checkpoint_name)
        except Exception as error:  # whatever somebody else's trainer raises
            raise ValueError(f"nnU-Net cannot build the network of fold {fold}: {error}") from error
        return predictor.network.eval()

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


def _read(path: Path) -> dict:
    return {key: value for key, value in read_checkpoint(path).items() if key not in NOT_TAKEN_ALONG}
