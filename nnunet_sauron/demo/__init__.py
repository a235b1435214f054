"""`nnUNetv2_sauron demo`: SauronTrainer beside stock nnU-Net on a generated dataset, by nnU-Net's own commands."""

from __future__ import annotations

from .steps import run_demo

__all__ = ["run_demo"]
