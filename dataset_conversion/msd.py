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
        listed = {str(stem(Path(pair["image"]))) for pair in told["training"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{task / 'dataset.json'} is none of the Decathlon: {error!r}; download the task anew."
        ) from error
    if sorted(labels.values()) != list(range(len(told["labels"]))):
        problems.add(task / "dataset.json", f"its labels are {told['labels']}; nnU-Net needs 0, 1, 2, ... and names")
    named = re.fullmatch(r"Task(\d+)_(.+)", task.resolve().name)
    dataset = Dataset(
        re.sub(r"[^A-Za-z0-9_-]", "", named[2] if named else str(told.get("name", ""))), tuple(channels), labels,
        number=int(named[1]) if named else None, licence=str(told.get("licence", "")),
        reference=str(told.get("reference", "")), description=str(told.get("description", "")),
    )  # fmt: skip
    found, masks = images(task / "imagesTr", problems), images(task / "labelsTr", problems)
    for name in sorted((listed | {*masks}) - {*found}):
        problems.add(name, f"there is no image of it in {task / 'imagesTr'}")
    for name in sorted({*found} - {*masks}):
        problems.add(name, f"there is no segmentation of it in {task / 'labelsTr'}")
    if told.get("numTraining") != len(listed):
        problems.add(
            task / "dataset.json", f"numTraining is {told.get('numTraining')}, but {len(listed)} cases are listed"
        )
    split = len(channels) > 1
    for name, file in found.items():
        channel_images = tuple(Image(file, number if split else None) for number in range(len(channels)))
        dataset.cases.append(Case(name, channel_images, (Mask(masks[name]),) if name in masks else ()))
    for name, file in images(task / "imagesTs", problems).items():
        channel_images = tuple(Image(file, number if split else None) for number in range(len(channels)))
        dataset.cases.append(Case(name, channel_images, training=False))
    if options.small is not None:
        _keep_some(dataset, options.small, options.seed)
    return dataset


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
