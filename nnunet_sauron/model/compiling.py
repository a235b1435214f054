"""Where nnU-Net may compile networks: on CUDA alone.

Its training knows that; its prediction, and so the validation at a training's end, compiles on every device when
nnUNet_compile is set, which takes minutes on a CPU and fails for some networks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

VARIABLE = "nnUNet_compile"


@contextmanager
def compiling_on_cuda_only(device: torch.device) -> Iterator[None]:
    """nnUNet_compile is not seen as long as this lasts, unless the device is a GPU of CUDA."""
    set_to = None if device.type == "cuda" else os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if set_to is not None:
            os.environ[VARIABLE] = set_to
