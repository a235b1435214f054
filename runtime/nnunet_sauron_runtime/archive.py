"""Files of a bundle, from its zip or folder into memory; nothing is unpacked to disk."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .manifest import Manifest, read_manifest

MANIFEST = "bundle.json"
LARGEST_MANIFEST = 1 << 22
NO_FAULT_OF_THE_SYSTEM = (None, errno.EINVAL)  # as an OSError has of a damaged zip
PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class Archive:
    """A bundle's files, by plain names.

    Args:
        path: A zip, or a folder.

    Raises:
        FileNotFoundError: There is nothing.
        OSError: The system does not let it be read.
        ValueError: It is no bundle, or holds names that lead out of it.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there; give a bundle, which `nnUNetv2_sauron export` writes.")
        self._sizes = self._of_folder() if path.is_dir() else self._of_zip()
        if MANIFEST not in self._sizes:
            raise ValueError(f"{path} has no {MANIFEST}, so it is no bundle; `nnUNetv2_sauron export` writes one.")

    def manifest(self) -> Manifest:
        """bundle.json, checked; every file that it lists is there and has the size that it states.

        Raises:
            ValueError: It is damaged, or states what is not so.
        """
        place = f"{self.path}: {MANIFEST}"
        try:
            said = json.loads(self._read(MANIFEST, LARGEST_MANIFEST).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is no JSON, or was cut short ({error}); export the bundle anew.") from error
        manifest = read_manifest(said, place)
        for name, (_, size) in manifest.files.items():
            if name not in self._sizes:
                raise ValueError(f"{self.path} lacks {name}, which {MANIFEST} lists; copy the bundle anew.")
            if self._sizes[name] != size:
                raise ValueError(
                    f"{self.path}: {name} has {self._sizes[name]} bytes, {MANIFEST} says {size}: it was changed or cut "
                    f"short. Copy the bundle anew."
                )
        unknown = sorted(self._sizes.keys() - manifest.files.keys() - {MANIFEST})
        if unknown and not self.path.is_dir():
            raise ValueError(f"{self.path} holds {unknown[0]}, which {MANIFEST} does not list; export the bundle anew.")
        return manifest

    def read(self, name: str, manifest: Manifest) -> bytes:
        """A file's bytes, which have the size and checksum that the manifest states.

        Raises:
            ValueError: They have not.
        """
        digest, size = manifest.files[name]
        content = self._read(name, size)
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(
                f"{self.path}: {name} is not the file that was exported (its checksum differs): it was changed or "
                f"damaged. Copy the bundle anew."
            )
        return content

    def _of_folder(self) -> dict[str, int]:
        with _told_apart(self.path, f"{self.path} cannot be read", "copy the bundle anew"):
            return {path.name: path.stat().st_size for path in self.path.iterdir() if path.is_file()}

    def _of_zip(self) -> dict[str, int]:
        damaged, remedy = "is no zip, or was cut short", "give a bundle, which `nnUNetv2_sauron export` writes"
        with _told_apart(self.path, f"{self.path} {damaged}", remedy), zipfile.ZipFile(self.path) as archive:
            entries = archive.infolist()
        sizes = {}
        for entry in entries:
            name = entry.filename
            if name.startswith("__MACOSX/") or name.split("/")[-1].startswith((".DS_Store", "._")):
                continue  # what a Mac adds; it is never read
            if not PLAIN.fullmatch(name) or name in sizes:
                why = "twice" if name in sizes else "a name with more than letters, digits, _, - and ."
                raise ValueError(
                    f"{self.path} holds {name!r} ({why}), as no bundle does; nothing of it was read. "
                    f"If you zipped a folder, zip the files in it instead."
                )
            sizes[name] = entry.file_size
        return sizes

    def _read(self, name: str, limit: int) -> bytes:
        """At most `limit` bytes of a file.

        Raises:
            OSError, MemoryError: The system does not let it be read, or there is too little memory.
            ValueError: It is larger or damaged.
        """
        file = self.path / name if self.path.is_dir() else self.path
        with _told_apart(file, f"{self.path}: {name} cannot be read", "copy the bundle anew"):
            if self.path.is_dir():
                with file.open("rb") as opened:
                    content = opened.read(limit + 1)
            else:
                with zipfile.ZipFile(file) as archive, archive.open(name) as opened:
                    content = opened.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"{self.path}: {name} has more than {limit} bytes; copy the bundle anew.")
        return content


@contextmanager
def _told_apart(file: Path, damaged: str, remedy: str) -> Iterator[None]:
    """Raise MemoryError where there is too little, OSError where the system refuses a file, else ValueError: damage."""
    try:
        yield
    except Exception as error:  # each way to pack a file has its own
        number = getattr(error, "errno", None)
        if isinstance(error, MemoryError) or number == errno.ENOMEM:
            raise MemoryError(
                f"There is too little memory to read {file}. End other programs, or use a machine with more; the "
                f"bundle may well be whole."
            ) from error
        if isinstance(error, OSError) and number not in NO_FAULT_OF_THE_SYSTEM:
            allow = " (chmod u+r FILE)" if isinstance(error, PermissionError) else ""
            raise OSError(
                f"{file} cannot be read: {error.strerror}. Mend that{allow}; the bundle may well be whole."
            ) from error
        raise ValueError(f"{damaged} ({error}); {remedy}.") from error
