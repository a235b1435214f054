"""Plans made tiny by hand, as nnU-Net allows: few stages, few channels, small patches."""

from __future__ import annotations

import copy

UNETS = "dynamic_network_architectures.architectures.unet"


def make_tiny(configurations: dict) -> None:
    """Give 2d and 3d_fullres three stages of 8, 12 and 16 channels, and add nnU-Net's cascade."""
    _shrink(configurations["2d"], patch_size=[32, 32])
    fullres = configurations["3d_fullres"]
    _shrink(fullres, patch_size=[16, 32, 32])
    configurations["3d_lowres"] = lowres = copy.deepcopy(fullres)
    lowres["data_identifier"] = "nnUNetPlans_3d_lowres"
    lowres["spacing"] = [2 * side for side in fullres["spacing"]]
    lowres["median_image_size_in_voxels"] = [side / 2 for side in fullres["median_image_size_in_voxels"]]
    lowres["patch_size"] = [8, 16, 16]
    lowres["next_stage"] = "3d_cascade_fullres"
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}


def make_residual(configurations: dict) -> None:
    """Exchange 3d_fullres' network for a residual encoder U-Net, as nnU-Net's ResEnc plans name it."""
    architecture = configurations["3d_fullres"]["architecture"]
    architecture["network_class_name"] = f"{UNETS}.ResidualEncoderUNet"
    arguments = architecture["arch_kwargs"]
    del arguments["n_conv_per_stage"]
    arguments["n_blocks_per_stage"] = [1, 2, 2]
    arguments["n_conv_per_stage_decoder"] = [1, 1]


def _shrink(configuration: dict, patch_size: list[int], widths: tuple[int, ...] = (8, 12, 16)) -> None:
    axes, stages = len(patch_size), len(widths)
    configuration["batch_size"] = 2
    configuration["patch_size"] = patch_size
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=list(widths),
        kernel_sizes=[[3] * axes] * stages,
        strides=[[1] * axes] + [[2] * axes] * (stages - 1),
        n_conv_per_stage=[1, 2, 2][:stages],
        n_conv_per_stage_decoder=[1] * (stages - 1),
    )
