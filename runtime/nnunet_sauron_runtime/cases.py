"""Which files belong to which case, by nnU-Net's names: CASE_0000.nii.gz, CASE_0001.nii.gz, ..."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .manifest import Manifest

OF_SIMPLE_ITK = (".nii.gz", ".nii", ".nrrd", ".mha")
NUMBER = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Case:
    """One image.

    Attributes:
        name: Without channel and ending.
        ending: Of its files, and of its segmentation.
        files: One per channel.
        fault: What is wrong with them; empty if nothing is.
    """

    name: str
    ending: str
    files: tuple[Path, ...]
    fault: str = ""


def find_cases(place: Path, manifest: Manifest) -> list[Case]:
    """The cases in a folder, or that of one file.

    Hidden files are passed over, and so are those of other kinds.

    Args:
        place: A folder, or one image; of a case with several channels any of them.
        manifest: Of the model.

    Raises:
        FileNotFoundError: There is no such place, or no image in it.
    """
    if not place.exists():
        raise FileNotFoundError(f"{place} is not there; give a folder of images or one image with -i.")
    endings = _endings(manifest)
    count = len(manifest.channel_names)
    if place.is_file():
        if _ending(place.name, endings) is None:
            raise FileNotFoundError(
                f"{place} is no image that the model takes; its ending would be {' or '.join(endings)}."
            )
        stem = place.name.removesuffix(_ending(place.name, endings))
        if not NUMBER.fullmatch(stem):
            one = count == 1 or manifest.image_reader == "NaturalImage2DIO"  # whose colours are channels
            fault = "" if one else f"{place} is one file; the model takes {_expected('CASE', manifest)}"
            return [Case(stem, _ending(place.name, endings), (place,), fault)]
    files = place.parent.iterdir() if place.is_file() else place.iterdir()
    found: dict[tuple[str, str], dict[int, Path]] = {}
    others = []
    for file in sorted(files):
        ending = _ending(file.name, endings)
        if file.name.startswith(".") or ending is None:
            others.append(file.name)
            continue
        numbered = NUMBER.fullmatch(file.name.removesuffix(ending))
        if numbered is None:
            others.append(file.name)
        else:
            found.setdefault((numbered[1], ending), {})[int(numbered[2])] = file
    if place.is_file():
        found = {case: channels for case, channels in found.items() if place in channels.values()}
    if not found:
        there = f"; it holds {', '.join(others[:3])}" + (", ..." if len(others) > 3 else "") if others else ""
        raise FileNotFoundError(
            f"{place} has no images named as nnU-Net has them, such as {_expected('CASE', manifest)}{there}."
        )
    cases = [_case(name, ending, channels, manifest) for (name, ending), channels in sorted(found.items())]
    times = Counter(case.name for case in cases)
    return [replace(case, fault=_in_several(case)) if times[case.name] > 1 else case for case in cases]


def passed_over(place: Path, cases: Sequence[Case], manifest: Manifest) -> list[str]:
    """Names of the files in a folder that look like images and belong to no case, nor are a case's segmentation."""
    if place.is_file():
        return []
    known = {file.name for case in cases for file in (*case.files, Path(case.name + case.ending))}
    names = sorted(file.name for file in place.iterdir() if not file.name.startswith("."))
    return [name for name in names if name not in known and _ending(name.lower(), _endings(manifest))]


def _in_several(case: Case) -> str:
    files = ", ".join(file.name for file in case.files)
    return f"{files}: the case {case.name} is there with another ending, too; leave one of the two"


def _case(name: str, ending: str, channels: dict[int, Path], manifest: Manifest) -> Case:
    files = tuple(channels[number] for number in sorted(channels))
    one_in_colours = manifest.image_reader == "NaturalImage2DIO" and list(channels) == [0]
    fits = sorted(channels) == list(range(len(manifest.channel_names))) or one_in_colours
    fault = "" if fits else (
        f"{', '.join(file.name for file in files)}: {len(files)} channel{'s' * (len(files) != 1)}; the model takes "
        f"{_expected(name, manifest, ending)}{_read_as_channel(name, ending, channels, manifest)}"
    )  # fmt: skip
    return Case(name, ending, files, fault)


def _read_as_channel(name: str, ending: str, channels: Collection[int], manifest: Manifest) -> str:
    """What to do about a name that ends with a year, say, where the model takes one channel."""
    if len(manifest.channel_names) > 1 or len(channels) > 1:
        return ""
    (number,) = channels
    return f". The {number:04d} in its name is read as a channel's number: rename it {name}_{number:04d}_0000{ending}"


def _expected(name: str, manifest: Manifest, ending: str | None = None) -> str:
    return ", ".join(
        f"{name}_{number:04d}{ending or manifest.file_ending} ({channel})"
        for number, channel in enumerate(manifest.channel_names)
    )


def _endings(manifest: Manifest) -> tuple[str, ...]:
    if manifest.image_reader == "NaturalImage2DIO":
        return (manifest.file_ending,)
    return tuple(dict.fromkeys((manifest.file_ending, *OF_SIMPLE_ITK)))


def _ending(name: str, endings: tuple[str, ...]) -> str | None:
    return next((ending for ending in endings if name.endswith(ending)), None)
