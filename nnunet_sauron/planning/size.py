"""The cost of a configuration of plans, without building its network's weights."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from ..model.architecture import network_of_plans
from ..pruning import count_macs, count_parameters


@dataclass(frozen=True)
class ConfigurationSize:
    """Cost of a configuration's network.

    Attributes:
        widths: Channels of each encoder stage's output, highest resolution first.
        parameters: Number of parameters.
        macs: Multiply-accumulates of one patch, as in prediction.
        patch_size: Voxels per axis.
        batch_size: Patches.
        feature_map_values: Values in the feature maps of a batch: nnU-Net's memory estimate times `batch_size`.
    """

    widths: tuple[int, ...]
    parameters: int
    macs: int
    patch_size: tuple[int, ...]
    batch_size: int
    feature_map_values: int

    @property
    def stages(self) -> int:
        """Resolution stages."""
        return len(self.widths)


def configuration_size(plans: PlansManager, configuration: str, dataset_json: dict) -> ConfigurationSize:
    """Count one configuration's network.

    Args:
        plans: Plans that have it.
        configuration: Its name.
        dataset_json: The dataset's, for input channels and classes.
    """
    network = network_of_plans(plans, configuration, dataset_json)
    manager = plans.get_configuration(configuration)
    input_channels = determine_num_input_channels(plans, manager, dataset_json)
    return ConfigurationSize(
        widths=tuple(network.encoder.output_channels),
        parameters=count_parameters(network),
        macs=count_macs(network, manager.patch_size, input_channels),
        patch_size=tuple(manager.patch_size),
        batch_size=manager.batch_size,
        feature_map_values=feature_map_values(network, manager.patch_size) * manager.batch_size,
    )


def feature_map_values(network: nn.Module, patch_size) -> int:
    """nnU-Net's memory estimate: values in the feature maps of one patch, as `static_estimate_VRAM_usage` counts."""
    return int(network.compute_conv_feature_map_size(patch_size))
