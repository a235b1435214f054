"""Folders that verbs write into."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_writable(output: Path) -> None:
    """Raise OSError unless files can be written into a folder, which need not be there yet and is not made."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; give the name of a folder with -o.")
    try:
        place = output.resolve()  # a link may lead to what is not there yet
        nearest = next(folder for folder in (place, *place.parents) if folder.exists())
        # Tried rather than asked: permission bits say nothing of a file system mounted read-only.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OSError(f"{output} cannot be written ({error}); choose another folder with -o.") from error
