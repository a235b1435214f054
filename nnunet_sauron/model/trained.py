"""A trained model's folder, as nnU-Net writes it: its networks, plans and data set description."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from ..files import read_json_object
from ..plugin.commands import continue_command
from .checkpoints import CHECKPOINT, MIRRORING, checkpoints_in, read_checkpoint, trained_with
from .compiling import compiling_on_cuda_only
from .evaluation import Segmentations
from .labels import class_values, foreground_values, other_classes
from .networks import BUILT_BY, NetworkBuilder

ALL = "all"  # nnU-Net's name for the fold that trains on everything
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
        left_out: A sentence for each fold that is there and was not read though none were asked for by name.
    """

    folder: Path
    plans: dict
    dataset_json: dict
    configuration: str
    checkpoints: Mapping[str, dict]
    checkpoint_name: str = CHECKPOINT
    left_out: tuple[str, ...] = ()

    @classmethod
    def read(
        cls,
        folder: Path,
        folds: list[str] | None = None,
        checkpoint_name: str = CHECKPOINT,
        on_error: Callable[[str], None] | None = None,
        *,
        every_fold: bool = False,
        first_only: bool = False,
    ) -> TrainedModel:
        """Read a model's folder.

        Args:
            folder: With plans.json, dataset.json and fold_*/`checkpoint_name`.
            folds: Only these; None for those that nnU-Net predicts with: the numbered ones, or "all" where it is alone.
            checkpoint_name: Such as checkpoint_best.pth.
            on_error: Given what is wrong with a fold, which is then left out; without it, that is raised.
            every_fold: With no `folds`, "all" is read beside numbered ones.
            first_only: No other than the first of them is read.

        Raises:
            FileNotFoundError: The folder, a file in it or a fold is missing.
            ValueError: A checkpoint cannot be read, or plans.json or dataset.json are not those of a model.
        """
        folder = folder.resolve()
        if is_bundle(folder):
            raise FileNotFoundError(
                f"{folder} is {'a file' if folder.is_file() else 'a bundle'}, expected the folder of a trained model; "
                f"bundles are for predict and report."
            )
        for name in ("plans.json", "dataset.json"):
            if not (folder / name).is_file():
                such_as = "nnUNet_results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__2d"
                if (folder.parent / name).is_file():
                    such_as = str(folder.parent)
                raise FileNotFoundError(
                    f"{folder} has no {name}; give the folder of a trained model, such as {such_as}."
                )
        plans, dataset_json = (
            read_json_object(folder / name, f"copy {name} anew from where the model was trained")
            for name in ("plans.json", "dataset.json")
        )
        chosen, left_out = _chosen_folds(folder, folds, checkpoint_name, every_fold)
        if first_only:
            chosen = chosen[:1]
        checkpoints = {}
        for fold in chosen:
            try:
                checkpoints[fold] = _read(folder / f"fold_{fold}" / checkpoint_name)
            except (ValueError, OSError, MemoryError) as error:
                if on_error is None or len(chosen) == 1:
                    raise
                on_error(str(error))
                left_out.append(f"Fold {fold} is left out: its {checkpoint_name} cannot be read.")
        if not checkpoints:
            raise ValueError(f"No fold of {folder} can be read; copy them anew from where they were trained.")
        configuration = next(iter(checkpoints.values()))["init_args"]["configuration"]
        model = cls(folder, plans, dataset_json, configuration, checkpoints, checkpoint_name, tuple(left_out))
        model._check()
        return model

    def _check(self) -> None:
        """Raise ValueError if nnU-Net can do nothing with the two JSON files."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                self.manager.get_configuration(self.configuration)
                _ = self.segmentations, self.input_channels, self.channel_names, self.patch_size
                _ = self.plans["dataset_name"], self.plans["plans_name"]
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
        """Voxels per axis of the network's input."""
        return tuple(self.manager.get_configuration(self.configuration).patch_size)

    @property
    def classes(self) -> dict[str, tuple[int, ...]]:
        """Foreground classes or regions: names, and the values that belong to them in a segmentation."""
        return foreground_values(self.dataset_json["labels"], self.ignore_label)

    @property
    def ignore_label(self) -> int | None:
        """The value of voxels without a reference label, if there is one."""
        return self.manager.get_label_manager(self.dataset_json).ignore_label

    @property
    def has_regions(self) -> bool:
        """Whether its classes may overlap, and its outputs go through a sigmoid."""
        return self.manager.get_label_manager(self.dataset_json).has_regions

    def check_reads_images_alone(self) -> None:
        """Raise ValueError if it reads another model's segmentations as well."""
        if self.manager.get_configuration(self.configuration).previous_stage_name is not None:
            raise ValueError(
                f"{self.folder} is the second stage of a cascade, which reads segmentations beside images; give a "
                f"model of 2d, 3d_lowres or 3d_fullres."
            )

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
        if all(str(key).isdigit() for key in names):  # the number in a file's name, whatever their order here
            names = {key: names[key] for key in sorted(names, key=int)}
        return tuple(str(name) for name in names.values())

    @property
    def trainer_names(self) -> list[str]:
        """The trainers that predicting needs: its own, and the one whose network it is where its plans name another."""
        built_by = self.plans["configurations"][self.configuration].get(BUILT_BY)
        return [next(iter(self.checkpoints.values()))["trainer_name"], *([built_by] if built_by else [])]

    @property
    def mirror_axes(self) -> tuple[int, ...] | None:
        """Axes of a patch that may be mirrored, as in its training; None for none."""
        return next(iter(self.checkpoints.values())).get(MIRRORING)

    @property
    def input_channels(self) -> int:
        """Channels of the network's input."""
        manager = self.manager
        return determine_num_input_channels(manager, manager.get_configuration(self.configuration), self.dataset_json)

    @property
    def remarks(self) -> list[str]:
        """Remarks for the user: folds that were not read, assumptions that were made, classes of other names."""
        said = {fold: other_classes(checkpoint, self.dataset_json) for fold, checkpoint in self.checkpoints.items()}
        other = [f"Fold {fold} {words}" for fold, words in said.items() if words]
        return [*self.left_out, *other, *([self.builder.assumed] if self.builder.assumed else [])]

    @functools.cached_property
    def builder(self) -> NetworkBuilder:
        """Builds its networks as its trainer does.

        Raises:
            ValueError: That fails; the message names the trainer.
        """
        # As nnU-Net predicts: the first fold's trainer is that of all.
        return NetworkBuilder(self.trainer_names[0], self.manager, self.configuration, self.dataset_json)

    def network(self, fold: str) -> nn.Module:
        """A fold's network at its own widths, in evaluation mode, on the CPU.

        Raises:
            ValueError: Its trainer cannot build it, or the checkpoint is of another architecture.
        """
        return self.builder.load(self.checkpoints[fold], self.folder / f"fold_{fold}" / self.checkpoint_name)

    def predictor(self, device: torch.device, weights: list[dict] | None = None) -> nnUNetPredictor:
        """nnU-Net's own prediction with this model, or with other weights of it; without mirroring, for speed."""
        weights = weights or [checkpoint["network_weights"] for checkpoint in self.checkpoints.values()]
        first = next(iter(self.checkpoints))
        with contextlib.redirect_stdout(io.StringIO()), compiling_on_cuda_only(device):
            predictor = nnUNetPredictor(
                use_mirroring=False, perform_everything_on_device=device.type == "cuda", device=device, allow_tqdm=False
            )
            predictor.manual_initialization(
                self.network(first),
                self.manager,
                self.manager.get_configuration(self.configuration),
                weights,
                self.dataset_json,
                self.builder.trainer_name,
                self.mirror_axes,
            )
        return predictor


def is_bundle(path: Path) -> bool:
    """Whether `export` may have written it: a zip, or a folder with bundle.json."""
    return path.is_file() or (path / "bundle.json").is_file()


def folds_in(folder: Path) -> list[str]:
    """Names of a model's folds: numbers in their order, then "all". A copy, such as fold_0_old, is none of them."""
    names = (path.name.removeprefix("fold_") for path in folder.glob("fold_*"))
    return sorted(
        (name for name in names if name == ALL or name.isdecimal()),
        key=lambda name: (name == ALL, int(name) if name.isdecimal() else 0),
    )


def _read(path: Path) -> dict:
    checkpoint = read_checkpoint(path)
    trained_with(checkpoint, path)  # which it must tell
    if "trainer_name" not in checkpoint:
        raise ValueError(f"{path} does not name its trainer (no 'trainer_name'), without which nnU-Net reads no model.")
    return {key: value for key, value in checkpoint.items() if key not in NOT_TAKEN_ALONG}


def _chosen_folds(
    folder: Path, wanted: list[str] | None, checkpoint_name: str, every_fold: bool
) -> tuple[list[str], list[str]]:
    """The folds to read, and a sentence for each one that is left out.

    Raises:
        FileNotFoundError: One of them does not have that checkpoint, or none has.
        ValueError: The checkpoint's name is a path.
    """
    if Path(checkpoint_name).name != checkpoint_name:  # it would lead out of the fold
        raise ValueError(
            f"-chk {checkpoint_name} is no file name; give that of a file in fold_*, such as {CHECKPOINT}."
        )
    folds = folds_in(folder)
    files = {fold: [path.name for path in checkpoints_in(folder / f"fold_{fold}")] for fold in folds}
    there = [fold for fold in folds if (folder / f"fold_{fold}" / checkpoint_name).is_file()]
    missing = [fold for fold in wanted or there if fold not in there]
    if unknown := [fold for fold in missing if folds and fold not in folds]:
        raise FileNotFoundError(
            f"{folder} has no fold {unknown[0]}; there are {', '.join(folds)}. -f takes numbers with spaces between or "
            f"{ALL}: -f {' '.join(folds[:2])}."
        )
    if missing or not there:
        raise FileNotFoundError(_no_such_checkpoint(folder, missing, checkpoint_name, files))
    if wanted:
        return list(dict.fromkeys(wanted)), []
    left_out = [
        f"Fold {fold} is left out: it has no {checkpoint_name} ({', '.join(files[fold]) or 'no checkpoint'})."
        for fold in folds
        if fold not in there
    ]
    if ALL in there and len(there) > 1 and not every_fold:
        there.remove(ALL)
        left_out.append(
            f"Fold {ALL} is left out beside {', '.join(there)}, as in nnU-Net's prediction; -f {ALL} takes it."
        )
    return there, left_out


def _no_such_checkpoint(folder: Path, missing: list[str], name: str, files: Mapping[str, list[str]]) -> str:
    """What folds have instead of a checkpoint of this name, and what to do; without `missing`, none has it."""
    others = dict.fromkeys(other for fold in missing or files for other in files[fold])
    has = ", ".join(f"fold_{fold}: {' '.join(found) or 'none'}" for fold, found in files.items()) or "no fold at all"
    said = f"{folder} has no fold_{missing[0] if missing else '*'}/{name}. Checkpoints there are: {has}."
    end = f"the training end, which writes {CHECKPOINT}. To go on: "
    end += continue_command(folder, missing[0] if missing else "FOLD")
    if not others:
        return f"{said} Let {end}"
    said += f" Read another one with -chk {shlex.quote(next(iter(others)))}"
    return f"{said}." if CHECKPOINT in others else f"{said}, or let {end}"
