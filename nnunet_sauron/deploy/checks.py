"""Whether an exported network computes what PyTorch computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

MOST = 1e-3
Run = Callable[[np.ndarray], np.ndarray]
INSTALL = "pip install '.[deploy]'"


def check_installed() -> None:
    """Raise ImportError, with what to do, where exporting lacks a package."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        raise ValueError(f"Exporting needs {error.name}, which is not installed: {INSTALL}") from error


def _onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})[0]


def _openvino(path: Path) -> Run:
    import openvino

    # On CPUs that have it bfloat16 is the default, with another answer in up to 1 % of the voxels.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda image: compiled(image)[0]


ENGINES: Mapping[str, Callable[[Path], Run]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def synthetic_patches(input_channels: int, patch_size: Sequence[int]) -> dict[str, np.ndarray]:
    """Patches (1, input_channels, *patch_size), float32, by kind: also such as masked and padded images have."""
    draw = np.random.default_rng(0)
    shape = (1, input_channels, *patch_size)
    noise = draw.standard_normal(shape).astype(np.float32)
    half = noise.copy()
    half[..., patch_size[-1] // 2 :] = 0
    constants = {f"constant {value:g}": np.full(shape, value, np.float32) for value in (0, 1, -0.7, 20)}
    return {"random": noise, "half of zeros": half, **constants}


def greatest_differences(
    network: nn.Module, path: Path, patches: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Greatest absolute difference of logits from PyTorch's, by engine and kind of patch.

    Args:
        network: PyTorch's, in evaluation mode.
        path: The ONNX file.
        patches: (1, channels, *patch) by kind.
    """
    with torch.inference_mode():
        expected = {kind: network(torch.from_numpy(patch)).numpy() for kind, patch in patches.items()}
    found = {}
    for name, engine in ENGINES.items():
        run = engine(path)
        # nan would pass for small in a comparison
        found[name] = {
            kind: float(np.nan_to_num(np.abs(run(patch) - expected[kind]), nan=np.inf).max())
            for kind, patch in patches.items()
        }
    return found


def check_differences(differences: Mapping[str, Mapping[str, float]], what: str) -> None:
    """Raise RuntimeError if any of `greatest_differences` is above `MOST`."""
    for engine, kinds in differences.items():
        kind = max(kinds, key=kinds.get)
        if not kinds[kind] <= MOST:
            raise RuntimeError(
                f"{what} was not exported: on a patch of kind '{kind}' its logits differ from PyTorch's by "
                f"{kinds[kind]:.2g} in {engine}, at most {MOST:g} is allowed. Nothing was written. Please report this, "
                f"with plans.json and {os.linesep}the versions of PyTorch and {engine}."
            )
