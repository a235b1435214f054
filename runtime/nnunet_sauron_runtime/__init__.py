"""Segments images with a bundle of trained networks: NumPy, SciPy, SimpleITK and an inference engine, no PyTorch.

from nnunet_sauron_runtime import Bundle

segmentation = Bundle("hippocampus.zip").predict(SimpleITK.ReadImage("case_0000.nii.gz"))
"""

from __future__ import annotations

from .bundle import Bundle

__all__ = ["Bundle", "__version__"]
__version__ = "0.1.0"
