"""HarP: hippocampi on T1-weighted MRI of ADNI, by the EADC-ADNI harmonised protocol; 135 subjects.

To be had at http://www.hippocampal-protocol.net/SOPs/labels.php (masks and ACPC-aligned scans) and, for other versions
of the scans, at https://adni.loni.usc.edu under ADNI's data use agreement. Cite Boccardi et al., Alzheimer's & Dementia
11 (2015) 175. STAMP and LUnet were tried on these data.

SOURCE has masks whose names end in _L and _R, anywhere below, and one scan for both:

    Labels_100_NIFTI/ADNI_002_S_0295_13722_L.nii     and _R.nii; 0 background, 1 hippocampus; Labels_35_NIFTI likewise
    100/ADNI_002_S_0295_13722_ACPC.mnc               or .nii, .nii.gz, in any folder (MINC 2 needs: pip install h5py)

A scan belongs to the masks if its name is theirs, or begins so; else if its path has the ADNI subject and image number
(002_S_0295, I13722), as ADNI's own downloads have; else the subject. Names with CSF are passed over.

Left becomes label 1, right 2; --one-class makes both 1. --crop writes a case for each hippocampus, CASE_L and CASE_R,
with 64 (--crop-size) voxels along each axis: the box is centred on the mask, and moved into the volume at its border.
With STAMP's and LUnet's plans that is their experiment. conversion.json keeps the places, so that

    python -m nnunet_sauron.dataset_conversion.harp --undo-crop PREDICTIONS -o OUT [-d ID]

puts predictions of crops back into whole volumes. A scan without masks is an error, or left out or taken as a test case
(--unlabelled). Test cases are never cropped, since nothing tells where; nnU-Net's patches go over all of the volume.

--release-split gives, instead of five folds, the release's own parts: the 100 for training, the 35 for validation.
Known from public code only, and not confirmed with the data: that left and right are swapped in the names of four cases
(they are swapped back where the positions say so); that some masks hold two values that are one apart but not 0 and 1
(the greater is taken for the hippocampus); the names of folders.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path

import nibabel
import numpy as np

from .raw_dataset.cases import Case, Dataset, Image, Mask, Problems
from .raw_dataset.command import main
from .raw_dataset.crops import around, undo_main
from .raw_dataset.nifti import read_mask
from .raw_dataset.tree import by_key, case_name, check_source, stem, walk

NUMBER = 135
SIDES = {"L": 1, "R": 2}
MASK = re.compile(r"(.+)[_-](?:(l|left)|(r|right))", re.IGNORECASE)
SUBJECT = re.compile(r"(\d{3}_S_\d{4})(?:_(\d+))?", re.IGNORECASE)
SWAPPED = {"007_S_1304", "016_S_4121", "029_S_4279", "136_S_0429"}
LAYOUT = "masks such as ADNI_002_S_0295_13722_L.nii and .._R.nii, and a scan ADNI_002_S_0295_13722_ACPC.nii.gz"


def read(source: Path, options: argparse.Namespace, problems: Problems) -> Dataset:
    """The scans and masks below a folder."""
    check_source(source, LAYOUT)
    if options.crop_size < 1:
        raise ValueError(f"--crop-size is {options.crop_size}; give a number of voxels, 1 or more.")
    volumes = [path for path in walk(source) if stem(path) and "CSF" not in stem(path).upper()]
    masks = by_key(volumes, _case_and_side, lambda key: (key[0], _subject(key[0])), problems)
    scans = [path for path in volumes if _case_and_side(path) is None]
    if not masks:
        raise FileNotFoundError(f"{source} holds no masks of HarP; expected {LAYOUT}.")
    labels = {"hippocampus": 1} if options.one_class else {"left": 1, "right": 2}
    dataset = Dataset(
        "HarP", ("T1",), {"background": 0, **labels}, number=NUMBER, licence="ADNI's data use agreement",
        reference="https://pubmed.ncbi.nlm.nih.gov/25616957",
        description="Hippocampi by the EADC-ADNI harmonised protocol",
    )  # fmt: skip
    used: set[Path] = set()
    for name in sorted({name for name, _ in masks}):
        sides, found = {side: masks.get((name, side)) for side in SIDES}, _scans_of(name, scans)
        used.update(found)
        if None in sides.values():
            there = next(filter(None, sides.values()))
            problems.add(name, f"there is {there}, but no mask of the other side", _subject(name))
        elif len(found) != 1:
            several = f"{len(found)}: {', '.join(map(str, found))}" if found else "none"
            what = f"expected one scan of the masks {sides['L']} and {sides['R']}, found {several}"
            problems.add(name, what, _subject(name))
        else:
            dataset.cases += _cases(name, found[0], sides, options, dataset.notes)
    without = [scan for scan in scans if scan not in used]
    for scan in without:
        name = case_name(stem(scan))
        if options.unlabelled is None:
            what = f"there are no masks of the scan {scan}: --unlabelled leave-out or --unlabelled test"
            problems.add(name, what, _subject(name))
        elif options.unlabelled == "test":
            dataset.cases.append(Case(name, (Image(scan),), group=_subject(name), training=False))
        else:
            problems.passes_over(name, _subject(name))
    if without and options.unlabelled:
        dataset.notes.append(f"{len(without)} scans have no masks: --unlabelled {options.unlabelled}.")
    if options.release_split:
        dataset.splits = [_release_split(dataset.training)]
    return dataset


def _case_and_side(path: Path) -> tuple[str, str] | None:
    named = MASK.fullmatch(stem(path))
    return (named[1], "L" if named[2] else "R") if named else None


def _subject(name: str) -> str:
    """ADNI's number of the subject; without one, every case is one of its own."""
    told = SUBJECT.search(name)
    return told[1].upper() if told else name


def _scans_of(name: str, scans: list[Path]) -> list[Path]:
    """The scans that may belong to a pair of masks: those of the first rule that finds any."""
    rules = [lambda scan: stem(scan) == name, lambda scan: stem(scan).startswith((f"{name}_", f"{name}-"))]
    if told := SUBJECT.search(name):
        subject, image = (re.compile(rf"(?<!\d)I?{number}(?!\d)", re.IGNORECASE) for number in told.groups())
        if told[2]:
            rules.append(lambda scan: subject.search(str(scan)) and image.search(scan.name))
        rules.append(lambda scan: subject.search(str(scan)))
    return next(filter(None, ([scan for scan in scans if rule(scan)] for rule in rules)), [])


def _cases(name: str, scan: Path, sides: dict[str, Path], options: argparse.Namespace, notes: list[str]) -> list[Case]:
    """The case of a pair of masks, or the two around each."""
    if _subject(name) in SWAPPED and _x_of(sides["L"]) > _x_of(sides["R"]):
        sides = {"L": sides["R"], "R": sides["L"]}
        notes.append(f"{name}: left and right are swapped in the masks' names; they were swapped back.")
    masks = tuple(
        Mask(sides[side], {1: 1 if options.one_class else value}, shifted=True) for side, value in SIDES.items()
    )
    name = case_name(name)
    case = partial(Case, images=(Image(scan),), masks=masks, group=_subject(name))
    if not options.crop:
        return [case(name)]
    return [
        case(f"{name}_{side}", crop=partial(around, which=number, size=options.crop_size), whole=name)
        for number, side in enumerate(SIDES)
    ]


def _x_of(file: Path) -> float:
    """Where a mask lies from left to right, in mm; nan if it cannot be read, which the checks find."""
    try:
        stored, mask = read_mask(Mask(file, shifted=True))
        return float(nibabel.affines.apply_affine(stored.affine, np.argwhere(mask).mean(axis=0))[0])
    except ValueError:
        return float("nan")


def _release_split(cases: list[Case]) -> dict[str, list[str]]:
    parts = {"100": "train", "35": "val"}
    fold: dict[str, list[str]] = {"train": [], "val": []}
    for case in cases:
        told = re.fullmatch(r"Labels_(100|35)_.*", case.masks[0].file.parent.name, re.IGNORECASE)
        if told is None:
            raise ValueError(
                f"--release-split needs the release's folders Labels_100_NIFTI and Labels_35_NIFTI, but there is "
                f"{case.masks[0].file}; omit it."
            )
        fold[parts[told[1]]].append(case.name)
    if not all(fold.values()):
        raise ValueError("--release-split needs both Labels_100_NIFTI and Labels_35_NIFTI; omit it.")
    return fold


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--one-class", action="store_true", help="one label for both sides, instead of left and right")
    parser.add_argument("--crop", action="store_true", help="a case around each hippocampus, instead of the whole head")
    parser.add_argument("--crop-size", metavar="N", type=int, default=64, help="in voxels; default %(default)s")
    parser.add_argument("--unlabelled", choices=("test", "leave-out"), help="what to do with scans without masks")
    parser.add_argument("--release-split", action="store_true", help="one fold, 100 against 35, instead of five")


if __name__ == "__main__":
    if any(word.split("=")[0] == "--undo-crop" for word in sys.argv):
        sys.exit(undo_main(NUMBER))
    sys.exit(main(__doc__, read, add_options))
