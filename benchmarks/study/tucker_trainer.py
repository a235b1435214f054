"""TuckerTrainer: a trained model in low rank, then CompressedTrainer's recovery, so that the two can be compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import nn
from tucker import Ranks, accept_low_ranks, lower_ranks, ranks_for, ranks_in

from nnunet_sauron.trainers.compressed import CompressedSettings, CompressedTrainer


@dataclass(frozen=True, kw_only=True)
class TuckerSettings(CompressedSettings):
    """CompressedTrainer's, and how small.

    Attributes:
        target_macs: The part of the multiply-accumulates of a patch that stays.
        min_rank: No rank is below it, where a layer has that many channels; tucker-cnn's configurations have 8.
    """

    target_macs: float = 0.1
    min_rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target_macs < 1:
            raise ValueError(f"target_macs is the part that stays, in (0, 1); got {self.target_macs}.")
        if self.min_rank < 1:
            raise ValueError(f"min_rank must be at least 1; got {self.min_rank}.")


class TuckerTrainer(CompressedTrainer):
    """Starts from a trained model, of which it makes the Tucker-2 decomposition; `tucker.py` says how.

    nnunet_sauron="start_from=MODEL_FOLDER,teacher=MODEL_FOLDER" nnUNetv2_train DATASET CONFIGURATION FOLD -tr
    TuckerTrainer
    """

    MoreSettings = (TuckerSettings,)

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        return accept_low_ranks(network)

    def initialize(self) -> None:
        begins = self._start is not None and self._start.checkpoint is not None
        super().initialize()
        if begins:
            settings = self.settings(TuckerSettings)
            manager = self.configuration_manager
            channels = determine_num_input_channels(self.plans_manager, manager, self.dataset_json)
            ranks = ranks_for(
                self.bare_network, settings.target_macs, manager.patch_size, channels, settings.min_rank
            )  # fmt: skip
            self.take_widths(ranks)
            of_layers = ", ".join(f"{name} {of_layer[0]} and {of_layer[1]}" for name, of_layer in ranks.items())
            self.print_to_log_file(f"Ranks of the input and of the output channels: {of_layers}")

    def take_widths(self, widths: Ranks) -> None:
        """Ranks are to this network what widths are to a pruned one."""
        if widths:
            bare = self.bare_network
            self.unwrap()
            lower_ranks(bare, widths)
            self.optimizer, self.lr_scheduler = self.configure_optimizers()
            self.wrap()
            torch._dynamo.reset()

    def _widths(self, checkpoint: dict, name: str) -> Ranks:
        return ranks_in(self.bare_network, checkpoint["network_weights"])
