"""Shows nnU-Net the study's own trainer: this folder is named in nnUNet_extTrainer beside the package's.

nnU-Net forgets all modules under a folder that it has searched, so the trainer itself lies outside of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tucker_trainer import TuckerTrainer  # noqa: F401
