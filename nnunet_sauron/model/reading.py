"""Files of images and segmentations, read by nnU-Net's readers; what is wrong with one is said with its name.

nnU-Net's readers print and raise what they like (AssertionError, EOFError, a RuntimeError without words), and SimpleITK
fills up a NIfTI file that was cut short with zeros.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nibabel
import numpy as np
import tifffile
from nnunet_sauron_runtime.whole_files import check_readable, chunks, is_packed, told_by_nifti
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

GIPL_HEADER = 256
GIPL_BYTES = {1: 1 / 8, 7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}  # of a voxel, by its type's number
CHUNK = 1 << 22
MOST_OF_A_WARNING = 500  # letters: it repeats all affines and files
# tifffile then reads what is left of a file; how it tells of an offset depends on its version.
LOST = ("invalid page offset", "invalid offset to page", "corrupted", "failed to reshape")


def read_image(
    reader: BaseReaderWriter, files: Sequence[str | Path], say: Callable[[str], None] = lambda line: None
) -> tuple[np.ndarray, dict]:
    """One case's image (channels, z, y, x), float32, and the properties that nnU-Net's reader tells of it.

    Args:
        reader: nnU-Net's.
        files: One a channel.
        say: Given what the reader warns of, in a line: channels that lie in different places.

    Raises:
        ValueError: A file is missing, must not be read, is damaged or cut short, or is nothing that the reader can
            read, or the files do not go together.
        MemoryError: It is too large.
    """
    return _read(reader, [Path(file) for file in files], reader.read_images, "one case", say)


def read_segmentation(reader: BaseReaderWriter, file: str | Path) -> tuple[np.ndarray, tuple[float, ...] | None]:
    """A segmentation (z, y, x), and its spacing in mm; None where nothing tells it.

    Raises:
        ValueError: As `read_image`; or it has several channels.
        MemoryError: It is too large.
    """
    file = Path(file)
    labels, properties = _read(reader, [file], lambda files: reader.read_seg(files[0]), "a segmentation")
    if len(labels) != 1:
        raise ValueError(
            f"{file} has {len(labels)} channels (colours, or a fourth axis); a segmentation has one, whose values are "
            f"those of dataset.json."
        )
    # Pictures store no spacing; nnU-Net takes 1.
    told = not isinstance(reader, NaturalImage2DIO) and (
        not isinstance(reader, Tiff3DIO) or file.with_suffix(".json").is_file()
    )
    return labels[0], tuple(float(length) for length in properties["spacing"]) if told else None


def check_file(file: Path) -> None:
    """Raise ValueError unless it is a file that can be opened, and whole as far as its kind tells."""
    check_readable(file)
    try:
        _check_length(file)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{file} is damaged or was cut short: {error or type(error).__name__}. Copy it anew or leave the case out."
        ) from error


def not_finite(reader: BaseReaderWriter, file: str | Path) -> int:
    """How many values of a NIfTI file are nan or infinite that SimpleITK, and nnU-Net with it, reads as 0."""
    if not isinstance(reader, SimpleITKIO) or not str(file).endswith((".nii", ".nii.gz")):
        return 0
    with contextlib.suppress(Exception):  # a form of NIfTI that SimpleITK alone reads
        stored = nibabel.load(file)
        if stored.get_data_dtype().kind == "f":
            return int(np.count_nonzero(~np.isfinite(np.asanyarray(stored.dataobj))))
    return 0


def missing_spacing(reader: BaseReaderWriter, file: str | Path) -> Path | None:
    """The JSON file that would tell an image's spacing and is not there, so that nnU-Net takes voxels for 1 mm long."""
    if not isinstance(reader, Tiff3DIO):
        return None
    expected = Path(file).with_name(f"{Path(file).stem[: -len('_0000')]}.json")
    return None if expected.is_file() else expected


def _read(
    reader: BaseReaderWriter,
    files: list[Path],
    read: Callable[[list[str]], tuple[np.ndarray, dict]],
    what: str,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[np.ndarray, dict]:
    for file in files:
        check_file(file)
    named, printed, complaints = ", ".join(map(str, files)), io.StringIO(), []
    try:
        with contextlib.redirect_stdout(printed), _complaints_of_tifffile(complaints):
            image, properties = read([str(file) for file in files])
            _check_geometry(reader, image, properties, files)
        if any(words in complaint for complaint in complaints for words in LOST):
            raise ValueError("it is not whole")
    except MemoryError as error:
        raise MemoryError(f"There is not enough memory to read {named}: {error}") from error
    except Exception as error:  # each of nnU-Net's readers has its own; what does not go together they print
        why = str(error) or type(error).__name__
        why = " ".join(" ".join([why, *complaints, printed.getvalue()]).split())
        raise ValueError(
            f"{named} cannot be read as {what}: {why[:1000]}. The model's reader is nnU-Net's {type(reader).__name__}; "
            f"mend the file or leave the case out."
        ) from error
    if warned := " ".join(printed.getvalue().split()):
        say(f"{named}: nnU-Net's {type(reader).__name__} says: {warned[:MOST_OF_A_WARNING]}")
    return image, properties


def _check_length(file: Path) -> None:
    """Raise EOFError or what `gzip` raises if a file is shorter than its header says.

    Of the formats whose end readers do not look after.
    """
    name = file.name.lower()
    if name.endswith(".png"):
        content = file.read_bytes()
        if content.startswith(b"\x89PNG") and b"IEND" not in content[-CHUNK:]:
            raise EOFError("its last chunk is missing")
    if not name.endswith((".nii", ".nii.gz", ".gipl", ".gipl.gz")):
        return
    packed = is_packed(file)
    with gzip.open(file) if packed else file.open("rb") as opened:
        header = opened.read(540)
        length = len(header)
        if packed:
            for chunk in chunks(opened):  # to its end, where the checksum stands
                length += len(chunk)
        else:
            length = file.stat().st_size
    expected = _expected_gipl(header) if ".gipl" in name else told_by_nifti(header)[0]
    if expected is not None and length < expected:
        raise EOFError(f"it has {length} bytes{' when unpacked' if packed else ''}, its header tells of {expected}")


def _expected_gipl(header: bytes) -> int | None:
    numbers = np.frombuffer(header[:10], ">u2") if len(header) >= 10 else np.zeros(5)
    size = GIPL_BYTES.get(int(numbers[4]))
    return None if size is None else GIPL_HEADER + int(size * math.prod(max(1, int(length)) for length in numbers[:4]))


def _check_geometry(reader: BaseReaderWriter, image: np.ndarray, properties: dict, files: Sequence[Path]) -> None:
    if image.size == 0 or image.ndim != 4:
        raise ValueError(f"it has the shape {image.shape}, expected channels and three axes of at least one voxel")
    axes = len(properties.get("sitk_stuff", {}).get("spacing", ()))
    # SimpleITK puts the parts of a voxel last, where nnU-Net takes them for an axis.
    if (axes == 2 and image.shape[1] != 1) or (axes == 3 and len(image) != len(files)):
        raise ValueError("its voxels have several parts (colours or vectors), expected one number a voxel")
    spacing = np.asarray(properties["spacing"], dtype=float)
    if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
        raise ValueError(f"its spacing is {spacing.tolist()}, expected three numbers above 0, in mm")
    if isinstance(reader, Tiff3DIO):
        for file in files:
            with tifffile.TiffFile(file) as tiff:
                if tiff.series[0].axes.endswith("S"):  # first, it may stand for three or four slices
                    raise ValueError(f"{file} is a colour image, expected one number a voxel")


@contextlib.contextmanager
def _complaints_of_tifffile(complaints: list[str]) -> Iterator[None]:
    """Put into the list what tifffile logs as errors meanwhile, and nothing onto the screen."""
    log, handler = logging.getLogger("tifffile"), logging.Handler(logging.ERROR)
    handler.emit = lambda record: complaints.append(record.getMessage())
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
