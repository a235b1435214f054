"""FPGM: removes the filters nearest the geometric median of their layer, which the others can replace.

He et al.: Filter pruning via geometric median for deep convolutional neural networks acceleration. CVPR 2019,
arXiv 1811.00250.
"""

from __future__ import annotations

import torch

from .sfp import SoftPruning


class FPGM(SoftPruning):
    """By the summed Euclidean distance to all other filters of the layer (its equation 5), softly as in SFP."""

    def score(self, kernels: torch.Tensor) -> torch.Tensor:
        # Not by a product of matrices, which loses small distances to rounding.
        return torch.cdist(kernels, kernels, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
