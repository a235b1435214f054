from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_sauron.planning.widths import Flat
from nnunet_sauron.pruning import count_macs, count_parameters

DEFAULT = [32, 64, 128, 256, 320, 320]


def unet(widths: list[int]) -> nn.Module:
    """nnU-Net's 3D default: isotropic, 6 stages of 2 convolutions, 1 input channel, 3 classes."""
    with torch.device("meta"):
        return PlainConvUNet(
            1, 6, widths, nn.Conv3d, 3, [1, 2, 2, 2, 2, 2], 2, 3, 2, conv_bias=True,
            norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        )  # fmt: skip


@pytest.mark.parametrize(("width", "times_fewer", "macs_saved"), [(32, 40.9, 41.8), (16, 162.7, 85.3)])
def test_flat_widths_save_what_counting_nnunets_default_says(width: int, times_fewer: float, macs_saved: float) -> None:
    dense, flat = unet(DEFAULT), unet(Flat(width).of_stages("3d_fullres", DEFAULT))
    assert count_parameters(dense) == 31_196_399
    assert round(count_parameters(dense) / count_parameters(flat), 1) == times_fewer
    ratio = count_macs(flat, (128, 128, 128), 1) / count_macs(dense, (128, 128, 128), 1)
    assert round(100 * (1 - ratio), 1) == macs_saved
