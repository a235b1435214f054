"""ACDC 2017: cardiac cine MR at end-diastole (ED) and end-systole (ES), right ventricle, myocardium, left ventricle.

To be had at https://www.creatis.insa-lyon.fr/Challenge/acdc (https://humanheart-project.creatis.insa-lyon.fr); licence
CC BY-NC-SA 4.0. Cite Bernard et al., IEEE Transactions on Medical Imaging 37 (2018) 2514.

SOURCE holds training/ (patient001 to patient100) and testing/ (patient101 to patient150), or the patients of training
alone. A patient's folder has Info.cfg with the numbers of its frames (lines "ED: 1" and "ES: 12"), patient001_frame01
and patient001_frame12, both with an image and with a segmentation (.._gt), as .nii.gz or .nii; the film,
patient001_4d.nii.gz, is not read. Labels in the files: 1 right ventricle, 2 myocardium, 3 left ventricle. Downloads of
the time of the challenge have no segmentations in testing/; where there are, they go to labelsTs.

Both frames of a patient are in the same fold. The papers' own folds are not known: Sauron's code draws 20 of the 100
patients for testing with a seed that it does not fix. The layout was checked against the challenge's page, nnU-Net's
converter Dataset027_ACDC, and Sauron's code; nobody of this project had the data at hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from .raw_dataset.cases import Case, Dataset, Image, Mask, Problems
from .raw_dataset.command import main
from .raw_dataset.tree import images, locate, visible

LAYOUT = "training/ and testing/ with folders patient001, patient002, ..., or such folders themselves"
PATIENTS = {"training": 100, "testing": 50}


def read(source: Path, options: argparse.Namespace, problems: Problems) -> Dataset:
    """The patients in a folder."""
    root = locate(source, _is_root, LAYOUT)
    dataset = Dataset(
        "ACDC",
        ("cineMRI",),
        {"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3},
        number=27,
        licence="CC BY-NC-SA 4.0",
        reference="https://www.creatis.insa-lyon.fr/Challenge/acdc",
        description="ACDC 2017, end-diastolic and end-systolic frames",
    )
    parts = {"training": root / "training", "testing": root / "testing"}
    if not _patients(root / "training"):
        parts = {"training": root}
    for part, folder in parts.items():
        patients = _patients(folder)
        for patient in patients:
            dataset.cases += _frames(patient, part == "training", problems)
        if len(patients) != PATIENTS[part]:
            dataset.notes.append(f"{folder} has {len(patients)} of {PATIENTS[part]} patients.")
    return dataset


def _is_root(folder: Path) -> bool:
    return bool(_patients(folder / "training") or (folder.name != "testing" and _patients(folder)))


def _patients(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if re.fullmatch(r"patient\d+", path.name) and path.is_dir()]


def _frames(patient: Path, training: bool, problems: Problems) -> list[Case]:
    """The two cases of a patient."""
    found, cases = images(patient, problems), []
    for phase, number in _numbers(patient / "Info.cfg", problems).items():
        name = f"{patient.name}_frame{number:02d}"
        if name not in found:
            problems.add(patient, f"there is no {name}.nii.gz, the {phase} frame of Info.cfg")
            continue
        mask = found.get(f"{name}_gt")
        if mask is None and training:
            problems.add(patient, f"there is no {name}_gt.nii.gz, the segmentation of the {phase} frame")
            continue
        cases.append(Case(name, (Image(found[name]),), (Mask(mask),) if mask else (), patient.name, training))
    return cases


def _numbers(file: Path, problems: Problems) -> dict[str, int]:
    """The numbers of the ED and ES frames."""
    try:
        text = file.read_text("utf-8", "replace")
    except OSError as error:
        problems.add(file, f"it cannot be read ({error.strerror}); it tells the ED and ES frames")
        return {}
    numbers = {phase: int(number) for phase, number in re.findall(r"^\s*(ED|ES)\s*:\s*(\d+)\s*$", text, re.MULTILINE)}
    if {*numbers} != {"ED", "ES"} or numbers["ED"] == numbers["ES"]:
        problems.add(file, f"expected were lines such as 'ED: 1' and 'ES: 12', found was {numbers or 'none'}")
        return {}
    return numbers


if __name__ == "__main__":
    sys.exit(main(__doc__, read))
