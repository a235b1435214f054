"""Data for JSON, which knows neither nan nor tuples."""

from __future__ import annotations

import math
from collections.abc import Mapping


def plain(value):
    """Dictionaries and lists through and through, with None in the place of nan."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
