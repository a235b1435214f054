"""Raw images as the network sees them: nnU-Net's preprocessing, cut into patches."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from ..analysis.models import TrainedModel

SAMPLES_PER_CHANNEL = 4  # positions for each channel of a layer, so that a fit is a fit and not a memory
LEAST_SAMPLES_PER_CHANNEL = 2
LEAST_PATCHES = 8


@dataclass(frozen=True)
class Case:
    """One case's image files, one a modality, in nnU-Net's naming: NAME_0000.ending, NAME_0001.ending, ..."""

    name: str
    files: tuple[str, ...]


def find_cases(folder: Path, model: TrainedModel) -> list[Case]:
    """The cases of a folder of images, sorted by name.

    Raises:
        FileNotFoundError: The folder is missing or holds no image of the model's file ending.
        ValueError: A case has another number of channels than the model takes.
    """
    ending = model.dataset_json["file_ending"]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one of images such as imagesTs.")
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob(f"*_[0-9][0-9][0-9][0-9]{ending}")):
        found.setdefault(path.name[: -len(ending) - 5], []).append(str(path))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no image in nnU-Net's naming, such as CASE_0000{ending} (the model reads {ending})."
        )
    channels = model.input_channels
    reader, channels_of = model.manager.image_reader_writer_class(), {}
    for name, files in found.items():
        # A file may hold several channels (RGB), so one case of each number of files is read.
        if len(files) not in channels_of:
            channels_of[len(files)] = len(reader.read_images(tuple(files))[0])
        if channels_of[len(files)] != channels:
            raise ValueError(
                f"Case {name} has {channels_of[len(files)]} channels in {len(files)} files, the model takes {channels} "
                f"({', '.join(map(str, model.dataset_json['channel_names'].values()))}); name files as for training, "
                f"CASE_0000{ending}, CASE_0001{ending}, ..."
            )
    return [Case(name, tuple(files)) for name, files in found.items()]


def preprocessed(model: TrainedModel, case: Case) -> np.ndarray:
    """What nnU-Net makes of a case before it predicts: (channels, *voxels), float32."""
    manager = model.manager
    configuration = manager.get_configuration(model.configuration)
    preprocessor = configuration.preprocessor_class(verbose=False)
    return preprocessor.run_case(list(case.files), None, manager, configuration, model.dataset_json)[0]


def patches(
    model: TrainedModel, cases: Sequence[Case], wanted: int, seed: int = 0
) -> tuple[list[torch.Tensor], list[Case]]:
    """Patches at places of nnU-Net's sliding window, as evenly from all cases as there are; seeded.

    Returns:
        At most `wanted` patches of the plans' size, one a tensor: (1, channels, *patch); and the cases they are of.
    """
    size = model.patch_size
    draw = random.Random(seed)
    left: list[torch.Tensor] = []
    if wanted < len(cases):
        cases = [cases[i * len(cases) // wanted] for i in range(wanted)]
    for index, case in enumerate(cases):
        image = torch.from_numpy(np.asarray(preprocessed(model, case), dtype=np.float32))
        image = pad_nd_image(image, size, "constant", {"value": 0})
        windows = _windows(image.shape[1:], size)
        share = -(-(wanted - len(left)) // (len(cases) - index))
        chosen = draw.sample(windows, min(share, len(windows)))
        # Cloned, so that the whole image does not stay in memory for a patch of it.
        left += [image[(slice(None), *window)][None].clone() for window in chosen]
    return left, list(cases)


def enough_patches(positions: Mapping[str, int], widths: Mapping[str, int]) -> int:
    """How many patches give every layer `SAMPLES_PER_CHANNEL` positions a channel, and at least `LEAST_PATCHES`.

    Args:
        positions: Of every unit's feature maps in one patch.
        widths: Its channels.
    """
    return max(LEAST_PATCHES, *(-(-SAMPLES_PER_CHANNEL * widths[name] // n) for name, n in positions.items()))


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
