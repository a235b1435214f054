"""Medical Segmentation Decathlon: any of its ten tasks.

To be had at http://medicaldecathlon.com (also the AWS Open Data registry); CC BY-SA 4.0. Cite Antonelli et al., The
Medical Segmentation Decathlon, Nature Communications 13 (2022) 4128.

SOURCE is an unpacked task: Task04_Hippocampus/ with dataset.json, imagesTr/, labelsTr/ and imagesTs/. Images with four
axes (Task01, Task05) become one file a channel, as nnU-Net's own converter makes them (nnUNetv2_convert_MSD_dataset);
that one checks nothing, does not replace, and can leave a half-written data set. Number and name are the task's.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..files import read_json_object
from .raw_dataset.cases import Case, Dataset, Image, Mask, Problems
from .raw_dataset.command import main
from .raw_dataset.tree import images, locate, stem


def read(source: Path, options: argparse.Namespace, problems: Problems) -> Dataset:
    """The task in a folder."""
    task = locate(
        source, lambda folder: (folder / "dataset.json").is_file() and (folder / "imagesTr").is_dir(),
        "a task of the Decathlon, such as Task04_Hippocampus, with dataset.json, imagesTr, labelsTr and imagesTs",
    )  # fmt: skip
    told = read_json_object(task / "dataset.json", "download the task anew")
    try:
        channels = [told["modality"][str(number)] for number in range(len(told["modality"]))]
        labels = {("background" if int(value) == 0 else name): int(value) for value, name in told["labels"].items()}
        listed = [tuple(stem(Path(pair[part])) for part in ("image", "label")) for pair in told["training"]]
        listed_test = {stem(Path(file)) for file in told.get("test") or ()}
        if not channels:
            raise ValueError("no modality")
        if len(labels) < len(told["labels"]):
            raise ValueError(f"two labels of one name in {told['labels']}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{task / 'dataset.json'} is none of the Decathlon: {error!r}. Expected are modality and labels as in "
            f'{{"0": "MRI"}} and {{"0": "background", "1": "Anterior"}}, and training, a list of '
            f'{{"image": ..., "label": ...}}. If it was not edited, download the task anew.'
        ) from error
    _check_lists(told, labels, listed, partial(problems.add, task / "dataset.json"))
    named = re.fullmatch(r"Task(\d+)_(.+)", task.name)
    given = named[2] if named else str(told.get("name", ""))
    name = re.sub(r"[^A-Za-z0-9_-]", "", given)
    if not re.match(r"[A-Za-z0-9]", name):
        raise ValueError(
            f"{task}: its name, '{given}', begins with no letter from a to z and no digit, and nnU-Net's folders need "
            f"one. Rename the folder to Task{named[1] if named else '01'}_NAME."
        )
    dataset = Dataset(
        name, tuple(channels), labels,
        number=int(named[1]) if named else None, licence=str(told.get("licence", "")),
        reference=str(told.get("reference", "")), description=str(told.get("description", "")),
    )  # fmt: skip
    if name != given:
        dataset.notes.append(f"Its name, '{given}', is written {name}.")
    found, masks = images(task / "imagesTr", problems), images(task / "labelsTr", problems)
    test = images(task / "imagesTs", problems)
    for name in sorted(({image for image, _ in listed} | {*masks}) - {*found}):
        problems.add(name, f"there is no image of it in {task / 'imagesTr'}")
    for name in sorted({*found} - {image for image, _ in listed}):
        what = f"dataset.json does not list it. If it is a copy of another one, remove it from {task / 'imagesTr'}"
        problems.add(name, what)
    for name in sorted({*found} - {*masks}):
        problems.add(name, f"there is no segmentation of it in {task / 'labelsTr'}")
    for name in sorted(listed_test - {*test}) if test else ():
        problems.add(name, f"there is no image of it in {task / 'imagesTs'}")
    if listed_test and not test:
        dataset.notes.append(f"{task / 'imagesTs'} has none of {len(listed_test)} test images.")
    numbers = range(len(channels)) if len(channels) > 1 else (None,)
    for name in [name for name in found if name in masks]:
        of_channels = tuple(Image(found[name], number) for number in numbers)
        dataset.cases.append(Case(name, of_channels, (Mask(masks[name]),)))
    for name, file in test.items():
        dataset.cases.append(Case(name, tuple(Image(file, number) for number in numbers), training=False))
    if options.small is not None:
        _keep_some(dataset, options.small, options.seed)
    return dataset


def _check_lists(
    told: dict, labels: dict[str, int], listed: list[tuple[str | None, ...]], wrong: Callable[[str], object]
) -> None:
    """What dataset.json says of itself: labels, counts and pairs."""
    named = len(labels) > 1 and all(isinstance(name, str) and name for name in labels)
    if not named or sorted(labels.values()) != list(range(len(told["labels"]))):
        wrong(f"its labels are {told['labels']}; nnU-Net needs 0, 1, 2, ... without gaps, and a name for each")
    if told.get("numTraining") not in (None, len(listed)):
        wrong(f"numTraining is {told['numTraining']!r}, but {len(listed)} cases are listed; mend it, or download anew")
    for image, label in listed:
        if image != label:
            wrong(f"it pairs the image {image} with the segmentation {label}; expected the same name")
    for name, count in Counter(image for image, _ in listed).items():
        if count > 1:
            wrong(f"it lists {name} {count} times; expected it once")


def _keep_some(dataset: Dataset, count: int, seed: int) -> None:
    if count < 1:
        raise ValueError(f"--small is {count}; give the number of training cases to keep, 1 or more.")
    test = [case for case in dataset.cases if not case.training]
    kept = [random.Random(seed).sample(part, min(count, len(part))) for part in (dataset.training, test)]
    dataset.notes.append(
        f"A subset: {len(kept[0])} of {len(dataset.training)} training, {len(kept[1])} of {len(test)} test cases."
    )
    dataset.cases = [case for part in kept for case in sorted(part, key=lambda case: case.name)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--small", metavar="N", type=int, help="only N training (and N test) cases, drawn with --seed")


if __name__ == "__main__":
    sys.exit(main(__doc__, read, add_options))
