"""ACDC 2017: cardiac cine MR at end-diastole (ED) and end-systole (ES), right ventricle, myocardium, left ventricle.

To be had at https://www.creatis.insa-lyon.fr/Challenge/acdc (https://humanheart-project.creatis.insa-lyon.fr); licence
CC BY-NC-SA 4.0. Cite Bernard et al., IEEE Transactions on Medical Imaging 37 (2018) 2514.

SOURCE holds training/ (patient001 to patient100) and testing/ (patient101 to patient150), or the patients of training
alone. A patient's folder has Info.cfg with the numbers of its frames (lines "ED: 1" and "ES: 12"), patient001_frame01
and patient001_frame12, both with an image and with a segmentation (.._gt), as .nii.gz or .nii; the film,
patient001_4d.nii.gz, is not read. Labels in the files: 1 right ventricle, 2 myocardium, 3 left ventricle. Downloads of
the time of the challenge have no segmentations in testing/; where there are, they go to labelsTs.

Most files tell two spacings. nnU-Net takes that of the qform, and so do the checks here; the sform's, 1 mm, is wrong.
SimpleITK's warning of "unexpected scales in sform" may be ignored.

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
    found = {part: _patients(_below(root, part)) for part in PATIENTS}
    if not found["training"]:  # all are in one folder
        found = {part: [path for path in _patients(root) if _part(path) == part] for part in PATIENTS}
    for part, patients in found.items():
        for patient in patients:
            dataset.cases += _frames(patient, part == "training", problems)
        if len(patients) != PATIENTS[part]:
            dataset.notes.append(f"{root} has {len(patients)} of {PATIENTS[part]} patients for {part}.")
    return dataset


def _is_root(folder: Path) -> bool:
    return bool(_patients(_below(folder, "training")) or (folder.name.lower() != "testing" and _patients(folder)))


def _below(folder: Path, name: str) -> Path:
    """What a folder holds of this name, in small letters or capital ones."""
    return next((path for path in visible(folder) if path.name.lower() == name.lower()), folder / name)


def _patients(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if re.fullmatch(r"patient\d+", path.name, re.IGNORECASE) and path.is_dir()]


def _part(patient: Path) -> str:
    return "training" if int(patient.name[len("patient") :]) <= PATIENTS["training"] else "testing"


def _frames(patient: Path, training: bool, problems: Problems) -> list[Case]:
    """The two cases of a patient."""
    found, cases = images(patient, problems), []
    for phase, number in _numbers(_below(patient, "Info.cfg"), problems).items():
        name = f"{patient.name}_frame{number:02d}"
        if name not in found:
            problems.add(patient, f"there is no {name}.nii.gz, the {phase} frame of Info.cfg", patient.name, name)
            continue
        mask = found.get(f"{name}_gt")
        if mask is None and training:
            what = f"there is no {name}_gt.nii.gz, the segmentation of the {phase} frame"
            problems.add(patient, what, patient.name, name)
            continue
        cases.append(Case(name, (Image(found[name]),), (Mask(mask),) if mask else (), patient.name, training))
    return cases


def _numbers(file: Path, problems: Problems) -> dict[str, int]:
    """The numbers of the ED and ES frames."""
    try:
        text = file.read_text("utf-8-sig", "replace")
    except OSError as error:
        what = f"it cannot be read ({error.strerror}); it tells the ED and ES frames. Copy it anew"
        problems.add(file, what, file.parent.name)
        return {}
    lines = re.findall(r"^\s*((ED|ES)\s*:\s*(\d+))\s*$", text, re.MULTILINE | re.IGNORECASE)
    numbers = {phase.upper(): int(number) for _, phase, number in lines}
    if len(lines) != 2 or {*numbers} != {"ED", "ES"} or numbers["ED"] == numbers["ES"]:
        told = ", ".join(line for line, *_ in lines) or "none"
        what = f"expected one line such as 'ED: 1' and one such as 'ES: 12', of two frames; found {told}"
        problems.add(file, what, file.parent.name)
        return {}
    return numbers


if __name__ == "__main__":
    sys.exit(main(__doc__, read))
