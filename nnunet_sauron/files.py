"""Reading JSON files that others wrote."""

from __future__ import annotations

import json
from pathlib import Path


def read_json_object(path: Path, remedy: str) -> dict:
    """The object in a JSON file.

    Args:
        path: The file.
        remedy: What to do if it is damaged, for the error.

    Raises:
        OSError: It is missing or must not be read.
        ValueError: It is no JSON, or holds no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} is no JSON file, or was cut short ({error}); {remedy}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected was a JSON object; {remedy}.")
    return found
