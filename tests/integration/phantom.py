"""A dataset of 16 x 32 x 32 voxels a case in nnU-Net's raw format: what tests of commands need, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK

PLAIN = {"background": 0, "ball": 1, "box": 2}
IGNORE = {"background": 0, "ball": 1, "box": 2, "ignore": 3}
REGIONS = {"background": 0, "organ": [1, 2], "box": [2]}
REGIONS_AND_IGNORE = {"background": 0, "organ": [1, 2], "box": [2], "ignore": 3}

SHAPE = (16, 32, 32)


def write_dataset(raw: Path, name: str, labels: dict, *, training_cases: int = 8, test_cases: int = 2) -> Path:
    """Write a dataset into a folder that serves as `nnUNet_raw`.

    Args:
        raw: The `nnUNet_raw` folder.
        name: The dataset's folder, such as `Dataset701_Tiny`.
        labels: As in dataset.json. With an `ignore` label only every other slice of the training cases is annotated.
        training_cases: Cases in imagesTr.
        test_cases: Cases in imagesTs; their labels, in labelsTs, are whole.
    """
    folder = raw / name
    for suffix, count, stream in (("Tr", training_cases, 0), ("Ts", test_cases, 1)):
        (folder / f"images{suffix}").mkdir(parents=True)
        (folder / f"labels{suffix}").mkdir()
        for index in range(count):
            image, segmentation = _case(np.random.default_rng([stream, index]))
            if "ignore" in labels and suffix == "Tr":
                segmentation[::2] = labels["ignore"]
            case = f"tiny{suffix}_{index:03d}"
            SimpleITK.WriteImage(
                SimpleITK.GetImageFromArray(image), str(folder / f"images{suffix}" / f"{case}_0000.nii.gz")
            )
            SimpleITK.WriteImage(
                SimpleITK.GetImageFromArray(segmentation), str(folder / f"labels{suffix}" / f"{case}.nii.gz")
            )
    description = {
        "channel_names": {"0": "MRI"},
        "labels": labels,
        "numTraining": training_cases,
        "file_ending": ".nii.gz",
    }
    if any(isinstance(value, list) for value in labels.values()):
        description["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))
    return folder


def _case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    points = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")).astype(float)
    segmentation = np.zeros(SHAPE, dtype=np.uint8)
    ball = rng.uniform((6, 8, 7), (10, 23, 10))
    segmentation[np.linalg.norm(points - ball[:, None, None, None], axis=0) < rng.uniform(4, 6)] = 1
    box = rng.uniform((6, 8, 21), (10, 23, 24))
    segmentation[np.abs(points - box[:, None, None, None]).max(axis=0) < rng.uniform(3, 5)] = 2
    image = np.choose(segmentation, (100.0, 220.0, 320.0)) + rng.normal(0, 30, SHAPE)
    return image.astype(np.int16), segmentation
