"""Small trees with the layouts of the public downloads, and the conversions run on them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np

from nnunet_sauron.dataset_conversion.raw_dataset.command import main

SHAPE = (20, 24, 8)
AFFINE = np.array([[-1.5, 0, 0, 12], [0, -1.5, 0, -7], [0, 0, 5, 30], [0, 0, 0, 1]])


def convert(module: ModuleType, source: Path, *flags: object) -> int:
    """Run a conversion in this process; its exit code."""
    add_options = getattr(module, "add_options", lambda parser: None)
    return main(module.__doc__, module.read, add_options, [str(source), "-np", "1", *map(str, flags)])


def write(file: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """A NIfTI file, as most of the downloads have it: sform and qform."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nibabel.save(image, file)
    return file


def pair(seed: int, values: int, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """An image, int16, and its segmentation, uint8: bodies of all values, brighter than the background."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape[:3], np.uint8)
    for value in range(1, values + 1):
        labels[4 * value : 4 * value + 4, 8:16, 2 : shape[2] - 2] = value
    image = 100 + 200 * labels + rng.normal(0, 20, labels.shape)
    return image.astype(np.int16), labels


def write_acdc(root: Path, training: int = 5, testing: int = 1, ending: str = ".nii.gz") -> Path:
    """Patients as of ACDC's download, with film, citation and the hidden files of a Mac."""
    numbers = [("training", n) for n in range(1, training + 1)] + [("testing", n) for n in range(101, 101 + testing)]
    for part, number in numbers:
        patient = f"patient{number:03d}"
        folder = root / part / patient
        for frame in (1, 9):
            image, labels = pair(10 * number + frame, 3)
            write(folder / f"{patient}_frame{frame:02d}{ending}", image)
            write(folder / f"{patient}_frame{frame:02d}_gt{ending}", labels)
        write(folder / f"{patient}_4d{ending}", np.zeros((*SHAPE, 2), np.int16))
        info = "ED: 1\nES: 9\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
        (folder / "Info.cfg").write_text(info)
        (folder / "._Info.cfg").write_bytes(b"\0")
        (folder / f"._{patient}_frame01{ending}").write_bytes(b"\0")
        (folder / ".DS_Store").write_bytes(b"\0")
        (folder / "MANDATORY_CITATION.md").write_text("cite")
    return root


def write_kits19(root: Path, numbers: tuple[int, ...] = (0, 1, 2, 3, 15, 209, 210)) -> Path:
    """Cases as of the clone of KiTS19's repository, axes z, y, x."""
    affine = np.array([[0, 0, -0.8, 0], [0, -0.8, 0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1]])
    for number in numbers:
        image, labels = pair(number, 2)
        write(root / "data" / f"case_{number:05d}" / "imaging.nii.gz", image.astype(np.float64), affine)
        if number < 210:
            write(root / "data" / f"case_{number:05d}" / "segmentation.nii.gz", labels, affine)
    (root / "data" / "kits.json").write_text("[]")
    return root


def write_msd(root: Path, training: int = 6, channels: int = 1) -> Path:
    """A task as of the Decathlon's download."""
    task = root / "Task02_Heart"
    listed = []
    for number in range(training + 1):
        image, labels = pair(number, 1)
        name = f"la_{number:03d}.nii.gz"
        stacked = np.stack([image + channel for channel in range(channels)], -1) if channels > 1 else image
        write(task / ("imagesTr" if number < training else "imagesTs") / name, stacked)
        if number < training:
            write(task / "labelsTr" / name, labels)
            (task / "imagesTr" / f"._{name}").write_bytes(b"\0")
            listed.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    told = {
        "name": "LeftAtrium",
        "description": "Left atrium segmentation",
        "licence": "CC-BY-SA 4.0",
        "modality": {str(channel): f"MRI{channel}" for channel in range(channels)},
        "labels": {"0": "background", "1": "left atrium"},
        "numTraining": training,
        "numTest": 1,
        "training": listed,
        "test": [f"./imagesTs/la_{training:03d}.nii.gz"],
    }
    (task / "dataset.json").write_text(json.dumps(told))
    return task
