"""The networks that the tests prune: every architecture x dimension x norm x widths that the package supports."""

from __future__ import annotations

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BottleneckD
from torch import nn

WIDTHS = (6, 8, 10)
EQUAL_WIDTHS = (8, 8, 8)


def build(
    architecture: str = "plain",
    dim: int = 2,
    widths: tuple[int, ...] = WIDTHS,
    norm: str = "instance",
    deep_supervision: bool = False,
    seed: int = 0,
    classes: int = 3,
) -> nn.Module:
    """A small U-Net of nnU-Net's own classes, as its plans build them, with two input channels."""
    torch.manual_seed(seed)
    norms = {
        ("instance", 2): nn.InstanceNorm2d,
        ("instance", 3): nn.InstanceNorm3d,
        ("batch", 2): nn.BatchNorm2d,
        ("batch", 3): nn.BatchNorm3d,
    }
    common = {
        "input_channels": 2,
        "n_stages": len(widths),
        "features_per_stage": list(widths),
        "conv_op": nn.Conv2d if dim == 2 else nn.Conv3d,
        "kernel_sizes": [[3] * dim] * len(widths),
        "strides": [[1] * dim] + [[2] * dim] * (len(widths) - 1),
        "num_classes": classes,
        "n_conv_per_stage_decoder": [2] * (len(widths) - 1) if architecture == "plain" else [1] * (len(widths) - 1),
        "conv_bias": True,
        "norm_op": norms[norm, dim],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": deep_supervision,
    }
    if architecture == "plain":
        network = PlainConvUNet(n_conv_per_stage=[2] * len(widths), **common)
    else:
        bottleneck = {"block": BottleneckD, "bottleneck_channels": [4] * len(widths)}
        network = ResidualEncoderUNet(
            n_blocks_per_stage=[1, 2, 2][: len(widths)] + [2] * (len(widths) - 3),
            **(bottleneck if architecture == "bottleneck" else {}),
            **common,
        )
    network.apply(network.initialize)
    return randomise_norms(network)


def randomise_norms(network: nn.Module) -> nn.Module:
    """Affine parameters and statistics that differ by channel, so that a mix-up of channels shows."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            if module.running_mean is not None:
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def patch(dim: int = 2, batch: int = 2, side: int = 16, seed: int = 1) -> torch.Tensor:
    """A random input (batch, 2, side, ...) for `build`."""
    return torch.randn((batch, 2, *[side] * dim), generator=torch.Generator().manual_seed(seed))
