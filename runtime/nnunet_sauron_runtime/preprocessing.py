"""From an image to what the networks see, as nnU-Net's `DefaultPreprocessor` does it: transposed, cropped, normalised,
resampled. In its order and its memory layout, since a mean over floats depends on both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .manifest import Normalization, Stage
from .resampling import new_shape, resample_image, resample_segmentation

EPSILON = 1e-8
MOST_VOXELS = 2**33  # 32 GiB
OUTSIDE = -1  # nnU-Net's label of what lies outside the body


@dataclass(frozen=True)
class Preprocessed:
    """What the networks see, and how to find the way back.

    Attributes:
        data: (channels, z, y, x), float32, after transposition.
        shape_before_cropping: Of the transposed image.
        box: What was cropped out of it.
        spacing: Of the image in mm, after transposition.
        network_spacing: Of `data` in mm; three numbers, also in 2D.
    """

    data: np.ndarray
    shape_before_cropping: tuple[int, ...]
    box: tuple[slice, ...]
    spacing: tuple[float, ...]
    network_spacing: tuple[float, ...]

    @property
    def shape_after_cropping(self) -> tuple[int, ...]:
        """Voxels of the cropped image before resampling."""
        return tuple(part.stop - part.start for part in self.box)


def preprocess(
    image: np.ndarray, spacing: Sequence[float], stage: Stage, previous: np.ndarray | None = None
) -> Preprocessed:
    """Transpose, crop to what is not zero, normalise, resample.

    Args:
        image: (channels, z, y, x), float32; left as it is.
        spacing: mm along z, y and x.
        stage: Whose networks are to see it.
        previous: In a cascade the segmentation of the first stage, (z, y, x).

    Raises:
        ValueError: The image is not what a normalisation takes, or is left without a voxel, or with too many.
    """
    forward = stage.transpose_forward
    data = image.astype(np.float32).transpose(0, *(axis + 1 for axis in forward))
    spacing = tuple(float(spacing[axis]) for axis in forward)
    shape_before_cropping = data.shape[1:]
    inside = nonzero_mask(data)
    box = bounding_box(inside)
    data, inside = data[(slice(None), *box)], inside[box]
    network_spacing = tuple(stage.spacing) if len(stage.spacing) == 3 else (spacing[0], *stage.spacing)
    shape = new_shape(data.shape[1:], spacing, network_spacing)
    if min(shape) < 1 or math.prod(shape) > MOST_VOXELS:
        raise ValueError(
            f"the image of {data.shape[1:]} voxels of {spacing} mm has {shape} voxels at the model's spacing of "
            f"{network_spacing} mm; check its spacing"
        )
    labels = None if previous is None else previous.transpose(forward)[box].astype(np.float32)
    # What the first stage labelled counts as inside, as nnU-Net has it.
    judged = inside if labels is None else inside | (labels > 0)
    for channel, normalization in zip(data, stage.normalization, strict=True):
        channel[...] = normalize(channel, judged, normalization)
    data = resample_image(data, shape, stage.resampling_data, spacing, network_spacing)
    if labels is not None:
        labels[(labels == 0) & ~inside] = OUTSIDE
        labels = resample_segmentation(labels, shape, stage.resampling_seg, spacing, network_spacing)
        one_hot = np.stack([labels == label for label in stage.previous_stage_labels])
        data = np.concatenate([data, one_hot.astype(np.float32)])
    return Preprocessed(data, shape_before_cropping, box, spacing, network_spacing)


def nonzero_mask(data: np.ndarray) -> np.ndarray:
    """Where any channel is not zero, with holes filled: (z, y, x), bool.

    Args:
        data: (channels, z, y, x).
    """
    from scipy.ndimage import binary_fill_holes

    mask = data[0] != 0
    for channel in data[1:]:
        mask |= channel != 0
    if mask.all():  # nothing to fill, which SciPy takes seconds to find out
        return mask
    return binary_fill_holes(mask)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around a mask; all of it where it is empty."""
    box = []
    for axis in range(mask.ndim):
        there = np.flatnonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0, mask.shape[axis]))
    return tuple(box)


def normalize(channel: np.ndarray, inside: np.ndarray, normalization: Normalization) -> np.ndarray:
    """A channel's intensities as the network was trained with, in place.

    Args:
        channel: (z, y, x), float32.
        inside: Where the image is not zero, or labelled by the stage before; used by `ZScoreNormalization` with
            `use_mask_for_norm`.
        normalization: The scheme and its numbers.

    Raises:
        ValueError: `RGBTo01Normalization` is given values outside 0 to 255.
    """
    scheme = normalization.scheme
    if scheme == "ZScoreNormalization" and normalization.use_mask_for_norm:
        values = channel[inside]
        if values.size:
            channel[inside] = (values - values.mean()) / max(values.std(), EPSILON)
    elif scheme == "ZScoreNormalization":
        mean, deviation = channel.mean(), channel.std()
        channel -= mean
        channel /= max(deviation, EPSILON)
    elif scheme == "CTNormalization":
        np.clip(channel, normalization.percentile_00_5, normalization.percentile_99_5, out=channel)
        channel -= normalization.mean
        channel /= max(normalization.std, EPSILON)
    elif scheme == "RescaleTo01Normalization":
        channel -= channel.min()
        channel /= np.clip(channel.max(), EPSILON, None)
    elif scheme == "RGBTo01Normalization":
        low, high = channel.min(), channel.max()
        if low < 0 or high > 255:
            raise ValueError(f"its values go from {low:g} to {high:g}; the model takes colours from 0 to 255")
        channel /= 255.0
    return channel
