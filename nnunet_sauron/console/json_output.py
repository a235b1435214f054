"""Standard output under `--json`: one JSON document and nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Iterator

from .json_data import json_data

_held_back: list[str] | None = None


def print_json(document) -> None:
    """Print a document as strict JSON, with null for nan and infinity; inside `json_alone`, at its end."""
    text = json.dumps(json_data(document), indent=2, allow_nan=False)
    if _held_back is None:
        print(text)
    else:
        _held_back.append(text)


@contextlib.contextmanager
def json_alone() -> Iterator[None]:
    """Let only `print_json` reach standard output; all else goes to standard error.

    That is what this process prints, what libraries in C write to the descriptor, and what the processes that are
    started meanwhile print. After an error nothing is printed to standard output.

    Raises:
        OSError: Standard output is closed.
    """
    global _held_back
    standard_output = sys.stdout
    try:
        kept = os.dup(1)
    except OSError as error:
        raise OSError(
            "Standard output is closed, so that --json prints nowhere; send it to a file or a pipe."
        ) from error
    _flush(standard_output)
    _held_back = []
    try:
        send_to_standard_error()
        yield
        documents = _held_back
    finally:
        _flush(standard_output, sys.__stdout__, sys.stdout)  # while it still leads to standard error
        os.dup2(kept, 1)
        os.close(kept)
        sys.stdout = standard_output
        _held_back = None
    for document in documents:
        print(document)


def send_to_standard_error() -> None:
    """Send all later output to standard error, or nowhere if that is closed."""
    sys.stdout = sys.stderr
    try:
        os.dup2(2, 1)
    except OSError:
        send_nowhere()


def send_nowhere() -> None:
    """Discard all later output to the descriptor of standard output."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _flush(*streams) -> None:
    """Flush Python's streams and those of C, which buffer their text until they are full or the process ends."""
    for stream in streams:
        if stream is not None:
            stream.flush()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows names no library here
        ctypes.CDLL(None).fflush(None)
