"""Trainers that nnU-Net finds by name (`-tr`)."""

from .pruning import PruningTrainer
from .sauron import SauronTrainer
from .stock import StockTrainer

__all__ = ["PruningTrainer", "SauronTrainer", "StockTrainer"]
