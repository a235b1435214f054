# nnunet_sauron shim
"""Shows nnU-Net the trainers of the package nnunet-sauron; put here or named in nnUNet_extTrainer, never to be edited.

nnU-Net imports module after module while it looks for a trainer. Should nnunet-sauron be gone, this one has nothing to
offer, and must not stop the search for other trainers. Any other error is real and is left to be seen.
"""

from __future__ import annotations

try:
    from nnunet_sauron.trainers import (  # noqa: F401
        AutoPrunerTrainer,
        CompressedTrainer,
        CSGDTrainer,
        FPGMTrainer,
        L1Trainer,
        RandomLargestLayerTrainer,
        SauronTrainer,
        SFPTrainer,
        ShrinkTrainer,
        STAMPRandomChannelTrainer,
        STAMPTrainer,
        StockTrainer,
        TaylorTrainer,
    )
except ModuleNotFoundError as error:
    if error.name != "nnunet_sauron":
        raise
