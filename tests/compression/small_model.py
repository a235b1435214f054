"""A model folder as nnU-Net writes it, of an untrained network, and images that fit it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.nn import functional

from nnunet_sauron.model.architecture import network_of_plans

from ..trainers.small import CONFIGURATIONS, dataset_json, plans

RESAMPLING = {
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
}


def write_model(
    folder: Path, dim: int = 2, folds=(0,), widths=(6, 8, 10), architecture="plain", channels=("MRI",),
    reader="SimpleITKIO", ending=".nii.gz", **labels: int | list[int],
) -> Path:  # fmt: skip
    """A folder for `nnUNetv2_predict_from_modelfolder -m`; every fold has weights of its own. Lists are regions."""
    described = plans(widths, architecture, dim)
    dataset = dataset_json() | {"channel_names": dict(enumerate(channels)), "file_ending": ending}
    dataset["labels"].update(labels)
    if any(isinstance(value, list) for value in labels.values()):
        dataset["regions_class_order"] = list(range(1, len(dataset["labels"])))
    configuration = described["configurations"][CONFIGURATIONS[dim]]
    configuration.update(RESAMPLING)
    configuration["normalization_schemes"] *= len(channels)
    configuration["use_mask_for_norm"] *= len(channels)
    described["foreground_intensity_properties_per_channel"] = {str(i): {} for i in range(len(channels))}
    described["image_reader_writer"] = reader
    described.pop("continue_training")
    described.update(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2])
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(described))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    for seed, fold in enumerate(folds):
        torch.manual_seed(seed)
        manager = PlansManager(copy.deepcopy(described))
        network = network_of_plans(manager, CONFIGURATIONS[dim], dataset, device="cpu")
        checkpoint = {
            "network_weights": network.state_dict(),
            "optimizer_state": {"state": {}, "param_groups": []},
            "trainer_name": "nnUNetTrainer",
            "init_args": {
                "plans": described, "configuration": CONFIGURATIONS[dim], "fold": fold, "dataset_json": dataset
            },
            "inference_allowed_mirroring_axes": None,
            "current_epoch": 1000,
            "logging": {},
        }  # fmt: skip
        (folder / f"fold_{fold}").mkdir()
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
        (folder / f"fold_{fold}" / "progress.png").touch()  # where there is none, `compress` draws one
    return folder


def write_images(
    folder: Path, count: int = 4, shape=(6, 24, 24), channels: int = 1, labels: Path | None = None
) -> Path:
    """Smooth random images CASE_0000.nii.gz and, if asked for, segmentations of them."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for case in range(count):
        for channel in range(channels):
            coarse = torch.randn(1, 1, 3, 6, 6, generator=generator)
            voxels = functional.interpolate(coarse, size=shape, mode="trilinear")[0, 0].numpy()
            _write(voxels.astype(np.float32), folder / f"case_{case}_{channel:04d}.nii.gz")
        if labels:
            labels.mkdir(exist_ok=True)
            _write((voxels > 0.3).astype(np.uint8) + (voxels > 0.8), labels / f"case_{case}.nii.gz")
    return folder


def _write(voxels: np.ndarray, path: Path) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(path))
