"""Damage that SimpleITK does not report: it fills up a NIfTI file that was cut short, reads NaN in one as 0, and takes
packed voxels of MHA and NRRD whose checksum is wrong."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

TEMPORARY = ".nnunet_sauron.tmp"
LEFT_OVER = 3600  # seconds; no process takes as long for one file
CHUNK, PIECE = 1 << 22, 1 << 16  # bytes; the second of what may grow a thousandfold
PACKED = (b"compresseddata=true", b"encoding:gzip", b"encoding:gz")
JPEG = b"\xff\xd8\xff"
FLOATS = {16: "f4", 64: "f8"}  # NIfTI's numbers of types
# Of a voxel, by that number: readers go by it, and not by the header's own bits.
BITS = {
    1: 1, 2: 8, 4: 16, 8: 32, 16: 32, 32: 64, 64: 64, 128: 24, 256: 8, 512: 16, 768: 32, 1024: 64, 1280: 64, 1536: 128,
    1792: 128, 2048: 256, 2304: 32,
}  # fmt: skip


def check_name(path: Path) -> None:
    """Raise ValueError if a name is no text: SimpleITK ends the process at it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        encoding, remedy = sys.getfilesystemencoding(), "rename it, or its folder"
        if encoding != "utf-8":
            remedy = f"if it is, this locale's encoding, {encoding}, is at fault: set PYTHONUTF8=1"
        raise ValueError(f"{path} has a name that is no UTF-8; {remedy}.") from error


@contextlib.contextmanager
def written_beside(file: Path) -> Iterator[Path]:
    """A path to write a file to, which is moved to its place at the end, once it is whole.

    The path lies in a hidden folder: what a killed process leaves there is no case for nnU-Net's commands.

    Raises:
        ValueError: What was written was cut short, which SimpleITK does not tell where the disk is full.
        OSError: It could not be moved.
    """
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=TEMPORARY, dir=file.parent))
    try:
        beside = folder / file.name
        yield beside
        check_file(beside)
        os.replace(beside, file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(output: Path) -> None:
    """Remove what killed processes left of `written_beside` in a folder an hour ago or before."""
    for folder in output.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError):  # another process has just moved its file out of it
            if time.time() - folder.stat().st_mtime > LEFT_OVER:
                shutil.rmtree(folder, ignore_errors=True)


def check_readable(file: Path) -> None:
    """Raise ValueError unless it is a file that can be opened and is not empty."""
    check_name(file)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; expected an image file. Remove it or give another.")
    if not file.exists():
        broken = "is a link to a file that is not there" if file.is_symlink() else "is not there"
        raise ValueError(f"{file} {broken}; expected an image file. Put it there or leave the case out.")
    if not os.access(file, os.R_OK):
        raise ValueError(f"{file} must not be read: no permission. Change it: chmod u+r FILE")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty (0 bytes); expected an image. Copy it anew or leave the case out.")


def check_file(file: Path) -> None:
    """Raise ValueError unless a file can be read, and is whole and finite as far as its kind tells."""
    check_readable(file)
    name = file.name.lower()
    try:
        if name.endswith((".nii", ".nii.gz")):
            _check_nifti(file)
        elif name.endswith((".mha", ".nrrd")):
            _check_packed(file)
        elif name.endswith(".png"):
            content = file.read_bytes()
            if content.startswith(JPEG):
                raise ValueError(f"{file} is a JPEG with the name of a PNG, and lossy; save it as what it is called.")
            if b"IEND" not in content[-CHUNK:]:
                raise EOFError("its last chunk is missing")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{file} is damaged or was cut short: {error or type(error).__name__}. Copy it anew."
        ) from error


def _check_nifti(file: Path) -> None:
    packed = is_packed(file)
    with gzip.open(file) if packed else file.open("rb") as opened:
        header = opened.read(540)
        expected, start, kind = told_by_nifti(header)
        if not packed and kind is None:
            length = file.stat().st_size
        else:  # to its end, where the checksum stands
            length, odd, rest = len(header), 0, header[start:expected] if kind is not None else b""
            for chunk in chunks(opened):
                at = length
                length += len(chunk)
                if kind is not None:
                    # Other bytes may lie between header and voxels, and behind the voxels.
                    rest += chunk[max(0, start - at) : max(0, expected - at)]
                    whole = len(rest) // kind.itemsize * kind.itemsize
                    odd += np.count_nonzero(~np.isfinite(np.frombuffer(rest[:whole], kind)))
                    rest = rest[whole:]
            if odd:
                raise ValueError(f"{file}: {odd} of its values are infinite or not numbers. Mend it or leave it out.")
    if expected is not None and length < expected:
        raise EOFError(f"it has {length} bytes{' when unpacked' if packed else ''}, its header tells of {expected}")


def is_packed(file: Path) -> bool:
    """Whether gzip wrote a file, whatever its name."""
    with file.open("rb") as raw:
        return raw.read(2) == b"\x1f\x8b"


def chunks(opened: BinaryIO) -> Iterator[bytes]:
    """The rest of a file to its end, of a packed one to where what follows is packed no more."""
    try:
        while chunk := opened.read1(CHUNK):  # what is unpacked already, before the next piece fails
            yield chunk
    except gzip.BadGzipFile as error:
        if not str(error).startswith("Not a gzipped file"):  # but a wrong checksum
            raise


def is_nifti_2(file: Path) -> bool:
    """Whether a file has the header of NIfTI-2."""
    if not file.name.lower().endswith((".nii", ".nii.gz")):
        return False
    with gzip.open(file) if is_packed(file) else file.open("rb") as opened:
        begins = opened.read(4)
    return 540 in (int.from_bytes(begins, order) for order in ("little", "big"))


def told_by_nifti(header: bytes) -> tuple[int | None, int | None, np.dtype | None]:
    """The bytes that a NIfTI file should have, where its voxels start, and their type if it is one of floats.

    Args:
        header: The file's first 540 bytes.
    """
    for size, shape, kind, start in (
        (348, ("8h", 40), ("2h", 70), ("f", 108)),
        (540, ("8q", 16), ("2h", 12), ("q", 168)),
    ):
        for order in "<>":
            if len(header) < size or struct.unpack_from(order + "i", header)[0] != size:
                continue
            axes, *lengths = struct.unpack_from(order + shape[0], header, shape[1])
            number, bits = struct.unpack_from(order + kind[0], header, kind[1])
            (offset,) = struct.unpack_from(order + start[0], header, start[1])
            if not 1 <= axes <= 7 or not math.isfinite(offset) or min(lengths[:axes]) < 0:
                continue  # nonsense, which the reader finds
            floats = np.dtype(order + FLOATS[number]) if number in FLOATS else None
            first = max(size, int(offset))  # as the reader has it
            return first + math.prod(lengths[:axes]) * BITS.get(number, bits) // 8, first, floats
    return None, None, None


def _check_packed(file: Path) -> None:
    """Unpack the voxels of an MHA or NRRD file to their end, where the checksum stands."""
    end = b"" if file.name.lower().endswith(".nrrd") else b"elementdatafile=local"
    packed = False
    with file.open("rb") as opened:
        while line := opened.readline(PIECE):
            said = line.strip().lower().replace(b" ", b"")
            packed |= said in PACKED
            if said == end or said.startswith(b"datafile:"):  # a file of its own
                break
        if not packed or said != end:
            return
        voxels = zlib.decompressobj(zlib.MAX_WBITS | 32)  # with the header of zlib or of gzip
        while not voxels.eof and (piece := opened.read(PIECE)):
            voxels.decompress(piece)
    if not voxels.eof:
        raise EOFError("its packed voxels lack their end")
