"""A data set as a list of cases: what is checked first and written then. Nothing here reads an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Image:
    """One channel of a case.

    Attributes:
        file: NIfTI, `.nii.gz` or `.nii`, or MINC, `.mnc`.
        channel: Which volume of a file with four axes; None for a file with three.
    """

    file: Path
    channel: int | None = None


@dataclass(frozen=True)
class Mask:
    """A file that gives a case's segmentation, or a part of it.

    Attributes:
        file: NIfTI or MINC of the images' shape and place.
        values: What is written for each value of the file; 0 stays 0. None: values are written as they are.
        shifted: Whether two values that are one apart, but no whole numbers, may stand for 0 and 1.
    """

    file: Path
    values: Mapping[int, int] | None = None
    shifted: bool = False


@dataclass(frozen=True)
class Case:
    """One case of nnU-Net's.

    Attributes:
        name: In nnU-Net's file names.
        images: One a channel, in the channels' order.
        masks: They must not overlap where they are not 0. Empty for a case without labels.
        group: Cases of a group (a patient, an animal) stay in the same fold; by default a case is one of its own.
        training: Whether it goes to imagesTr and labelsTr, else to imagesTs (and labelsTs if it has masks).
        crop: Given the masks (x, y, z), in their order, the part of the volume to write; None: all of it. A function
            of a module, or a `functools.partial` of one, as other processes call it; it may raise ValueError.
            conversion.json keeps the place, for `crops.undo`.
        whole: With `crop`, the name of what the crops of one volume are put together to.
        blank: Whether it is known to have nothing to segment, so that a training case without masks gets an empty one.
    """

    name: str
    images: tuple[Image, ...]
    masks: tuple[Mask, ...] = ()
    group: str = ""
    training: bool = True
    crop: Callable[[list[np.ndarray]], tuple[slice, slice, slice]] | None = None
    whole: str = ""
    blank: bool = False

    @property
    def names(self) -> frozenset[str]:
        """What a user may call it: its own name, the patient's, and the whole's that it is a crop of."""
        return frozenset({self.name, self.group, self.whole} - {""})

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it is made of, each once."""
        return tuple(dict.fromkeys([image.file for image in self.images] + [mask.file for mask in self.masks]))


@dataclass
class Dataset:
    """A data set to be written.

    Attributes:
        name: The part of its folder's name after the number: `ACDC` of `Dataset027_ACDC`.
        channel_names: As in dataset.json; nnU-Net normalises a channel called CT in another way.
        labels: As in dataset.json, with a tuple of values for a region.
        cases: All cases, training and test.
        number: Its number if the user gives none.
        regions_class_order: As in dataset.json, with regions only.
        empty_masks: Whether a segmentation may be all background.
        licence, reference, description: For dataset.json; whose data it is and what may be done with it.
        notes: What the user should know of it, such as cases that were left out; shown and kept in conversion.json.
        splits: Folds, as in splits_final.json, where the paper's own are known; None: five seeded ones.
    """

    name: str
    channel_names: tuple[str, ...]
    labels: dict[str, int | tuple[int, ...]]
    cases: list[Case] = field(default_factory=list)
    number: int | None = None
    regions_class_order: tuple[int, ...] | None = None
    empty_masks: bool = False
    licence: str = ""
    reference: str = ""
    description: str = ""
    notes: list[str] = field(default_factory=list)
    splits: list[dict[str, list[str]]] | None = None

    @property
    def values(self) -> frozenset[int]:
        """All values that a segmentation may have."""
        return frozenset(
            value
            for of_label in self.labels.values()
            for value in (of_label if isinstance(of_label, tuple) else (of_label,))
        )

    @property
    def training(self) -> list[Case]:
        return [case for case in self.cases if case.training]


class Problems(list):
    """What is wrong with a download, a line each; all of them are shown before anything is written.

    Args:
        excluded: Names of cases and patients, to which nothing can be wrong.
    """

    def __init__(self, excluded: Iterable[str] = ()):
        super().__init__()
        self.excluded, self.passed_over = {*excluded}, set()

    def add(self, where: object, what: str, *names: str) -> None:
        """Add a line, unless `where` or one of `names`, the case's and the patient's, is excluded."""
        if not self.passes_over(str(where), *names):
            self.append(f"{where}: {what}")

    def passes_over(self, *names: str) -> bool:
        """Whether one of the names is excluded; it then counts as found, though there may be no case of it."""
        of_excluded = self.excluded.intersection(names)
        self.passed_over |= of_excluded
        return bool(of_excluded)
