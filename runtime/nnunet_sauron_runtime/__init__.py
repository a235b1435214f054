"""Segments images with a bundle of trained networks: NumPy, SciPy, SimpleITK and an inference engine, no PyTorch.

from nnunet_sauron_runtime import Bundle

segmentation = Bundle("hippocampus.zip").predict(SimpleITK.ReadImage("case_0000.nii.gz"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bundle import Bundle

__all__ = ["Bundle", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """`Bundle` when it is first asked for: the commands that share this package start without NumPy."""
    if name != "Bundle":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .bundle import Bundle

    return Bundle
