"""Small trees with the layouts of ATLAS R2.0, the rats of Sauron, and HarP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import netcdf_file

from .trees import pair, write

MNI = np.array([[-1.0, 0, 0, 98], [0, 1, 0, -134], [0, 0, 1, -72], [0, 0, 0, 1]])
ACPC = np.array([[1.0, 0, 0, -15], [0, 1, 0, -20], [0, 0, 1, -9], [0, 0, 0, 1]])
SUBJECTS = ("002_S_0295_13722", "002_S_0413_13893", "005_S_0221_12034", "006_S_0498_19007", "007_S_0041_12740")
HEAD = (34, 30, 20)
LEFT, RIGHT = np.s_[4:9, 8:16, 5:9], np.s_[25:29, 9:18, 6:9]


def atlas2_file(subject: str, session: str, what: str, part: str = "Training") -> str:
    """The path of a T1w or a mask below ATLAS_2."""
    name = f"{subject}_{session}_space-MNI152NLin2009aSym"
    ending = "T1w" if what == "T1w" else "label-L_desc-T1lesion_mask"
    return f"{part}/{subject[4:8].upper()}/{subject}/{session}/anat/{name}_{ending}.nii.gz"


def write_atlas2(root: Path, training: int = 6, testing: int = 1) -> Path:
    """Subjects as of the archive, the first with two sessions, and what lies beside them; ATLAS_2."""
    root = root / "ATLAS_2"
    for number in range(1, training + 1):
        for session in ("ses-1", "ses-2")[: 2 if number == 1 else 1]:
            image, labels = pair(number, 1)
            subject = f"sub-r001s{number:03d}"
            write(root / atlas2_file(subject, session, "T1w"), image.astype(np.float32), MNI)
            mask = write(root / atlas2_file(subject, session, "mask"), labels.astype(np.float64), MNI)
            (mask.parent / f"._{mask.name}").write_bytes(b"\0")
    for number in range(1, testing + 1):
        image = pair(100 + number, 1)[0].astype(np.float32)
        write(root / atlas2_file(f"sub-r003s{number:03d}", "ses-1", "T1w", "Testing"), image, MNI)
    write(root / "MNI152NLin2009aSym.nii.gz", pair(0, 1)[0], MNI)
    (root / "20220425_ATLAS_2.0_MetaData.xlsx").write_bytes(b"PK")
    (root / "Training/R001/dataset_description.json").write_text("{}")
    return root


def write_rats(root: Path, animals: tuple[int, ...] = (5, 32, 33), swap: bool = False) -> Path:
    """Two studies with two time points; scans have a fourth axis of length 1, as RatLesNetv2's."""
    for study in ("21JUL2015", "Study 1"):
        for point in ("2h", "24h"):
            for animal in animals:
                image, labels = pair(animal, 1)
                folder = root / study / (f"{animal}/{point}" if swap else f"{point}/{animal}")
                write(folder / "scan.nii.gz", image.astype(np.float32)[..., None])
                write(folder / "scan_lesion.nii.gz", labels)
                write(folder / "scan_brainmask.nii.gz", np.ones_like(labels))
    return root


def harp_voxels(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scan, and the masks of the left and of the right hippocampus; no two subjects' are at the same place."""
    left, right = np.zeros((2, *HEAD), np.uint8)
    left[LEFT], right[RIGHT] = 1, 1
    left, right = np.roll(left, number, axis=1), np.roll(right, number, axis=2)
    scan = 100 + 300.0 * (left + right) + np.random.default_rng(number).normal(0, 20, HEAD)
    return scan.astype(np.float32), left, right


def write_harp(root: Path, subjects: tuple[str, ...] = SUBJECTS) -> Path:
    """Masks in two parts and the scans in another folder, as of the release, the scans in NIfTI."""
    for number, subject in enumerate(subjects):
        scan, left, right = harp_voxels(number)
        part = "100" if number < len(subjects) - 1 else "35"
        for side, mask in (("L", left), ("R", right)):
            write(root / f"Labels_{part}_NIFTI" / f"ADNI_{subject}_{side}.nii", mask, ACPC)
            write(root / f"Labels_{part}_NIFTI" / f"ADNI_{subject}_CSF_{side}.nii", 1 - mask, ACPC)
        write(root / part / f"ADNI_{subject}_ACPC.nii.gz", scan, ACPC)
    return root


def write_minc(file: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """A file of MINC 1, by its specification: axes z, y, x; steps and starts in mm, from left to right."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with netcdf_file(file, "w") as minc:
        for axis, name in enumerate(("xspace", "yspace", "zspace")):
            minc.createDimension(name, voxels.shape[axis])
            variable = minc.createVariable(name, "i4", ())
            variable.step, variable.start = float(affine[axis, axis]), float(affine[axis, 3])
            variable.direction_cosines, variable.spacing = np.eye(3)[axis], b"regular__"
        image = minc.createVariable("image", "f4", ("zspace", "yspace", "xspace"))
        image.signtype, image.valid_range = b"signed__", np.array([0.0, float(voxels.max())])
        image[:] = voxels.T
        for name, value in (("image-max", voxels.max()), ("image-min", 0)):
            minc.createVariable(name, "f8", ()).data[...] = float(value)
    return file
