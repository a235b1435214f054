"""Validation: everything about every case is read and compared before a byte is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from ...console.progress import Progress
from .cases import Case, Dataset, Problems
from .nifti import check_same_place, read_image, read_mask, some
from .parallel import in_parallel

Result = TypeVar("Result")


def check_dataset(dataset: Dataset, problems: Problems, processes: int, progress: Progress) -> None:
    """Read every file of a data set; what is wrong is added to `problems`."""
    if not dataset.training:
        problems.append("There is no training case, so nothing to convert; see --help for the expected layout.")
    for name, count in Counter(case.name for case in dataset.cases).items():
        if count > 1:
            files = ", ".join(str(case.files[0]) for case in dataset.cases if case.name == name)
            problems.add(name, f"there are {count} cases of this name: {files}")
    groups = [{case.group or case.name for case in dataset.cases if case.training is part} for part in (True, False)]
    for group in sorted(groups[0] & groups[1]):
        problems.add(group, "there are training and test cases of this patient; keep one of both")
    check = partial(check_case, channels=len(dataset.channel_names), values=dataset.values, empty=dataset.empty_masks)
    checked = in_parallel(check, dataset.cases, processes, progress, "checking")
    for case, (found, _) in zip(dataset.cases, checked, strict=True):
        problems.extend(f"{case.name}: {what}" for what in found)
    test = [bool(case.masks) for case in dataset.cases if not case.training]
    if any(test) and not all(test):
        dataset.notes.append(
            f"{sum(test)} of {len(test)} test cases have a segmentation; nnU-Net evaluates these alone."
        )
    if empty := sum(nothing for _, nothing in checked):
        dataset.notes.append(f"{empty} of {len(dataset.cases)} cases have an empty segmentation (all background).")


def check_case(case: Case, channels: int, values: frozenset[int], empty: bool) -> tuple[list[str], bool]:
    """All that is wrong with one case, and whether its segmentation is empty.

    Args:
        case: The case.
        channels: How many images it should have.
        values: What its segmentation may hold.
        empty: Whether this may be all background.
    """
    problems: list[str] = []
    if len(case.images) != channels:
        problems.append(f"it has {len(case.images)} channels, expected {channels}")
    if case.training and not case.masks and not case.blank:
        problems.append(f"{case.images[0].file} has no segmentation; a training case needs one (or --exclude it)")
    volumes = Counter(image.file for image in case.images)
    opened = [
        _collect(problems, lambda image=image: read_image(image, volumes[image.file], values)) for image in case.images
    ]
    opened = [image for image in opened if image is not None]
    for other in opened[1:]:
        _collect(problems, lambda other=other: check_same_place(opened[0], other))
    masks = [_collect(problems, lambda mask=mask: read_mask(mask)) for mask in case.masks]
    readable = [mask for mask in masks if mask is not None]
    for stored, labels in readable:
        if opened:
            _collect(problems, lambda stored=stored: check_same_place(opened[0], stored))
        if unknown := sorted(set(np.unique(labels).tolist()) - values):
            wanted = some(sorted(values))
            problems.append(f"{stored.get_filename()} has the values {some(unknown)}; the labels are {wanted}")
    if len(readable) > 1 and len({labels.shape for _, labels in readable}) == 1:
        twice = np.count_nonzero(sum((labels != 0).astype(np.uint8) for _, labels in readable) > 1)
        if twice:
            files = " and ".join(str(mask.file) for mask in case.masks)
            problems.append(f"{twice} voxels are marked in more than one of {files}; masks must not overlap")
    if case.crop and len(readable) == len(case.masks):
        _collect(problems, lambda: case.crop([labels for _, labels in readable]))
    nothing = [stored.get_filename() for stored, labels in readable if not labels.any()]
    if nothing and not empty:
        problems.append(
            f"its segmentation is empty (all background): {', '.join(nothing)}; --allow-empty takes empty ones"
        )
    return problems, case.blank or 0 < len(nothing) == len(masks)


def _collect(problems: list[str], check: Callable[[], Result]) -> Result | None:
    try:
        return check()
    except (ValueError, OSError) as error:
        if str(error) not in problems:  # of a file with several channels
            problems.append(str(error))
        return None
