"""ATLAS R2.0: chronic stroke lesions on T1-weighted MRI.

To be had, after its form, at https://fcon_1000.projects.nitrc.org/indi/retro/atlas.html (an encrypted archive, opened
with openssl); its terms of use forbid passing it on. Cite Liew et al., A large, curated, open-source stroke
neuroimaging dataset, Scientific Data 9 (2022) 320. 655 training images with masks, 300 test images without.

SOURCE is the unpacked archive, ATLAS_2, or a folder that holds it, or a part of it:

    Training/R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz
                                          sub-r001s001_ses-1_space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask.nii.gz
    Testing/R003/sub-r003s001/ses-1/anat/..._T1w.nii.gz

Folders but Training and Testing (or train and test, as the ISLES 2022 challenge's scripts arrange it) may be others:
only the files' names count. All sessions of a subject stay in one fold. Masks may be empty.

--paper-split gives, instead of five folds, the one of Sauron's public code: the first fifth of the images, by site and
subject, for validation. What could not be confirmed with the data at hand: public code and notes report masks stored as
0.9999 (site R039), which are rounded here, and one, sub-r039s002, without a value above 0.01, which is refused: leave
it out with --exclude, as public splits do (and sub-r009s003, whose lesion they call wrong).
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path

from .raw_dataset.cases import Case, Dataset, Image, Mask, Problems
from .raw_dataset.command import main
from .raw_dataset.tree import by_key, check_source, stem, walk

IMAGE = re.compile(r"(sub-[^_]+)_(ses-[^_]+)(?:_[^_]+-[^_]+)*_T1w", re.IGNORECASE)
MASK = re.compile(r"(sub-[^_]+)_(ses-[^_]+)(?:_[^_]+-[^_]+)*_label-(?:L|lesion)_desc-T1lesion_mask", re.IGNORECASE)
PARTS = {"training": True, "train": True, "testing": False, "test": False}
LAYOUT = "ATLAS_2, with Training/R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_..._T1w.nii.gz"


def read(source: Path, options: argparse.Namespace, problems: Problems) -> Dataset:
    """The images and masks below a folder."""
    check_source(source, LAYOUT)
    files = [*walk(source)]
    images, masks = (
        by_key(files, partial(_subject_and_session, pattern), lambda key: ("_".join(key), key[0]), problems)
        for pattern in (IMAGE, MASK)
    )
    if not images:
        raise FileNotFoundError(f"{source} holds no T1-weighted image of ATLAS R2.0; expected {LAYOUT}.")
    for key in sorted({*masks} - {*images}):
        problems.add("_".join(key), f"there is no T1-weighted image of the mask {masks[key]}", key[0])
    dataset = Dataset(
        "ATLAS2", ("T1",), {"background": 0, "lesion": 1}, number=202, empty_masks=True,
        licence="ATLAS's terms of use: not to be passed on", reference="https://doi.org/10.1038/s41597-022-01401-7",
        description="Chronic stroke lesions on T1-weighted MRI, ATLAS R2.0",
    )  # fmt: skip
    for key, file in sorted(images.items()):
        mask = (Mask(masks[key]),) if key in masks else ()
        dataset.cases.append(Case("_".join(key), (Image(file),), mask, key[0], training=_is_training(file, source)))
    if options.paper_split:
        dataset.splits = [_paper_split(dataset.training)]
    return dataset


def _subject_and_session(pattern: re.Pattern, path: Path) -> tuple[str, str] | None:
    named = pattern.fullmatch(stem(path) or "")
    return (named[1].lower(), named[2].lower()) if named else None


def _is_training(file: Path, source: Path) -> bool:
    """What the innermost folder with such a name says; without one it is for training."""
    folders = (source.name, *file.relative_to(source).parts[:-1])
    return next((PARTS[name.lower()] for name in reversed(folders) if name.lower() in PARTS), True)


def _paper_split(cases: list[Case]) -> dict[str, list[str]]:
    subjects = sorted({case.group for case in cases})
    held_out = {*subjects[: len(subjects) // 5]}
    if not held_out:
        raise ValueError(f"--paper-split needs 5 subjects or more, there are {len(subjects)}; omit it.")
    return {
        "train": [case.name for case in cases if case.group not in held_out],
        "val": [case.name for case in cases if case.group in held_out],
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paper-split", action="store_true", help="one fold, as in Sauron's code, instead of five")


if __name__ == "__main__":
    sys.exit(main(__doc__, read, add_options))
