"""The dense network that a training's plans describe: what it costs at any widths, and whether settings fit it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..methods.distributed import number_of_ranks
from ..methods.limits import PruningSettings
from ..model.architecture import network_of_plans
from ..model.checkpoints import read_checkpoint
from ..pruning import CostModel, channel_layout, feature_map_voxels, widths_of
from ..pruning.channels import check_prunable
from ..pruning.moments import LEAST_SAMPLES_PER_CHANNEL, SAMPLES_PER_CHANNEL, patches_needed

MERGE_BATCHES = 6


class PlannedNetwork:
    """A network of the meta device, without memory, so that settings can be refused before anything is written.

    Args:
        plans, configuration, dataset_json: As a trainer's constructor gets them.

    Attributes:
        layout: The dense network's channel layout.
        cost: Its parameters and multiply-accumulates, at any widths.

    Raises:
        ValueError: The plans' network cannot be pruned.
    """

    def __init__(self, plans: dict, configuration: str, dataset_json: dict):
        manager = PlansManager(plans)
        chosen = manager.get_configuration(configuration)
        check_prunable(chosen.network_arch_class_name)
        self._network = network_of_plans(manager, configuration, dataset_json)
        channels = determine_num_input_channels(manager, chosen, dataset_json)
        self.layout = channel_layout(self._network)
        self.cost = CostModel(self._network, chosen.patch_size, channels)
        self._voxels = feature_map_voxels(self._network, chosen.patch_size, channels)
        self._batch_size = chosen.batch_size

    def widths_in(self, checkpoint: str | Path | None) -> dict[str, int] | None:
        """Channels of each unit in a checkpoint; None without one, and for a network of another topology.

        Raises:
            FileNotFoundError, ValueError: It is missing, or cannot be read.
        """
        return widths_of(self._network, read_checkpoint(checkpoint)["network_weights"]) if checkpoint else None

    def merge_batches(self, settings: PruningSettings, widths: Mapping[str, int], batch_size: int) -> int:
        """The number of batches to fit a merge on, at these widths."""
        wanted = patches_needed(self._voxels, widths, SAMPLES_PER_CHANNEL)
        return settings.merge_batches or max(MERGE_BATCHES, -(-wanted // batch_size))

    def check_merge_batches(self, settings: PruningSettings) -> None:
        """Raise ValueError if `merge_batches` is too small for a stable fit of the dense network's layers."""
        batches = settings.merge_batches
        # nnU-Net divides a batch among the ranks, and each fits on its own part.
        batch_size = max(1, self._batch_size // number_of_ranks())
        least = -(-patches_needed(self._voxels, self.layout.widths, LEAST_SAMPLES_PER_CHANNEL) // batch_size)
        if settings.merge and batches is not None and batches < least:
            raise ValueError(
                f"merge_batches={batches} of {batch_size} patches are too few for a stable fit of these layers; take "
                f"at least {least}, or None, which takes enough."
            )
