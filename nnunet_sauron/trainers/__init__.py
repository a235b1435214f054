"""Trainers that nnU-Net finds by name (`-tr`)."""

from .compressed import CompressedTrainer
from .methods import (
    AutoPrunerTrainer,
    CSGDTrainer,
    FPGMTrainer,
    L1Trainer,
    RandomLargestLayerTrainer,
    SauronTrainer,
    SFPTrainer,
    STAMPRandomChannelTrainer,
    STAMPTrainer,
    TaylorTrainer,
)
from .pruning import PruningTrainer
from .shrink import ShrinkTrainer
from .stock import StockTrainer

__all__ = [
    "AutoPrunerTrainer",
    "CSGDTrainer",
    "CompressedTrainer",
    "FPGMTrainer",
    "L1Trainer",
    "PruningTrainer",
    "RandomLargestLayerTrainer",
    "SFPTrainer",
    "STAMPRandomChannelTrainer",
    "STAMPTrainer",
    "SauronTrainer",
    "ShrinkTrainer",
    "StockTrainer",
    "TaylorTrainer",
]
