"""The verb `predict`: all cases of a folder, one after the other."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bundle import Bundle
from .cases import OF_SIMPLE_ITK, Case, find_cases, passed_over
from .whole_files import check_file, check_name, remove_leftovers, written_beside

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Request:
    """What to do with each case; the options of `predict`."""

    output: Path
    step: float | None = None
    mirroring: bool = True
    save_probabilities: bool = False
    continue_prediction: bool = False


def predict_folder(bundle: Bundle, place: Path, request: Request) -> list[str]:
    """Segment every case; a case that fails is reported, and the others go on.

    Args:
        bundle: The model.
        place: A folder of images, or one image.
        request: Where to write, and how to predict.

    Returns:
        The names of the cases that failed.

    Raises:
        FileNotFoundError: There are no images.
        ValueError: A network of the bundle was changed, or the engine cannot load it; or the output's name is no text.
        OSError: The output folder cannot be written.
    """
    cases = find_cases(place, bundle.manifest)
    _make_writable(request.output)
    _ = bundle.networks  # a file that was changed is nothing that a next case could do without
    if others := passed_over(place, cases, bundle.manifest):
        print(
            f"Skipped, not named like CASE_0000{bundle.manifest.file_ending}: {', '.join(others)}",
            file=sys.stderr,
        )
    images = {file.resolve() for case in cases for file in case.files}
    failed = []
    for number, case in enumerate(cases, 1):
        say = _Progress(f"[{number}/{len(cases)}] {case.name}")
        wanted = [request.output / (case.name + case.ending)]
        if request.save_probabilities:
            wanted.append(request.output / (case.name + ".npz"))
        if request.continue_prediction and _are_whole(wanted):
            say.line("skipped: it is segmented already")
            continue
        try:
            _refuse_to_replace(images, wanted)
            _predict_case(bundle, case, request, wanted, say)
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            failed.append(case.name)
            say.line(f"FAILED: {_with_files(case, error)}")
    return failed


def _are_whole(wanted: list[Path]) -> bool:
    """Whether a case's files are there, and not cut short by a full disk or another program."""
    try:
        check_file(wanted[0])
    except ValueError:
        return False
    return all(file.is_file() for file in wanted)


def _predict_case(bundle: Bundle, case: Case, request: Request, wanted: list[Path], say: _Progress) -> None:
    from .images import read_case, write_image

    if case.fault:
        raise ValueError(case.fault)
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("default")
        prediction = bundle.predict_all(
            read_case(case.files),
            step=request.step,
            mirroring=request.mirroring,
            with_probabilities=request.save_probabilities,
            on_tile=say.tile,
        )
    for remark in remarks:
        if issubclass(remark.category, UserWarning):
            say.line(f"note: {remark.message}")
    if prediction.probabilities is not None:
        _write_probabilities(prediction.probabilities, wanted[1])
    write_image(prediction.segmentation, wanted[0])
    say.line(f"{time.perf_counter() - started:.1f} s")


def _refuse_to_replace(images: set[Path], wanted: list[Path]) -> None:
    for file in wanted:
        if file.resolve() in images:
            raise ValueError(f"{file} is an image and would be replaced by a segmentation; choose another -o")


def _write_probabilities(values: np.ndarray, file: Path) -> None:
    """Write a file beside its place and then move it there; raise OSError if that cannot be."""
    try:
        with written_beside(file) as beside:
            np.savez_compressed(beside, probabilities=values)
    except OSError as error:
        raise OSError(f"{file} could not be written: {error}. Make room, or choose another -o.") from error


def _with_files(case: Case, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"there is not enough memory ({text}); give --max-memory"
    # An OSError names its own file, which is one of the output as a rule.
    named = isinstance(error, OSError) or any(file.name in text for file in case.files)
    return text if named else f"{', '.join(map(str, case.files))}: {text}"


def _make_writable(output: Path) -> None:
    check_name(output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; give the name of a folder with -o.")
    if not output.exists() and output.name.lower().endswith((*OF_SIMPLE_ITK, ".png")):
        raise ValueError(f"{output} is a file's name; -o takes a folder, in which each case gets a file.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
        remove_leftovers(output)
    except OSError as error:
        raise OSError(f"{output} cannot be written ({error}); choose another folder with -o.") from error


class _Progress:
    """Lines on standard error: on a terminal one that is written over, else one now and then."""

    def __init__(self, title: str):
        self._title, self._terminal = title, sys.stderr.isatty()
        self._last = time.monotonic()

    def tile(self, done: int, total: int) -> None:
        if self._terminal:
            print(f"\r\x1b[K{self._title}: tile {done}/{total}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{self._title}: tile {done}/{total}", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}{self._title}: {text}", file=sys.stderr, flush=True)


def check(bundle: Bundle, say: Callable[[str], None]) -> None:
    """Read every file of a bundle, which compares checksums, and segment a small built-in image.

    Raises:
        ValueError: A file was changed or damaged, or the engine cannot run it.
    """
    import SimpleITK

    networks = bundle.networks
    say(f"{sum(map(len, networks))} networks have their checksums and load in {bundle.engine}")
    stage = bundle.manifest.stages[0]
    missing = (1,) * (3 - len(stage.patch_size))
    shape, spacing = (
        [[*missing, *told][axis] for axis in stage.transpose_backward] for told in (stage.patch_size, stage.spacing)
    )
    values = np.random.default_rng(0).integers(0, 255, shape).astype(np.float32)
    colours = bundle.manifest.image_reader == "NaturalImage2DIO"
    image = SimpleITK.GetImageFromArray(values[0] if colours else values)
    if not colours:
        image.SetSpacing([float(length) for length in spacing[::-1]])
    bundle.predict([image] * len(bundle.manifest.channel_names), mirroring=False)
    say(f"a built-in image of {' x '.join(map(str, shape))} voxels was segmented")
