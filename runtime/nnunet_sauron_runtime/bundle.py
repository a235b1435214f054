"""A bundle that predicts: image in, segmentation out."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import engines
from .archive import Archive
from .labels import BYTES_A_THREAD, probabilities, segment
from .manifest import check_step
from .preprocessing import Preprocessed, preprocess
from .sliding_window import Network, pad_widths, predict_logits

if TYPE_CHECKING:
    import SimpleITK

    from .manifest import Stage

OnTile = Callable[[int, int], None]
GIGABYTE = 1e9
# Small tiles are predicted several at once: 56 x 40 in 2.0 ms each instead of 3.2 (OpenVINO, one thread of a Xeon).
# Large ones were no faster so, and take memory (40 x 56 x 40: 69 instead of 66 ms).
VOXELS_AT_ONCE, MOST_TILES_AT_ONCE = 1 << 14, 8


@dataclass(frozen=True)
class Prediction:
    """A segmented image.

    Attributes:
        segmentation: With the geometry of the image.
        probabilities: (outputs, z, y, x), float32; None unless asked for.
    """

    segmentation: SimpleITK.Image
    probabilities: np.ndarray | None


class Bundle:
    """A trained model with its whole pipeline. Nothing in it is executed or unpickled.

    Args:
        path: A zip or folder that `nnUNetv2_sauron export` wrote.
        engine: "openvino" or "onnxruntime".
        threads: For the engine and for resampling; None for all cores.
        max_memory: In GB. Logits of an image that would need more are kept in a temporary file, and fewer threads
            resample them, which is slower.

    Attributes:
        manifest: What bundle.json says.

    Raises:
        FileNotFoundError, OSError: There is no such bundle, or the system does not let it be read.
        ValueError: It is damaged, was changed, or is of a newer format; or the engine is unknown.
        ImportError: The engine is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        engine: str = engines.DEFAULT,
        threads: int | None = None,
        max_memory: float | None = None,
    ):
        self.path = Path(path)
        engines.check_engine(engine)
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, expected a number from 1.")
        if max_memory is not None and not max_memory > 0:
            raise ValueError(f"max_memory is {max_memory}, expected a number of GB above 0.")
        self.engine, self.threads, self.max_memory = engine, threads, max_memory
        self._archive = Archive(self.path)
        self.manifest = self._archive.manifest()

    @property
    def card(self) -> Mapping[str, Any]:
        """The model card: name, description, licence, authors, intended use and a warning."""
        return self.manifest.said.get("card", {})

    @cached_property
    def networks(self) -> list[list[Network]]:
        """For each stage its networks, loaded when they are first needed.

        Raises:
            ValueError: A file is not the one that was exported, or the engine cannot run it.
        """
        return [
            [
                engines.load_network(
                    self.engine, self._archive.read(name, self.manifest), f"{self.path}: {name}", self.threads
                )
                for name in stage.networks
            ]
            for stage in self.manifest.stages
        ]

    def predict(
        self,
        image: SimpleITK.Image | Sequence[SimpleITK.Image],
        *,
        step: float | None = None,
        mirroring: bool = True,
        on_tile: OnTile = lambda done, total: None,
    ) -> SimpleITK.Image:
        """The segmentation of an image, with its geometry.

        Args:
            image: One image, or one per channel in the order of `manifest.channel_names`.
            step: Distance of tiles in patches; None for the bundle's own, which is nnU-Net's.
            mirroring: Whether predictions are averaged over mirrored copies where the model allows it.
            on_tile: Told how many tiles of how many are done.

        Raises:
            ValueError: The image is not what the model takes.
        """
        return self.predict_all(image, step=step, mirroring=mirroring, on_tile=on_tile).segmentation

    def predict_all(
        self,
        image: SimpleITK.Image | Sequence[SimpleITK.Image],
        *,
        step: float | None = None,
        mirroring: bool = True,
        with_probabilities: bool = False,
        on_tile: OnTile = lambda done, total: None,
    ) -> Prediction:
        """As `predict`, with the probabilities of all classes or regions if asked for.

        Args:
            image, step, mirroring, on_tile: As in `predict`.
            with_probabilities: Whether to keep them, 4 bytes a voxel and output.

        Raises:
            ValueError: The image is not what the model takes, or its logits overflow.
            OSError: There is no room for a temporary file of logits.
        """
        from .images import from_array, to_array

        if step is not None:
            check_step(step)
        images = [image] if not isinstance(image, (list, tuple)) else list(image)
        array, spacing = to_array(images, self.manifest)
        foreground = self.manifest.foreground_labels
        order = self.manifest.regions_class_order
        dtype = np.uint8 if max((*foreground, *(order or ())), default=0) < 255 else np.uint16
        segmentation = chances = None
        for index, stage in enumerate(self.manifest.stages):
            seen = preprocess(array, spacing, stage, segmentation)
            last = index == len(self.manifest.stages) - 1
            logits = predict_logits(
                seen.data,
                self.networks[index],
                stage.patch_size,
                stage.outputs,
                step=step or stage.step,
                mirror_axes=stage.mirror_axes if mirroring else (),
                batch=_batch(stage),
                new_array=self._array_maker(array, seen, stage),
                on_tile=on_tile,
            )
            segmentation = segment(logits, seen, stage, order, dtype, self._resampling_threads())
            if last and with_probabilities:
                chances = probabilities(logits, seen, stage, order)
            del logits
        return Prediction(from_array(segmentation, images[0], self.manifest), chances)

    def _resampling_threads(self) -> int:
        """As many as work at the same time in half of the memory."""
        threads = self.threads or cores()
        if self.max_memory is None:
            return threads
        return max(1, min(threads, int(self.max_memory * GIGABYTE / 2 / BYTES_A_THREAD)))

    def _array_maker(
        self, image: np.ndarray, seen: Preprocessed, stage: Stage
    ) -> Callable[[tuple[int, ...]], np.ndarray]:
        """Arrays of zeros in memory or, where they do not fit, in temporary files."""
        voxels = np.prod([
            length + sum(widths)
            for length, widths in zip(
                seen.data.shape[1:], pad_widths(seen.data.shape[1:], stage.patch_size), strict=True
            )
        ])  # fmt: skip
        arrays = min(2, len(stage.networks))
        needed = image.nbytes + 2 * seen.data.nbytes + voxels * 2 * (stage.outputs * arrays + 1)
        if self.max_memory is None or needed <= self.max_memory * GIGABYTE:
            return lambda shape: np.zeros(shape, np.float16)

        return _in_file


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # neither on Windows nor on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _in_file(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros in a temporary file, of which nothing is left however the process ends."""
    size = math.prod(shape) * np.dtype(np.float16).itemsize
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):  # else a disk that fills up ends the process without a word
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, np.float16, "w+", shape=shape)
    except OSError as error:
        raise OSError(
            f"{tempfile.gettempdir()} has no room for {size / GIGABYTE:.3g} GB of logits ({error}); name another "
            f"folder in TMPDIR, or give a larger --max-memory"
        ) from error


def _batch(stage: Stage) -> int:
    """Tiles that a network is given at once."""
    return max(1, min(MOST_TILES_AT_ONCE, VOXELS_AT_ONCE // math.prod(stage.patch_size)))
