"""From logits to a segmentation of the image, and to probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from .manifest import Stage
from .preprocessing import Preprocessed
from .resampling import LogitsInSlabs, in_parallel

SLAB_VOXELS = 1 << 21
"""Voxels of one class that are resampled at once, 8 bytes each and some copies."""
BYTES_A_THREAD = 64e6
"""About what that takes."""

REGION_FROM = np.float16(2**-23)
"""The smallest logit of 16 bits whose sigmoid is above a half in PyTorch's float32: the second above 0."""


def segment(
    logits: np.ndarray,
    seen: Preprocessed,
    stage: Stage,
    regions_class_order: Sequence[int] | None,
    dtype: type[np.generic],
    threads: int = 1,
) -> np.ndarray:
    """The segmentation of the image before it was preprocessed.

    Logits are resampled class by class and slab by slab, and each slab's winner is kept: no class is ever there as a
    whole at the image's resolution.

    Args:
        logits: (outputs, z, y, x), float16, of what the networks saw.
        seen: What they saw.
        stage: Whose networks they are.
        regions_class_order: What is written for each output; None for its number.
        dtype: Of the result.
        threads: That work at the same time.

    Returns:
        (z, y, x) of the image, not transposed.
    """
    slabs = _slabs(logits, seen, stage)
    result = np.zeros(seen.shape_before_cropping, dtype)
    cropped = result[seen.box]

    def fill(part: slice) -> None:
        if regions_class_order is None:
            best = slabs.slab(0, part.start, part.stop).copy()
            for label in range(1, len(logits)):
                score = slabs.slab(label, part.start, part.stop)
                better = score > best
                cropped[part][better] = label
                np.copyto(best, score, where=better)
        else:
            for output, value in enumerate(regions_class_order):
                cropped[part][slabs.slab(output, part.start, part.stop) >= REGION_FROM] = value

    in_parallel(fill, _parts(slabs.shape), threads)
    return result.transpose(stage.transpose_backward)


def probabilities(
    logits: np.ndarray, seen: Preprocessed, stage: Stage, regions_class_order: Sequence[int] | None
) -> np.ndarray:
    """Softmax, or sigmoid for regions, at the image's resolution: (outputs, z, y, x), float32, all of it in memory.

    Args:
        logits, seen, stage, regions_class_order: As in `segment`.
    """
    slabs = _slabs(logits, seen, stage)
    whole = np.zeros((len(logits), *seen.shape_before_cropping), np.float32)
    if regions_class_order is None:
        whole[0] = 1  # outside of what was cropped
    cropped = whole[(slice(None), *seen.box)]
    for part in _parts(slabs.shape):
        values = np.stack([slabs.slab(output, part.start, part.stop) for output in range(len(logits))])
        values = values.astype(np.float32)
        if regions_class_order is None:
            values -= values.max(0)
            np.exp(values, out=values)
            values /= values.sum(0)
        else:
            with np.errstate(over="ignore"):
                values = 1 / (1 + np.exp(-values))
        cropped[:, part] = values
    return whole.transpose(0, *(axis + 1 for axis in stage.transpose_backward))


def _slabs(logits: np.ndarray, seen: Preprocessed, stage: Stage) -> LogitsInSlabs:
    return LogitsInSlabs(
        logits, seen.shape_after_cropping, stage.resampling_probabilities, seen.network_spacing, seen.spacing
    )


def _parts(shape: Sequence[int]) -> list[slice]:
    """Groups of slices with at most `SLAB_VOXELS` voxels, or single ones."""
    count = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    edges = [*range(0, shape[0], count), shape[0]]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
