"""Structured removal of channels: pure PyTorch, knows networks and optimisers, nothing of nnU-Net's trainer."""

from .channels import ChannelLayout, ChannelUnit, channel_layout
from .cost import CostModel, count_macs, count_parameters, feature_map_voxels
from .loading import accept_pruned_weights, accepts_pruned_weights, densify, resize, widths_of
from .merging import merge_channels
from .moments import position_weights
from .ranking import Ranking, rank_units
from .removal import remove_channels

__all__ = [
    "ChannelLayout",
    "ChannelUnit",
    "CostModel",
    "Ranking",
    "accept_pruned_weights",
    "accepts_pruned_weights",
    "channel_layout",
    "count_macs",
    "count_parameters",
    "densify",
    "feature_map_voxels",
    "merge_channels",
    "position_weights",
    "rank_units",
    "remove_channels",
    "resize",
    "widths_of",
]
