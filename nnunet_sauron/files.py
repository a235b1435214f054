"""Reading JSON files that others wrote; writing files and folders so that none is ever left half-written."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

TEMPORARY = ".tmp"
CONTINUE = "continue with the same command and --c"
AGAIN = "give the same command again"
# Of torch.save's RuntimeError where the disk is full, by version of PyTorch.
CANNOT_WRITE = ("StreamWriter", "iostream", "inline_container")


def write_atomically(path: Path, write: Callable[[str], object], again: str = CONTINUE) -> None:
    """Let `write` make a file beside `path`, then put it in its place; a crash at any time leaves the old file.

    Args:
        path: The file.
        write: Given the temporary file's name.
        again: What to do once there is room, for the error.

    Raises:
        OSError: It could not be written; the old file, if any, is untouched.
    """
    # No other process's, and made by `write`, so that it has the rights of a new file.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        write(str(temporary))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a read-only file system, where it never was
            temporary.unlink(missing_ok=True)
        if not _of_writing(error):
            raise
        raise OSError(_not_written(path, error, again)) from error


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


def write_texts_atomically(folder: Path, texts: Mapping[str, str], again: str = AGAIN) -> None:
    """`write_text_atomically` of several files in a folder: all of them, or none.

    Args:
        folder: Where they go.
        texts: By the files' names.
        again: What to do once there is room, for the error.

    Raises:
        OSError: One could not be written; what stood there before is untouched.
    """
    beside, name = folder / f".{secrets.token_hex(4)}{TEMPORARY}", ""
    try:
        beside.mkdir()
        for name, text in texts.items():
            with (beside / name).open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for name in texts:
            os.replace(beside / name, folder / name)
    except OSError as error:
        raise OSError(_not_written(folder / name, error, again)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _not_written(path: Path, error: BaseException, again: str) -> str:
    return (
        f"Could not write {path}: {error}. What stood there before is untouched; make room or make the folder "
        f"writable, then {again}."
    )


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove what killed processes left of `write_atomically` beside files whose names have a pattern (`glob`)."""
    for leftover in folder.glob(f"{pattern}*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def _of_writing(error: BaseException) -> bool:
    return isinstance(error, OSError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in CANNOT_WRITE)
    )


@contextlib.contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder beside `target` to write into, which takes its place at the end; after an error only `target` is there,
    as it was.

    Args:
        target: The folder to make; missing or empty.
        replace: Let it hold something, which is removed once the new folder is whole.

    Raises:
        FileExistsError: Another process is writing it.
        OSError: It could not be written, or holds something.
    """
    target = target.resolve()  # a link to a folder stays one
    try:
        with _folder_beside(target, replace) as beside:
            yield beside
    except FileExistsError:
        raise
    except Exception as error:
        if not _of_writing(error):
            raise
        raise OSError(
            f"{target} could not be written: {error}. What stood there before is untouched; make room or mend what is "
            f"named, then {AGAIN}."
        ) from error


@contextlib.contextmanager
def _folder_beside(target: Path, replace: bool) -> Iterator[Path]:
    beside, old = (target.with_name(f".{target.name}{ending}") for ending in (TEMPORARY, ".old"))
    beside.mkdir(parents=True, exist_ok=True)
    with locked(beside, target):
        try:
            if old.is_dir() and not target.exists():  # a process was killed between the two renamings below
                os.replace(old, target)
            if not replace and target.is_dir() and any(target.iterdir()):
                raise FileExistsError(f"{target} holds files already; name another folder, or have it replaced.")
            for left in beside.iterdir():  # by a process that was killed
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield beside
            if target.is_dir() and not replace:
                target.rmdir()
            elif target.is_dir():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(target, old)  # at once: while it is being removed, half of it would stand there
            os.replace(beside, target)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        # From here on a folder of that name is another process's: the lock went with the renaming.
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, target: Path) -> Iterator[None]:
    """Keep other processes from writing into a folder; the lock ends with the process, however this ends.

    Args:
        folder: What is written into.
        target: What will be made of it, for the error.

    Raises:
        FileExistsError: Another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"{target} is being written by another process; wait until it has ended.") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(opened)


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


def check_new(output: Path, what: str, hint: str = "") -> None:
    """Raise OSError unless an output, which is `what`, is not there yet and can be written; `hint` follows if it is."""
    if os.path.lexists(output):  # also a link that leads nowhere
        raise FileExistsError(f"{output} exists; give the name of {what} that does not.{hint}")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent} is no folder; make it first, or give another -o.")
    check_writable(parent)


def move_new(source: Path, target: Path) -> None:
    """Move a file or a folder to a place where nothing is, also where another process has the same in mind.

    Raises:
        FileExistsError: Something is there by now; `source` stays.
        OSError: It could not be moved.
    """
    try:
        if source.is_dir():
            os.rename(source, target)  # refused where a folder that holds something, or a file, is
        else:
            os.link(source, target)
            source.unlink()
    except OSError as error:
        if os.path.lexists(target):
            raise FileExistsError(f"{target} was made meanwhile, by another process; it stays as it is.") from error
        os.replace(source, target)  # of a file, where the file system has no hard links


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
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a JSON object; {remedy}.")
    return found
