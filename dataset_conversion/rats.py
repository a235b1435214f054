"""Rat brain lesions after focal cerebral ischemia, T2-weighted MRI: the data of Sauron and RatLesNetv2.

Not public: they belong to Charles River Discovery Services, Kuopio. Cite Valverde et al., Frontiers in Neuroscience 14
(2020) 610239, and for Sauron Neurocomputing 594 (2024) 127817. Any tree of the layout is converted.

SOURCE has, at any depth, folders STUDY/TIME POINT/ANIMAL, or STUDY/ANIMAL/TIME POINT, with these files, or one of them
named otherwise with --scan and --mask (RatLesNetv2's code reads scan_lesionIAM):

    21JUL2015/24h/32/scan.nii.gz          (x, y, slices), or one more axis of length 1
                     scan_lesion.nii.gz   0 background, 1 lesion

Which of the two is the time point the names tell (2h, 24h, D3, day 7, ...); others are named by --time-points. An
animal is a number within its study, and all its scans stay in one fold. A lesion mask may be empty.

A scan without a mask is an error. Valverde's code for RatLesNetv2 is of two minds: at first it took such scans for
animals without a lesion, later it passed over them. --unlabelled says which: empty or leave-out.

Sauron's code trains on the study 21JUL2015, with the first fifth of its scans by path for testing, whatever their
animals; that split is not offered. It means to leave out the time points 2h and 48h for having few scans (but compares
names that never match): --exclude-time-points 2h 48h. The layout is that of both repositories' code and README; nobody
of this project had the data at hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .raw_dataset.cases import Case, Dataset, Image, Mask, Problems
from .raw_dataset.command import main
from .raw_dataset.tree import by_key, case_name, check_source, stem, walk

UNIT = r"(?:min(?:ute)?s?|h|hours?|d|days?|w|wk|weeks?|m|mo|months?)"
TIME_POINT = re.compile(rf"\d+(?:\.\d+)?[ _-]?{UNIT}|(?:d|day|w|week|month)[ _-]?\d+|pre|post|baseline", re.IGNORECASE)
LAYOUT = "STUDY/TIME POINT/ANIMAL/scan.nii.gz and scan_lesion.nii.gz, such as 21JUL2015/24h/32/scan.nii.gz"


def read(source: Path, options: argparse.Namespace, problems: Problems) -> Dataset:
    """The scans below a folder."""
    check_source(source, LAYOUT)
    files = [*walk(source)]
    named = {point.lower() for point in options.time_points}

    def is_time_point(name: str) -> bool:
        return name.lower() in named or bool(TIME_POINT.fullmatch(name))

    folders = [path.parent for path in files if stem(path) in (options.scan, options.mask)]
    level = _level_of_time_point(folders, is_time_point) if folders else -2
    scans, masks = (
        by_key(
            files, lambda path, name=name: path.parent if stem(path) == name else None,
            lambda folder: _names(*_place(folder, level)), problems,
        )
        for name in (options.scan, options.mask)
    )  # fmt: skip
    if not scans:
        raise FileNotFoundError(f"{source} has no file {options.scan}.nii.gz below; expected {LAYOUT}.")
    for folder in sorted({*masks} - {*scans}):
        what = f"there is no {options.scan}.nii.gz beside this mask"
        problems.add(masks[folder], what, *_names(*_place(folder, level)))
    dataset = Dataset(
        "Rats", ("T2",), {"background": 0, "lesion": 1}, number=203, empty_masks=True,
        reference="https://doi.org/10.3389/fnins.2020.610239",
        description="Lesions after focal cerebral ischemia on T2-weighted MRI of rats",
    )  # fmt: skip
    least = 1 if is_time_point(source.name) else 2
    animals: dict[tuple[str, int], str] = {}
    excluded, left_out, points = {point.lower() for point in options.exclude_time_points}, 0, Counter()
    for folder, scan in sorted(scans.items()):
        study, point, animal = _place(folder, level)
        name, group = _names(study, point, animal)
        points[point] += 1
        one = animals.setdefault((study, int(animal)), animal) if animal.isdecimal() else animal
        if one != animal:
            what = f"{one} and {animal} are one number, and animals of {study} are known by it; rename one of them"
            problems.add(scan, what, name, group)
        if len(folder.relative_to(source).parts) < least:
            problems.add(scan, f"it does not lie in the expected folders, {LAYOUT}: move it, or give a folder above")
        elif is_time_point(animal) and not is_time_point(point):
            what = f"its time point, {animal}, is not where other scans have theirs ({point}); move it"
            problems.add(scan, what, name, group)
        elif point.lower() in excluded:
            problems.passes_over(name, group)
        elif folder in masks or options.unlabelled == "empty":
            mask = (Mask(masks[folder]),) if folder in masks else ()
            dataset.cases.append(Case(name, (Image(scan),), mask, group, blank=not mask))
        elif options.unlabelled is None:
            problems.add(
                name, f"there is no {options.mask}.nii.gz beside {scan}. Are such animals without a lesion: "
                "--unlabelled empty; or their masks not drawn: --unlabelled leave-out", group,
            )  # fmt: skip
        else:
            problems.passes_over(name, group)
            left_out += 1
    for point in sorted(excluded - {point.lower() for point in points}):
        problems.add(f"--exclude-time-points {point}", f"there are the time points {', '.join(sorted(points))}")
    dataset.notes.append("Scans: " + ", ".join(f"{count} of {point}" for point, count in sorted(points.items())) + ".")
    if left_out:
        dataset.notes.append(f"{left_out} scans without a mask were left out.")
    return dataset


def _level_of_time_point(folders: list[Path], is_time_point: Callable[[str], bool]) -> int:
    """Where in a path the time point is: -2 (STUDY/TIME POINT/ANIMAL) or -1."""
    places = [_place(folder, -2) for folder in folders]
    told = {level: sum(is_time_point(place[level]) for place in places) for level in (-2, -1, -3)}
    level = max(told, key=told.get)
    if not told[level]:
        raise ValueError(
            f"No folder has the name of a time point, such as 24h or D3, so it is not known which folders are animals; "
            f"the first is {folders[0]}. Name the folders of time points: --time-points TP1 TP2"
        )
    if level == -3:
        raise ValueError(
            f"{folders[0]} seems to have its time point, {places[0][-3]}, two folders too high; expected {LAYOUT}."
        )
    return level


def _place(folder: Path, level: int) -> tuple[str, str, str]:
    """Study, time point and animal, as the folders' names tell."""
    parts = "", "", *folder.parts  # it may lie in no folder
    return parts[-3], parts[level], parts[-3 - level]


def _names(study: str, point: str, animal: str) -> tuple[str, str]:
    """The case and the group."""
    return case_name(study, point, animal), f"{study}/{animal}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--time-points", metavar="NAME", nargs="+", default=[], help="such as baseline followup")
    parser.add_argument("--exclude-time-points", metavar="NAME", nargs="+", default=[], help="such as 2h 48h")
    parser.add_argument("--unlabelled", choices=("empty", "leave-out"), help="what to do with scans without a mask")
    parser.add_argument("--scan", metavar="NAME", default="scan", help="name of the images; default %(default)s")
    parser.add_argument("--mask", metavar="NAME", default="scan_lesion", help="name of the masks; default %(default)s")


if __name__ == "__main__":
    sys.exit(main(__doc__, read, add_options))
