"""KiTS19: contrast-enhanced CT of kidneys with tumours; 210 labelled cases, 90 without labels.

To be had by https://github.com/neheller/kits19 (clone it, then `python -m starter_code.get_imaging`); licence
CC BY-NC-SA 4.0 (data/LICENSE there). Cite Heller et al., Medical Image Analysis 67 (2021) 101821.

SOURCE holds case_00000 to case_00299, each with imaging.nii.gz and, up to case_00209, segmentation.nii.gz (also .nii):
the folder data/ of that repository. Cases from 210 on go to imagesTs. Labels in the files: 1 kidney, 2 tumour.

Left out by default are cases 15, 23, 37, 68, 125 and 133, as in the Sauron paper's code and in nnU-Net's winning
submission. The challenge names four of them as faulty (changelog.md of the repository): fluid in the spleen taken for
kidney (15), a tumour labelled as cyst (37), tumours in the wrong place (23, 125), all corrected in downloads since
2019-12-20. For 68 and 133 it names no fault. --keep-faulty converts all 210.

Layout and geometry were checked against that repository, with the headers of all 210 segmentations; axes are z, y, x.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from .raw_dataset.cases import Case, Dataset, Image, Mask, Problems
from .raw_dataset.command import main
from .raw_dataset.tree import images, locate, visible

LABELLED, ALL = 210, 300
FAULTY = {15, 23, 37, 68, 125, 133}
REGIONS = {"background": 0, "kidney and tumour": (1, 2), "tumour": (2,)}


def read(source: Path, options: argparse.Namespace, problems: Problems) -> Dataset:
    """The cases in a folder."""
    root = locate(
        source, lambda folder: bool(_cases(folder)), "folders case_00000, case_00001, ... (data/ of the clone)"
    )
    dataset = Dataset(
        "KiTS19",
        ("CT",),
        dict(REGIONS) if options.regions else {"background": 0, "kidney": 1, "tumour": 2},
        number=40,
        regions_class_order=(1, 2) if options.regions else None,
        licence="CC BY-NC-SA 4.0",
        reference="https://github.com/neheller/kits19",
        description="Kidney and kidney tumour segmentation, 2019",
    )
    found = _cases(root)
    left_out = FAULTY & {*found} if not options.keep_faulty else set()
    for number, folder in found.items():
        if number in left_out:
            problems.passes_over(folder.name)
        elif number >= ALL:
            what = f"KiTS19 ends at case_{ALL - 1:05d}; this seems to be a later challenge's download"
            problems.add(folder, what, folder.name)
        else:
            _add_case(dataset, folder, number < LABELLED, problems)
    if left_out:
        named = ", ".join(found[number].name for number in sorted(left_out))
        dataset.notes.append(f"Left out as faulty: {named} (--help says why; --keep-faulty converts them).")
    labelled = sum(number < LABELLED for number in found)
    if labelled != LABELLED:
        dataset.notes.append(f"{root} has {labelled} of {LABELLED} labelled cases.")
    return dataset


def _cases(folder: Path) -> dict[int, Path]:
    named = [(re.fullmatch(r"case_(\d{5})", path.name), path) for path in visible(folder)]
    return {int(match[1]): path for match, path in named if match and path.is_dir()}


def _add_case(dataset: Dataset, folder: Path, training: bool, problems: Problems) -> None:
    files = images(folder, problems)
    if "imaging" not in files:
        problems.add(
            folder, "there is no imaging.nii.gz; the clone has none until get_imaging has fetched it", folder.name
        )
    elif training and "segmentation" not in files:
        what = f"there is no segmentation.nii.gz; all cases below {LABELLED} have one"
        problems.add(folder, what, folder.name)
    else:
        masks = (Mask(files["segmentation"]),) if "segmentation" in files else ()
        dataset.cases.append(Case(folder.name, (Image(files["imaging"]),), masks, training=training))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--regions", action="store_true", help="learn the regions 'kidney and tumour' and 'tumour'")
    parser.add_argument("--keep-faulty", action="store_true", help="convert the six cases, too, that are left out")


if __name__ == "__main__":
    sys.exit(main(__doc__, read, add_options))
