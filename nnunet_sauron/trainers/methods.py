"""One trainer a method: `nnUNetv2_train DATASET CONFIGURATION FOLD -tr NAME`. What each does stands in `methods`."""

from __future__ import annotations

from ..methods.autopruner import AutoPruner
from ..methods.csgd import CSGD
from ..methods.fpgm import FPGM
from ..methods.l1 import L1
from ..methods.random import RandomLargestLayer
from ..methods.sauron import Sauron
from ..methods.sfp import SFP
from ..methods.stamp import STAMP, STAMPRandomChannel
from ..methods.taylor import Taylor
from .pruning import PruningTrainer


class SauronTrainer(PruningTrainer):
    """Draws feature maps together and removes the redundant ones, by a threshold for each layer."""

    Method = Sauron


class STAMPTrainer(PruningTrainer):
    """Cuts the channels of the lowest activations step by step, with targeted dropout."""

    Method = STAMP


class STAMPRandomChannelTrainer(PruningTrainer):
    """STAMP picks the layer, chance picks the channel."""

    Method = STAMPRandomChannel


class RandomLargestLayerTrainer(PruningTrainer):
    """Cuts random channels of the layer that is widest now."""

    Method = RandomLargestLayer


class FPGMTrainer(PruningTrainer):
    """Zeroes the filters nearest their layer's geometric median after every epoch; cuts them at the end."""

    Method = FPGM


class SFPTrainer(PruningTrainer):
    """Zeroes the filters of the smallest L2 norm after every epoch; cuts them at the end."""

    Method = SFP


class L1Trainer(PruningTrainer):
    """Cuts the filters of the smallest L1 norm step by step."""

    Method = L1


class TaylorTrainer(PruningTrainer):
    """Cuts the channels of the smallest |activation * gradient| step by step."""

    Method = Taylor


class CSGDTrainer(PruningTrainer):
    """Draws the filters of a cluster together, then merges them."""

    Method = CSGD


class AutoPrunerTrainer(PruningTrainer):
    """Learns a code per channel, annealed to 0 or 1; cuts the channels of the lowest codes."""

    Method = AutoPruner
