"""Where networks run: the device that a command was given, and the machine that a time was measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch


def chosen_device(name: str | None = None) -> torch.device:
    """Where networks are to run.

    Args:
        name: "cpu", "cuda", "cuda:1", ... or "mps"; None for CUDA where there is a GPU, else the CPU.

    Raises:
        ValueError: It is none of these, or this machine does not have it.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?|mps", name):
        raise ValueError(
            f"-device {name} is not known; give cpu, cuda, cuda:1 (the second GPU) or mps, or leave it out."
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("PyTorch finds no GPU of Apple's for -device mps; leave it out.")
    if name.startswith("cuda"):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.partition(":")[2] or 0) >= found:
            only = f", only {', '.join(f'cuda:{index}' for index in range(found))}" if found else ""
            raise ValueError(f"PyTorch finds no GPU for -device {name}{only}; leave it out or give another.")
    return torch.device(name)


def machine() -> dict[str, str | int | None]:
    """What a time was measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": named[0] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }
