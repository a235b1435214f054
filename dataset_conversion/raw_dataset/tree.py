"""Finding one's way in a download: folders, files, and what is not to be seen among them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from .cases import Problems

ENDINGS = (".nii.gz", ".nii", ".mnc")
LEVELS = 3

Key = TypeVar("Key", bound=Hashable)


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; neither hidden files (`._NAME` and `.DS_Store` of macOS) nor `__MACOSX`.

    A folder that is not there has nothing in it.
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX")


def stem(path: Path) -> str | None:
    """The name of a NIfTI or MINC file without its ending; None for anything else."""
    ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)
    return path.name[: -len(ending)] if ending and len(path.name) > len(ending) else None


def case_name(*parts: str) -> str:
    """A name for nnU-Net's files: letters, digits, `.`, `_` and `-`; the parts joined by `_`."""
    return "_".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in parts)


def images(folder: Path, problems: Problems) -> dict[str, Path]:
    """The NIfTI files in a folder by their names without ending; a name that is there twice is a problem."""
    return by_key(visible(folder), stem, lambda name: (name, folder.name), problems)


def by_key(
    files: Iterable[Path],
    key: Callable[[Path], Key | None],
    names: Callable[[Key], Sequence[str]],
    problems: Problems,
) -> dict[Key, Path]:
    """Files by what they are of, such as a subject and a session; two of the same are a problem.

    Args:
        files: Any; those whose key is None are passed over.
        key: What a file is of.
        names: Those of a key's case and patient, which the user may exclude.
        problems: For those that are there twice.
    """
    found: dict[Key, Path] = {}
    for path in files:
        of_path = key(path)
        if of_path is None:
            continue
        if path.is_dir():
            what = "it is a folder with the name of an image file; if that file lies in it, move the file up"
            problems.add(path, what, *names(of_path))
            continue
        if of_path in found:
            problems.add(path, f"it and {found[of_path]} are the same case; remove one of them", *names(of_path))
        found.setdefault(of_path, path)
    return found


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted by path, without hidden ones; links to folders are followed once."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        shown = {path.name for path in visible(Path(place))} if real not in seen else set()
        seen.add(real)
        folders[:] = sorted(name for name in folders if name in shown)
        yield from (Path(place) / name for name in sorted(files) if name in shown)


def locate(source: Path, is_it: Callable[[Path], bool], layout: str) -> Path:
    """The folder of the expected layout: SOURCE itself, or the one folder below that has it.

    Args:
        source: What the user gave.
        is_it: Whether a folder has the layout.
        layout: Its description, for errors.

    Raises:
        FileNotFoundError: SOURCE is missing, or neither it nor a folder up to three levels below has the layout.
        ValueError: Several folders below have it.
    """
    check_source(source, layout)
    level = [source]
    for _ in range(LEVELS + 1):
        found = [folder for folder in level if is_it(folder)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{source} holds several folders that fit: {', '.join(map(str, found))}. Give one of them."
            )
        level = [path for folder in level for path in visible(folder) if path.is_dir()]
    above = next((folder for folder in reversed(source.parents[:2]) if is_it(folder)), None)
    if above is not None:
        raise FileNotFoundError(f"{source} is a part of the download; give {above}.")
    raise FileNotFoundError(f"{source} has not the expected layout: {layout}. Give the folder that has it.")


def check_source(source: Path, layout: str) -> None:
    """Raise FileNotFoundError unless SOURCE is a folder."""
    if not source.is_dir():
        what = "is a file" if source.exists() else "is not there"
        unpack = "; unpack it first" if source.name.endswith((".zip", ".tar", ".gz", ".tgz")) else ""
        raise FileNotFoundError(f"SOURCE {source} {what}{unpack}. Give the folder of the download: {layout}.")
