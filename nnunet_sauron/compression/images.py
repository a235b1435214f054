"""Raw images as the network sees them: nnU-Net's preprocessing, cut into patches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from torch.nn import functional

from ..model.cases import Case, preprocess, read_case
from ..model.trained import TrainedModel
from ..pruning.moments import LEAST_SAMPLES_PER_CHANNEL, SAMPLES_PER_CHANNEL, patches_needed

LEAST_PATCHES = 8
SHIFT = 4  # patches are shifted by their sides divided by this
VOXELS_AT_ONCE = 1 << 16  # in one forward: small patches are faster together


def patches(
    model: TrainedModel, cases: Sequence[Case], wanted: int, seed: int = 0, *, more: bool = True
) -> list[torch.Tensor]:
    """Patches at places of nnU-Net's sliding window, spread evenly over the cases; seeded.

    Where there are fewer places than patches wanted, as in 2D images of the size of the patch, more are made of them:
    mirrored, along axes that the model was trained to be mirrored along; shifted by a quarter of the patch, with the
    zeros that nnU-Net pads images with; and both.

    Args:
        model: The model.
        cases: Where they are cut from.
        wanted: How many.
        seed: Another one gives other patches.
        more: Whether to make more of them.

    Returns:
        At most `wanted` patches of the plans' size, one a tensor: (1, channels, *patch).
    """
    size = model.patch_size
    draw = random.Random(seed)
    if wanted < len(cases):
        cases = [cases[i * len(cases) // wanted] for i in range(wanted)]
    left: list[torch.Tensor] = []
    # Of each case: spare ones, for cases that have fewer windows than their share, and ones that are made.
    spare: list[list[torch.Tensor]] = []
    made: list[list[torch.Tensor]] = []
    for index, case in enumerate(cases):
        image = preprocess(model, *read_case(model, case))[0]
        if not image.isfinite().all():
            raise ValueError(
                f"Case {case.name} has voxels that are not finite after nnU-Net's preprocessing, though its image "
                f"({', '.join(case.files)}) has none; nothing can be fitted on it. Leave it out."
            )
        image = pad_nd_image(image, size, "constant", {"value": 0})
        still = wanted - len(left)
        share = -(-still // (len(cases) - index))
        cut = _drawn(image, size, still, draw)
        left += cut[:share]
        spare.append(cut[share:])
        missing = still - len(cut) if more else 0
        made.append(list(itertools.islice(_more(image, size, model.mirror_axes, draw), missing)))
        for pool, others in ((made, spare), (spare, [])):
            while sum(map(len, pool)) > max(0, wanted - len(left) - sum(map(len, others))):
                max(pool, key=len).pop()
    return left + [patch for pool in (spare, made) for of_case in pool for patch in of_case]


def _drawn(image: torch.Tensor, size: Sequence[int], most: int, draw: random.Random) -> list[torch.Tensor]:
    """At most `most` windows of a padded image, in a random order."""
    windows = _windows(image.shape[1:], size)
    # Cloned, so that the whole image does not stay in memory for a patch of it.
    return [image[(slice(None), *w)][None].clone() for w in draw.sample(windows, min(most, len(windows)))]


def _more(
    image: torch.Tensor, size: Sequence[int], mirror_axes: Sequence[int] | None, draw: random.Random
) -> Iterator[torch.Tensor]:
    """More patches from all windows of a padded image: mirrored; shifted; both."""
    axes = [axis + 2 for axis in mirror_axes or ()]
    mirrored = [flip for count in range(1, len(axes) + 1) for flip in itertools.combinations(axes, count)]
    margins = [side // SHIFT for side in reversed(size) for _ in range(2)]
    for source, flips in ((image, mirrored), (None, [(), *mirrored])):
        # Padded once the mirrored ones do not suffice. Of an image as large as the patch, the windows are its corners.
        source = functional.pad(image, margins) if source is None else source
        windows = _windows(source.shape[1:], size)
        for flip in flips:
            for window in draw.sample(windows, len(windows)):
                patch = source[(slice(None), *window)][None]
                yield patch.flip(flip) if flip else patch.clone()


def batches(cut: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Patches (1, channels, *patch) put together into (B, channels, *patch)."""
    together = max(1, VOXELS_AT_ONCE // cut[0][0, 0].numel())
    return [torch.cat(list(cut[i : i + together])) for i in range(0, len(cut), together)]


def enough_patches(positions: Mapping[str, int], widths: Mapping[str, int]) -> int:
    """How many patches give every layer `SAMPLES_PER_CHANNEL` positions a channel, and at least `LEAST_PATCHES`."""
    return max(LEAST_PATCHES, patches_needed(positions, widths, SAMPLES_PER_CHANNEL))


def too_few(patches: int, positions: Mapping[str, int], widths: Mapping[str, int]) -> list[str]:
    """The layers that would be fitted on fewer than `LEAST_SAMPLES_PER_CHANNEL` positions a channel.

    Raises:
        ValueError: That is all of them.
    """
    short = [name for name, n in positions.items() if n * patches < LEAST_SAMPLES_PER_CHANNEL * widths[name]]
    if len(short) == len(positions):
        name = min(positions, key=lambda name: widths[name] / positions[name])
        n, least = positions[name], LEAST_SAMPLES_PER_CHANNEL * widths[name]
        raise ValueError(
            f"Too few voxels for a stable fit of any layer: even {name} has {widths[name]} channels and {n} positions "
            f"in a patch, {n * patches} in the {patches} patches of these images; at least {least} are needed, which "
            f"is {-(-least // n)} patches. Give more images, or let more of them be used (--max-images)."
        )
    return short


def _windows(shape: Sequence[int], size: Sequence[int]) -> list[tuple]:
    """nnU-Net's sliding window at half overlap; of every slice, if patches have an axis less than images."""
    planar = len(size) < len(shape)
    steps = compute_steps_for_sliding_window(shape[-len(size) :], size, 0.5)
    windows: list[tuple] = [()]
    for starts, side in zip(steps, size, strict=True):
        windows = [(*window, slice(start, start + side)) for window in windows for start in starts]
    return [(index, *window) for index in range(shape[0]) for window in windows] if planar else windows
