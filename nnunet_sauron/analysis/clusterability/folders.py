"""Where the feature maps that `clusterability` measures come from."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image

from ...model.cases import find_cases, preprocess, read_case
from ...model.checkpoints import CHECKPOINT, CHECKPOINTS, logged_settings, read_checkpoint
from ...model.snapshots import FOLDER, MAX_PATCHES, pooled_maps, snapshots
from ...model.trained import TrainedModel, folds_in
from ...plugin.commands import told_by_name, train_command


@dataclass(frozen=True)
class TrainedFold:
    """One training with snapshots.

    Attributes:
        name: What it is called in tables and pictures, different for each.
        folder: The model's folder.
        fold: "0", "1", ... or "all".
        trainer: Name of its class.
        lambda_: Weight of delta_opt; nan without it, as in every trainer but Sauron's.
        snapshots: Pooled feature maps by the number of epochs before them: files, or maps by layer.
    """

    name: str
    folder: Path
    fold: str
    trainer: str
    lambda_: float
    snapshots: Mapping[int, Path | dict[str, np.ndarray]]

    def maps(self, epoch: int) -> dict[str, np.ndarray]:
        """Pooled feature maps by layer, each (patches, channels, *pooled).

        Raises:
            ValueError: The file cannot be read.
        """
        if isinstance(self.snapshots[epoch], dict):
            return self.snapshots[epoch]
        try:
            with np.load(self.snapshots[epoch]) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.snapshots[epoch]} cannot be read: {error}") from error


def find_folds(
    model_folders: Sequence[Path],
    folds: Sequence[str] | None,
    images: Path | None = None,
    checkpoint: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[list[TrainedFold], list[str]]:
    """The trainings with feature maps, and for each of the others a problem with the command that makes them."""
    models, problems = [], []
    for folder in dict.fromkeys(Path(folder) for folder in model_folders):
        names = folds_in(folder)
        there = [folder / f"fold_{name}" for name in names]
        for fold in [fold for fold in folds or () if fold not in names] or ([] if there else ["*"]):
            problems.append(f"{folder} has no fold_{fold} (folds: {', '.join(names) or 'none'}).")
        chosen = [path for path, name in zip(there, names, strict=True) if folds is None or name in folds]
        if not chosen:
            continue
        with_snapshots = {path: snapshots(path / FOLDER) for path in chosen}
        if images is not None:
            with_snapshots = {
                path: found or _of_images(path, images, checkpoint, device, problems)
                for path, found in with_snapshots.items()
            }
        if not any(with_snapshots.values()):
            problems.append(_how_to_get_snapshots(chosen[0]))
        elif images is None:
            without = [path.name for path, found in with_snapshots.items() if not found]
            problems += [f"{folder}/{name} is left out: it has no {FOLDER}/epoch_*.npz." for name in without]
        models += [_model(path, found, checkpoint, problems) for path, found in with_snapshots.items() if found]
    return _named(models), problems


def _of_images(
    fold_folder: Path, images: Path, checkpoint: str | None, device: torch.device | str, problems: list[str]
) -> dict[int, dict[str, np.ndarray]]:
    """The trained network's maps of the middle patches of the first cases, as a snapshot holds them."""
    fold = fold_folder.name.removeprefix("fold_")
    try:
        model = TrainedModel.read(fold_folder.parent, [fold], checkpoint or CHECKPOINT)
        problems += [f"{fold_folder}: {line}" for line in model.remarks]
        model.check_reads_images_alone()
        first = find_cases(images, model)[:MAX_PATCHES]
        cases = [preprocess(model, *read_case(model, case))[0] for case in first]
        data = torch.stack([middle_patch(case, model.patch_size) for case in cases])
        maps = pooled_maps(model.network(fold).to(device), data.to(device))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        problems.append(str(error))
        return {}
    return {model.checkpoints[fold].get("current_epoch", 0): maps}


def middle_patch(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(channels, *voxels) -> (channels, *size): padded where it is smaller; of 2D patches, from the middle slice."""
    if len(size) < image.ndim - 1:
        image = image[:, image.shape[1] // 2]
    image = pad_nd_image(image, size, "constant", {"value": 0})
    starts = [(length - wanted) // 2 for length, wanted in zip(image.shape[1:], size, strict=True)]
    return image[(slice(None), *(slice(a, a + n) for a, n in zip(starts, size, strict=True)))]


def _how_to_get_snapshots(fold_folder: Path) -> str:
    dataset, trainer, plans, configuration = told_by_name(fold_folder.parent)
    fold = fold_folder.name.removeprefix("fold_")
    keeps_them = "StockTrainer" if trainer == "nnUNetTrainer" else trainer  # nnU-Net's own does not
    names, folder = (dataset, configuration, fold, keeps_them, plans), fold_folder.parent
    again = train_command(*names, settings="snapshot_every=10", model_folder=folder)
    return (
        f"{fold_folder} has no {FOLDER}/epoch_*.npz: it was trained without snapshots of feature maps. Train with "
        f"them: {again} (With --c, a finished training of our trainers gets one snapshot, without a trend; "
        f"and -i IMAGES measures the trained network of any model.)"
    )


def _model(fold_folder: Path, found: Mapping[int, Path | dict], name: str | None, problems: list[str]) -> TrainedFold:
    trainer, lambda_ = told_by_name(fold_folder.parent)[1], math.nan
    names = CHECKPOINTS if name is None else (name,)
    checkpoint = next((fold_folder / name for name in names if (fold_folder / name).is_file()), None)
    try:
        if checkpoint is None:
            raise ValueError(f"{fold_folder} has no checkpoint" + (" yet" if name is None else f" {name}"))
        content = read_checkpoint(checkpoint)
        trainer = content.get("trainer_name", trainer)
        lambda_ = float(logged_settings(content).get("lambda_", math.nan))
    except (ValueError, OSError, MemoryError) as error:
        problems.append(f"lambda_ is not known: {error}")
    return TrainedFold("", fold_folder.parent, fold_folder.name.removeprefix("fold_"), trainer, lambda_, found)


def _named(models: list[TrainedFold]) -> list[TrainedFold]:
    """The shortest names that distinguish them."""
    names = [f"{m.trainer}{'' if math.isnan(m.lambda_) else f', lambda {m.lambda_:g}'}" for m in models]
    if len({model.fold for model in models}) > 1:
        names = [f"{name}, fold {model.fold}" for name, model in zip(names, models, strict=True)]
    same = [names[: i + 1].count(name) for i, name in enumerate(names)]
    names = [f"{name} ({k})" if names.count(name) > 1 else name for name, k in zip(names, same, strict=True)]
    return [replace(model, name=name) for name, model in zip(names, models, strict=True)]
