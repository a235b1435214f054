"""The patch and batch of lean plans: sizes that pooling allows, and growth within a memory estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

# nnU-Net's ExperimentPlanner.max_dataset_covered, its precaution against overfitting.
MAX_DATASET_COVERED = 0.05


def pooling_steps(strides: Sequence[int | Sequence[int]], axes: int) -> tuple[int, ...]:
    """The total stride: voxels of the input per voxel of the lowest resolution, by axis."""
    per_stage = [[stride] * axes if isinstance(stride, int) else stride for stride in strides]
    return tuple(math.prod(stage[axis] for stage in per_stage) for axis in range(axes))


def check_patch(patch_size: Sequence[int], steps: Sequence[int], configuration: str) -> None:
    """Raise ValueError unless the patch can be pooled.

    Args:
        patch_size: Voxels per axis.
        steps: As `pooling_steps` gives them.
        configuration: Its name, for the message.
    """
    if len(patch_size) != len(steps):
        raise ValueError(
            f"The patch size {_joined(patch_size)} has {len(patch_size)} axes, but {configuration} has {len(steps)}; "
            f"give one value per axis, or choose configurations with -c."
        )
    for axis, (size, step) in enumerate(zip(patch_size, steps, strict=True)):
        if size < 1 or size % step:
            below = max(size, 0) // step * step
            nearest = [allowed for allowed in (below, below + step) if allowed > 0]
            raise ValueError(
                f"The patch size {size} of axis {axis} cannot be pooled by {configuration}: it must be a multiple of "
                f"{step}; nearest are {' and '.join(map(str, nearest))}."
            )
    if tuple(patch_size) == tuple(steps):
        raise ValueError(
            f"The patch size {_joined(patch_size)} leaves a single voxel at the lowest resolution of {configuration}, "
            f"which cannot be normalised; give a multiple of {_joined(steps)} that is larger on some axis."
        )


def enlarged_patch(
    patch_size: Sequence[int],
    steps: Sequence[int],
    median_size: Sequence[float],
    fits: Callable[[Sequence[int]], bool],
) -> tuple[int, ...]:
    """The patch, grown step by step on the axis where it covers least of the median image.

    Args:
        patch_size: Voxels per axis to begin with; it never shrinks.
        steps: Voxels by which each axis grows.
        median_size: The dataset's median image, in voxels; no axis grows beyond it, rounded up to a step.
        fits: Whether a patch is within the memory.
    """
    patch, limits = list(patch_size), patch_limits(steps, median_size)
    while True:
        for axis in sorted(range(len(patch)), key=lambda axis: patch[axis] / median_size[axis]):
            grown = [size + steps[axis] * (i == axis) for i, size in enumerate(patch)]
            if grown[axis] <= limits[axis] and fits(grown):
                patch = grown
                break
        else:
            return tuple(patch)


def patch_limits(steps: Sequence[int], median_size: Sequence[float]) -> tuple[int, ...]:
    """The median image, every axis rounded up to a step."""
    return tuple(math.ceil(size / step) * step for size, step in zip(median_size, steps, strict=True))


def largest_batch(patch_size: Sequence[int], dataset_voxels: float) -> int:
    """nnU-Net's cap: a batch covers at most 5 % of the dataset's voxels (training cases at their median size)."""
    return round(dataset_voxels * MAX_DATASET_COVERED / math.prod(patch_size))


def _joined(sizes: Sequence[int]) -> str:
    return " ".join(map(str, sizes))
