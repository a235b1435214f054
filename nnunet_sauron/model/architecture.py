"""The network that plans describe, built as nnU-Net builds it."""

from __future__ import annotations

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn


def network_of_plans(plans: PlansManager, configuration: str, dataset_json: dict, device: str = "meta") -> nn.Module:
    """A configuration's network, not initialised and without deep supervision.

    Args:
        plans: Plans that have the configuration.
        configuration: Its name.
        dataset_json: The dataset's, for input channels and classes.
        device: Where its weights lie; "meta" holds shapes and no weights.
    """
    manager = plans.get_configuration(configuration)
    with torch.device(device):
        return get_network_from_plans(
            manager.network_arch_class_name,
            manager.network_arch_init_kwargs,
            manager.network_arch_init_kwargs_req_import,
            determine_num_input_channels(plans, manager, dataset_json),
            plans.get_label_manager(dataset_json).num_segmentation_heads,
            allow_init=False,
        )
