"""The networks that plans of a pruned checkpoint name: nnU-Net's U-Nets with a width of its own for every layer.

nnU-Net finds these classes by the name in the plans, whatever the trainer, and initialises them as its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from ..pruning import channel_layout, resize


class PrunedPlainConvUNet(PlainConvUNet):
    """`PlainConvUNet`, narrower layer by layer.

    nnU-Net's memory estimate, `compute_conv_feature_map_size`, goes by the widths of stages and blocks: a transposed
    convolution counts as wide as the skip beside it, and a residual block's inner convolution as its output.

    Args:
        widths: Channels by unit name, as in `channel_layout(network).widths`; units not named keep what
            `features_per_stage` gives them.
        args, kwargs: As `PlainConvUNet` takes them.

    Raises:
        ValueError: An unknown unit, a width below 1, or one above what `features_per_stage` gives.
    """

    def __init__(self, *args, widths: Mapping[str, int], **kwargs):
        super().__init__(*args, **kwargs)
        _narrow(self, widths)


class PrunedResidualEncoderUNet(ResidualEncoderUNet):
    """`ResidualEncoderUNet`, narrower layer by layer; arguments and errors as for `PrunedPlainConvUNet`."""

    def __init__(self, *args, widths: Mapping[str, int], **kwargs):
        super().__init__(*args, **kwargs)
        _narrow(self, widths)


def _narrow(network: nn.Module, widths: Mapping[str, int]) -> None:
    dense = channel_layout(network).widths
    for name, width in widths.items():
        # A channel that `resize` adds has a norm weight of zero, which nnU-Net's initialisation leaves as it is.
        if width > dense.get(name, width):
            raise ValueError(
                f"Unit '{name}' is to have {width} channels, more than the {dense[name]} of features_per_stage; "
                f"correct the plans' 'widths' or 'features_per_stage'."
            )
    resize(network, widths)
