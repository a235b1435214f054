"""Raw images as the network sees them: nnU-Net's preprocessing, cut into patches."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from ..analysis.cases import Case, preprocess, read_case
from ..analysis.models import TrainedModel
from ..pruning.moments import LEAST_SAMPLES_PER_CHANNEL, SAMPLES_PER_CHANNEL, patches_needed

LEAST_PATCHES = 8
VOXELS_AT_ONCE = 1 << 16  # in one forward: small patches are faster together


def patches(
    model: TrainedModel, cases: Sequence[Case], wanted: int, seed: int = 0
) -> tuple[list[torch.Tensor], list[Case]]:
    """Patches at places of nnU-Net's sliding window, as evenly from all cases as there are; seeded.

    Returns:
        At most `wanted` patches of the plans' size, one a tensor: (1, channels, *patch); and the cases they are of.
    """
    size = model.patch_size
    draw = random.Random(seed)
    if wanted < len(cases):
        cases = [cases[i * len(cases) // wanted] for i in range(wanted)]
    left: list[torch.Tensor] = []
    spare: list[list[torch.Tensor]] = []  # of each case, for those that have fewer windows than their share
    for index, case in enumerate(cases):
        image = preprocess(model, *read_case(model, case))[0]
        if not image.isfinite().all():
            raise ValueError(
                f"Case {case.name} has voxels that are not finite after nnU-Net's preprocessing, though its image "
                f"({', '.join(case.files)}) has none; nothing can be fitted on it. Leave it out."
            )
        image = pad_nd_image(image, size, "constant", {"value": 0})
        windows = _windows(image.shape[1:], size)
        share = -(-(wanted - len(left)) // (len(cases) - index))
        chosen = draw.sample(windows, min(wanted, len(windows)))
        # Cloned, so that the whole image does not stay in memory for a patch of it.
        cut = [image[(slice(None), *window)][None].clone() for window in chosen[: wanted - len(left)]]
        left += cut[:share]
        spare.append(cut[share:])
        while sum(map(len, spare)) > wanted - len(left):
            max(spare, key=len).pop()
    return left + [patch for of_case in spare for patch in of_case], list(cases)


def batches(cut: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Patches (1, channels, *patch) put together into (B, channels, *patch)."""
    together = max(1, VOXELS_AT_ONCE // cut[0][0, 0].numel())
    return [torch.cat(list(cut[i : i + together])) for i in range(0, len(cut), together)]


def enough_patches(positions: Mapping[str, int], widths: Mapping[str, int]) -> int:
    """How many patches give every layer `SAMPLES_PER_CHANNEL` positions a channel, and at least `LEAST_PATCHES`."""
    return max(LEAST_PATCHES, patches_needed(positions, widths, SAMPLES_PER_CHANNEL))


def check_enough(patches: int, positions: Mapping[str, int], widths: Mapping[str, int]) -> None:
    """Raise ValueError if a layer would be fitted on fewer than `LEAST_SAMPLES_PER_CHANNEL` positions a channel."""
    for name, n in positions.items():
        least = LEAST_SAMPLES_PER_CHANNEL * widths[name]
        if n * patches < least:
            raise ValueError(
                f"Too few voxels for a stable fit: layer {name} has {widths[name]} channels and {n} positions in a "
                f"patch, {n * patches} in the {patches} patches of these images; at least {least} are needed, which "
                f"is {-(-least // n)} patches. Give more images, or let more of them be used (--max-images)."
            )


def _windows(shape: Sequence[int], size: Sequence[int]) -> list[tuple]:
    """nnU-Net's sliding window at half overlap; of every slice, if patches have an axis less than images."""
    planar = len(size) < len(shape)
    steps = compute_steps_for_sliding_window(shape[-len(size) :], size, 0.5)
    windows: list[tuple] = [()]
    for starts, side in zip(steps, size, strict=True):
        windows = [(*window, slice(start, start + side)) for window in windows for start in starts]
    return [(index, *window) for index in range(shape[0]) for window in windows] if planar else windows
