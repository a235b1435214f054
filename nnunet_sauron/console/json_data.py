"""Data for JSON, which has no nan, tuples, paths or NumPy numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping


def json_data(value):
    """The same as nested dictionaries and lists, with None for nan and infinity."""
    if hasattr(value, "tolist"):  # of NumPy or PyTorch
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): json_data(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_data(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
