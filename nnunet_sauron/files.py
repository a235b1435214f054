"""Reading JSON files that others wrote; writing files and folders so that none is ever left half-written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"
CONTINUE = "continue with the same command and --c"
AGAIN = "give the same command again"


def write_atomically(path: Path, write: Callable[[str], object], again: str = CONTINUE) -> None:
    """Let `write` make a file beside `path`, then put it in its place; a crash at any time leaves the old file.

    Args:
        path: The file.
        write: Given the temporary file's name.
        again: What to do once there is room, for the error.

    Raises:
        OSError: It could not be written; the old file, if any, is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(str(temporary))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save reports a full disk as a RuntimeError of its writer; any other has nothing to do with files.
        full = isinstance(error, RuntimeError) and any(word in str(error) for word in ("StreamWriter", "iostream"))
        if not full and not isinstance(error, OSError):
            raise
        raise OSError(
            f"Could not write {path}: {error}. What stood there before is untouched; make room or make the folder "
            f"writable, then {again}."
        ) from error


def write_text_atomically(path: Path, text: str, again: str = AGAIN) -> None:
    """`write_atomically` of a text, as UTF-8; bytes in it that are no text, as a file's name may hold, are escaped.

    Args:
        path: The file.
        text: All that it will hold.
        again: What to do once there is room, for the error.

    Raises:
        OSError: As `write_atomically`.
    """
    write_atomically(path, lambda beside: Path(beside).write_text(text, "utf-8", "backslashreplace"), again)


@contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder beside `target` to write into, which takes its place at the end; after an error neither is there.

    Args:
        target: The folder to make; missing or empty.
        replace: Let it hold something, which is removed once the new folder is whole.

    Raises:
        OSError: It could not be written, or holds something.
    """
    target = target.resolve()  # a link to a folder stays one
    beside = target.with_name(f".{target.name}{TEMPORARY}")
    old = target.with_name(f".{target.name}.old")
    if old.is_dir() and not target.exists():  # a process was killed between the two renamings below
        os.replace(old, target)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if target.is_dir() and not replace:
            target.rmdir()
        elif target.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)  # at once: while it is being removed, half of it would stand there
        os.replace(beside, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_writable(output: Path, remedy: str = "choose another folder with -o") -> None:
    """Raise OSError unless files can be written into a folder, which need not be there yet and is not made."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; {remedy}.")
    try:
        place = output.resolve()  # a link may lead to what is not there yet
        nearest = next(folder for folder in (place, *place.parents) if folder.exists())
        # Tried rather than asked: permission bits say nothing of a file system mounted read-only.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OSError(f"{output} cannot be written ({error}); {remedy}.") from error


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
