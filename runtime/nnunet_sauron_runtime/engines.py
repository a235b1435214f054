"""Inference engines: each turns an ONNX file's bytes into a function from tiles to logits."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from collections.abc import Callable

import numpy as np

from .sliding_window import Network

DEFAULT = "openvino"
INSTALL = {"openvino": "pip install openvino", "onnxruntime": "pip install onnxruntime"}
TELEMETRY = "openvino_telemetry"
NO_MEMORY = ("bad_alloc", "bad alloc", "allocate", "out of memory")  # as engines say it, in small letters
# The key "location" of ONNX's external data, however its tag and length are encoded. An engine would open that file.
EXTERNAL_DATA = re.compile(rb"(\n|\x8a\x80*\x00)(\x08|\x88\x80*\x00)location")


def load_network(engine: str, model: bytes, name: str, threads: int | None = None) -> Network:
    """A network ready to run on the CPU, in float32 unless its own numbers are smaller.

    Args:
        engine: "openvino" or "onnxruntime".
        model: The ONNX file.
        name: The file's, for errors.
        threads: Of the engine; None for all cores.

    Raises:
        ValueError: The engine is unknown, or the file is nothing that it can run. What it returns raises RuntimeError
            where the engine fails on the tiles.
        MemoryError: There is too little memory; what it returns raises it as well.
        ImportError: It is not installed.
    """
    if EXTERNAL_DATA.search(model):
        raise ValueError(f"{name} keeps weights in a file of its own; export the bundle anew with all in one file.")
    check_engine(engine)
    try:
        network = _ENGINES[engine](model, threads)
    except Exception as error:  # each engine's own classes
        if _is_of_memory(error):
            raise MemoryError(
                f"There is too little memory to load {name} in {engine}: {_first_line(error)}. End other programs, or "
                f"use a machine with more; the bundle is whole."
            ) from error
        raise ValueError(
            f"{name} cannot be loaded by {engine}: {_first_line(error)}. Export the bundle anew."
        ) from error

    def run(tiles: np.ndarray) -> np.ndarray:
        try:
            return network(np.ascontiguousarray(tiles))
        except Exception as error:
            if _is_of_memory(error):
                raise MemoryError(f"{name} in {engine}: {_first_line(error)}") from error
            raise RuntimeError(
                f"{name} fails in {engine} on tiles of shape {tiles.shape}: {_first_line(error)}"
            ) from error

    return run


def check_engine(engine: str) -> None:
    """Raise unless an engine is known (ValueError) and installed (ImportError), without loading anything else."""
    if engine not in _ENGINES:
        raise ValueError(f"There is no engine {engine!r}; choose one of {', '.join(sorted(_ENGINES))}.")
    # OpenVINO's telemetry comes in with it, for tools that are not used here: nothing is to leave the building.
    hidden = {} if TELEMETRY in sys.modules else {TELEMETRY: None}
    try:
        sys.modules.update(hidden)
        importlib.import_module(engine)
    except ImportError as error:
        there = [other for other in _ENGINES if other != engine and importlib.util.find_spec(other) is not None]
        or_other = f", or take the one that is: --engine {there[0]}" if there else ""
        raise ImportError(f"The engine {engine} is not installed ({error}): {INSTALL[engine]}{or_other}") from error
    finally:
        for name in hidden:
            del sys.modules[name]


@functools.cache
def _openvino_core():
    """OpenVINO's core, one for the life of the process.

    A core gives the thread a stack for its signal handlers and puts the former one back when it is deleted, even if the
    core that owned that one is gone. The next signal, a key press or a child's end, then kills the process without a
    word.
    """
    import openvino

    return openvino.Core()


def _openvino(model: bytes, threads: int | None) -> Network:
    core = _openvino_core()
    settings = {
        # Else bfloat16 on the processors that have it, by which a hundredth of the voxels changes.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
    }
    compiled = core.compile_model(core.read_model(model=model, weights=b""), "CPU", settings)
    request = compiled.create_infer_request()

    return lambda tiles: request.infer({0: tiles}, share_inputs=True)[0]


def _onnxruntime(model: bytes, threads: int | None) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Without the arena, memory that one case took is given back before the next.
    options.enable_cpu_mem_arena = False
    if threads:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda tiles: session.run(None, {name: tiles})[0]


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__


_ENGINES: dict[str, Callable[[bytes, int | None], Network]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
