"""Plans of a small dataset as nnU-Net writes them: 2d, 3d_fullres, 3d_lowres and the cascade."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

DATASET = "Dataset007_Small"
UNETS = "dynamic_network_architectures.architectures.unet"


def write_plans(preprocessed: Path, name: str = "nnUNetPlans", **changes: object) -> Path:
    """Write a dataset's folder, if it is not there yet, and plans into it; `changes` are keys of the plans."""
    folder = preprocessed / DATASET
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(dataset_json()))
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**plans(), "plans_name": name, **changes}, indent=4))
    return path


def dataset_json() -> dict:
    labels = {"background": 0, "low": 1, "high": 2}
    return {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 100, "file_ending": ".nii.gz"}


def plans(residual: bool = False) -> dict:
    fullres = configuration([16, 32, 32], [40.0, 48.0, 33.0], residual)
    lowres = configuration([16, 16, 16], [20.0, 24.0, 16.0], residual)
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [36, 48, 33],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "2d": {**configuration([32, 32], [48.0, 33.0], residual), "data_identifier": "nnUNetPlans_2d"},
            "3d_lowres": {
                **lowres,
                "data_identifier": "nnUNetPlans_3d_lowres",
                "next_stage": "3d_cascade_fullres",
            },
            "3d_fullres": {**fullres, "data_identifier": "nnUNetPlans_3d_fullres"},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }


def configuration(patch_size: list[int], median: list[float], residual: bool = False) -> dict:
    """A configuration of three stages, the first of them not pooled along the first axis if there are three."""
    axes, widths = len(patch_size), [8, 12, 12]
    strides = [[1] * axes, [1, 2, 2][-axes:], [2] * axes]
    arguments = {
        "n_stages": 3,
        "features_per_stage": widths,
        "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
        "kernel_sizes": [[3] * axes] * 3,
        "strides": strides,
        **({"n_blocks_per_stage": [1, 2, 2]} if residual else {"n_conv_per_stage": [2, 2, 2]}),
        "n_conv_per_stage_decoder": [1, 1] if residual else [2, 2],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch_size,
        "median_image_size_in_voxels": median,
        "spacing": [1.0] * axes,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": True,
        "architecture": {
            "network_class_name": f"{UNETS}.{'ResidualEncoderUNet' if residual else 'PlainConvUNet'}",
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def network(architecture: dict, input_channels: int = 1, classes: int = 3) -> nn.Module:
    """What nnU-Net builds of an `architecture`, with seeded weights."""
    torch.manual_seed(0)
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        input_channels,
        classes,
        deep_supervision=False,
    )


def write_checkpoint(path: Path, weights: dict, trained: dict, configuration: str = "3d_fullres") -> Path:
    """A checkpoint as nnU-Net's trainers write it, as far as widths are concerned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = {"plans": copy.deepcopy(trained), "configuration": configuration, "dataset_json": dataset_json()}
    torch.save({"network_weights": weights, "init_args": arguments, "trainer_name": "SauronTrainer"}, path)
    return path
