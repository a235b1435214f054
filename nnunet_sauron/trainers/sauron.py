"""SauronTrainer: `nnUNetv2_train DATASET CONFIGURATION FOLD -tr SauronTrainer`."""

from __future__ import annotations

from ..methods.sauron import Sauron
from .pruning import PruningTrainer


class SauronTrainer(PruningTrainer):
    """Draws feature maps into clusters and removes the redundant ones while training (see `methods.sauron`)."""

    Method = Sauron
