"""Logits of an image larger than the patch: tiles weighted with a Gaussian, as nnU-Net's predictor adds them up.

That is in float16, also on a CPU: each sum is rounded before the next tile comes, so tiles come in nnU-Net's order.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Network = Callable[[np.ndarray], np.ndarray]
"""Tiles (n, channels, *patch), float32, to logits (n, outputs, *patch), float32."""


def predict_logits(
    data: np.ndarray,
    networks: Sequence[Network],
    patch_size: Sequence[int],
    outputs: int,
    *,
    step: float = 0.5,
    mirror_axes: Sequence[int] = (),
    batch: int = 1,
    new_array: Callable[[tuple[int, ...]], np.ndarray] = lambda shape: np.zeros(shape, np.float16),
    on_tile: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Logits of all voxels, the mean over networks.

    Args:
        data: (channels, z, y, x), float32; what is smaller than the patch is padded with zeros on both sides.
        networks: One for each fold.
        patch_size: Of the networks, two or three axes; two are those of slices.
        outputs: Their output channels.
        step: Distance of tiles, in patches; at most.
        mirror_axes: Axes of the patch; the prediction is the mean over all combinations of mirrored copies.
        batch: Tiles, mirrored or not, that a network is given at once.
        new_array: Makes an array of zeros, float16, of a shape.
        on_tile: Told how many tiles of how many are done, over all networks.

    Returns:
        (outputs, z, y, x), float16.

    Raises:
        ValueError: A sum is infinite or not a number.
    """
    padding = pad_widths(data.shape[1:], patch_size)
    padded = np.pad(data, [(0, 0), *padding]) if any(map(any, padding)) else data
    places = tile_places(padded.shape[1:], patch_size, step)
    gaussian = gaussian_map(tuple(patch_size))
    weights = np.zeros(padded.shape[1:], np.float16)
    for place in places:
        weights[place] += gaussian
    total, done = len(places) * len(networks), itertools.count(1)
    mean = None
    for network in networks:
        logits = new_array((outputs, *padded.shape[1:]))
        predictions = _predictions(padded, network, outputs, places, mirror_axes, batch)
        for place, prediction in zip(places, predictions, strict=True):
            prediction *= gaussian
            logits[(slice(None), *place)] += prediction
            on_tile(next(done), total)
        for channel in logits:
            channel /= weights
            # A NaN would be a background voxel to argmax, and nobody would know.
            if not np.isfinite(channel).all():
                raise ValueError(
                    f"its logits are infinite or not numbers in 16 bits; the image's values may be far from those "
                    f"that the model was trained with, or tiles, {step:g} of a patch apart, overlap too often"
                )
        mean = logits if mean is None else np.add(mean, logits, out=mean)
    if len(networks) > 1:
        for channel in mean:
            channel[...] = channel.astype(np.float32) / len(networks)
    inside = tuple(slice(before, before + length) for (before, _), length in zip(padding, data.shape[1:], strict=True))
    return mean[(slice(None), *inside)]


def pad_widths(shape: Sequence[int], patch_size: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after along each axis; where their number is odd, one more after."""
    wanted = (1,) * (len(shape) - len(patch_size)) + tuple(patch_size)
    missing = [max(0, patch - length) for patch, length in zip(wanted, shape, strict=True)]
    return [(width // 2, width - width // 2) for width in missing]


def tile_places(shape: Sequence[int], patch_size: Sequence[int], step: float) -> list[tuple]:
    """Where tiles lie, as indices into (z, y, x); for a patch of two axes the first index is a slice's number."""
    flat = len(patch_size) < len(shape)
    starts = [_starts(length, patch, step) for length, patch in zip(shape[flat:], patch_size, strict=True)]
    tiles = [
        tuple(slice(start, start + patch) for start, patch in zip(corner, patch_size, strict=True))
        for corner in itertools.product(*starts)
    ]
    return [(z, *tile) for z in range(shape[0]) for tile in tiles] if flat else tiles


def _starts(length: int, patch: int, step: float) -> list[int]:
    count = math.ceil((length - patch) / (patch * step)) + 1
    if count == 1:
        return [0]
    distance = (length - patch) / (count - 1)
    return [int(np.round(distance * index)) for index in range(count)]


@functools.lru_cache(maxsize=2)
def gaussian_map(patch_size: tuple[int, ...]) -> np.ndarray:
    """The weight of each voxel of a tile: 10 in its middle, a standard deviation of an eighth; never 0. float16."""
    from scipy.ndimage import gaussian_filter

    weights = np.zeros(patch_size)
    weights[tuple(length // 2 for length in patch_size)] = 1
    weights = gaussian_filter(weights, [length / 8 for length in patch_size], mode="constant")
    weights /= weights.max() / 10
    # Rounded twice, as PyTorch converts doubles.
    weights = weights.astype(np.float32).astype(np.float16)
    weights[weights == 0] = weights[weights > 0].min()
    return weights


def _predictions(
    data: np.ndarray, network: Network, outputs: int, places: Sequence[tuple], mirror_axes: Sequence[int], batch: int
) -> Iterator[np.ndarray]:
    """For each tile in turn the mean over its mirrored copies, (outputs, *patch), float32.

    Copies and tiles go to the network in groups of `batch`, so that all cores have work.
    """
    axes = [axis + 1 for axis in mirror_axes]  # after the channels
    flips = [flip for count in range(len(axes) + 1) for flip in itertools.combinations(axes, count)]
    work = ((place, flip) for place in places for flip in flips)
    total = None
    while group := list(itertools.islice(work, batch)):
        tiles = np.stack([np.flip(data[(slice(None), *place)], flip) for place, flip in group])
        predicted, expected = network(tiles), (len(tiles), outputs, *tiles.shape[2:])
        if predicted.shape != expected:
            raise ValueError(f"the network gives logits of shape {predicted.shape}, the bundle says {expected}")
        for (_, flip), logits in zip(group, predicted, strict=True):
            logits = np.flip(logits, flip)
            total = logits.copy() if flip == () else np.add(total, logits, out=total)
            if flip == flips[-1]:
                total /= len(flips)
                yield total
