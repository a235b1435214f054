"""A seeded 3D phantom in nnU-Net's raw format: three organs and some distractors, in noise that defeats a threshold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK
from nnunet_sauron_runtime.whole_files import check_name

from ..files import new_folder

DATASET_ID = 943
DATASET_NAME = f"Dataset{DATASET_ID}_Phantom"
LABELS = {"background": 0, "ellipsoid": 1, "tube": 2, "star": 3}

FIELD_OF_VIEW = (60.0, 54.0, 54.0)  # mm, in z, y, x
REACH = 16.0  # mm, of the largest shape from its centre

# Mean and standard deviation over cases. The noise of a voxel is as large as a third of the steps between them: a
# threshold loses a part of every organ, and a network that sees the neighbours does not. A training of the demo's
# length learns that every time; organs that only their shape tells from distractors, it learned in some runs.
INTENSITIES = {"distractor": (160, 10), "body": (300, 10), "star": (450, 10), "ellipsoid": (585, 10), "tube": (720, 10)}
NOISE = 50

# A shape is a function of a point's coordinates (3, z, y, x) in mm relative to its centre: below 1 is inside.
Shape = Callable[[np.ndarray], np.ndarray]


def write_phantom(raw_folder: Path, *, training_cases: int = 20, test_cases: int = 8, seed: int = 0) -> Path:
    """Write the phantom dataset into a folder that serves as `nnUNet_raw`.

    Every case is drawn from its own random stream, so a case does not depend on how many others there are. The dataset
    is written beside its place and moved there when it is whole: an interrupted call leaves no dataset behind.

    Args:
        raw_folder: The `nnUNet_raw` folder; made if missing. A phantom dataset already there is replaced.
        training_cases: Number of cases in `imagesTr` and `labelsTr`; nnU-Net's five folds need 5.
        test_cases: Number of cases in `imagesTs` and `labelsTs`.
        seed: Seed of all cases. The same seed gives the same voxels.

    Returns:
        The dataset's folder, `raw_folder / DATASET_NAME`. Images are int16 NIfTI of 40 to 56 voxels a side with
        spacings of 1.0 to 1.45 mm, labels uint8.

    Raises:
        ValueError: If there are fewer than 5 training cases or less than 0 test cases, or the folder's name is no text.
        OSError: If the folder cannot be written.
    """
    if training_cases < 5:
        raise ValueError(f"training_cases is {training_cases}; nnU-Net splits them into 5 folds, so give 5 or more.")
    if test_cases < 0:
        raise ValueError(f"test_cases is {test_cases}; give 0 or more.")
    folder = Path(raw_folder) / DATASET_NAME
    check_name(folder.resolve())
    # nnU-Net looks for folders called Dataset*, so it never sees the one beside.
    with new_folder(folder, replace=True) as beside:
        _write_dataset(beside, training_cases, test_cases, seed)
    return folder


def _write_dataset(folder: Path, training_cases: int, test_cases: int, seed: int) -> None:
    for suffix, count, stream in (("Tr", training_cases, 0), ("Ts", test_cases, 1)):
        (folder / f"images{suffix}").mkdir(parents=True)
        (folder / f"labels{suffix}").mkdir()
        for index in range(count):
            image, labels, spacing = phantom_case(np.random.default_rng([seed, stream, index]))
            name = f"phantom_{suffix.lower()}_{index:03d}"
            _write_nifti(image, spacing, folder / f"images{suffix}" / f"{name}_0000.nii.gz")
            _write_nifti(labels, spacing, folder / f"labels{suffix}" / f"{name}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": training_cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))


def phantom_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Draw one case: organs and distractors in a body, then blurred noise, white noise and a bias field.

    Args:
        rng: The case's random stream.

    Returns:
        The image, int16 of shape (z, y, x); the labels, uint8 of the same shape, values of `LABELS`; and the spacing
        in mm, in z, y, x.
    """
    in_plane = rng.uniform(1.0, 1.25)
    spacing = (float(rng.uniform(1.1, 1.45)), float(in_plane), float(in_plane))
    shape = [round(length / step) for length, step in zip(FIELD_OF_VIEW, spacing, strict=True)]
    axes = [(np.arange(count) - (count - 1) / 2) * step for count, step in zip(shape, spacing, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))

    intensity = {name: rng.normal(mean, deviation) for name, (mean, deviation) in INTENSITIES.items()}
    labels = np.zeros(shape, dtype=np.uint8)
    image = np.where(_barrel(29, 25)(points) < 1, intensity["body"], 60.0)
    free = _barrel(27, 23.5)(points) < 1

    # Organs first, so that a distractor gives way and never the other way round.
    for name, draw in (
        ("tube", _random_tube),
        ("star", _random_star),
        ("ellipsoid", _random_ellipsoid),
        ("distractor", _random_ellipsoid),
        ("distractor", _random_plate),
        ("distractor", _random_ball),
        ("distractor", _random_ball),
        ("distractor", _random_ball),
    ):
        label = LABELS.get(name, 0)
        inside = _place(draw, points, free, rng, required=label != 0)
        image[inside] = intensity[name] + rng.normal(0, 8)
        labels[inside] = label
        free &= ~_grown(inside)

    texture = _smooth_noise(points, rng, waves=40, shortest=6.0)
    bias = np.exp(0.03 * _smooth_noise(points, rng, waves=6, shortest=60.0))
    image = (image + 10 * texture) * bias + rng.normal(0, NOISE, size=shape)
    return np.clip(np.rint(image), -1000, 3000).astype(np.int16), labels, spacing


def _place(
    draw: Callable[[np.random.Generator], Shape],
    points: np.ndarray,
    free: np.ndarray,
    rng: np.random.Generator,
    *,
    required: bool,
) -> np.ndarray:
    """Try places until the shape lies in free space; else cut an organ to what fits, and leave a distractor out."""
    axes = points[0, :, 0, 0], points[1, 0, :, 0], points[2, 0, 0, :]
    placed, best_share = np.zeros_like(free), 0.0
    for _ in range(150):
        centre = rng.uniform(-0.4, 0.4, size=3) * FIELD_OF_VIEW
        ends = (np.searchsorted(axis, (c - REACH, c + REACH)) for axis, c in zip(axes, centre, strict=True))
        box = tuple(slice(*end) for end in ends)
        inside = draw(rng)(points[(slice(None), *box)] - centre[:, None, None, None]) < 1
        fits = inside & free[box]
        share = fits.sum() / max(inside.sum(), 1)
        if share > best_share and (required or share == 1.0):
            placed[:], best_share = False, share
            placed[box] = fits
        if share == 1.0:
            break
    return placed


def _random_ellipsoid(rng: np.random.Generator) -> Shape:
    return _ellipsoid(rng.uniform((9, 5.5, 5.5), (13, 8.5, 8.5)), angle=rng.uniform(0, np.pi))


def _random_ball(rng: np.random.Generator) -> Shape:
    return _ellipsoid(np.full(3, rng.uniform(2.8, 4.2)))


def _random_plate(rng: np.random.Generator) -> Shape:
    half, angle = rng.uniform((6, 2, 7), (10, 2.8, 9)), rng.uniform(0, np.pi)
    return lambda points: np.abs(_rotated(points, angle) / half[:, None, None, None]).max(axis=0)


def _random_star(rng: np.random.Generator) -> Shape:
    """A body of four to six lobes around z: its cross-section is a star in every slice."""
    lobes, phase = rng.integers(4, 7), rng.uniform(0, 2 * np.pi)
    radius, half_height, depth = rng.uniform(8, 10), rng.uniform(8, 12), rng.uniform(0.3, 0.4)

    def star(points: np.ndarray) -> np.ndarray:
        z, y, x = points
        contour = radius * (1 + depth * np.cos(lobes * np.arctan2(y, x) + phase))
        return np.sqrt((z / half_height) ** 4 + ((y**2 + x**2) / contour**2) ** 2)

    return star


def _random_tube(rng: np.random.Generator) -> Shape:
    """A tube along an arc of about half a circle, slightly out of the slice plane."""
    bend, radius = rng.uniform(7, 9), rng.uniform(2.8, 3.6)
    middle, half = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 0.65) * np.pi
    climb = rng.uniform(1, 3)

    def tube(points: np.ndarray) -> np.ndarray:
        z, y, x = points
        along = np.clip(np.angle(np.exp(1j * (np.arctan2(y, x) - middle))), -half, half)
        nearest_y, nearest_x = bend * np.sin(middle + along), bend * np.cos(middle + along)
        return np.sqrt((z - climb * along / half) ** 2 + (y - nearest_y) ** 2 + (x - nearest_x) ** 2) / radius

    return tube


def _barrel(half_height: float, radius: float) -> Shape:
    return lambda points: np.sqrt((points[0] / half_height) ** 6 + (points[1] ** 2 + points[2] ** 2) / radius**2)


def _ellipsoid(radii: tuple[float, float, float] | np.ndarray, angle: float = 0.0) -> Shape:
    scale = np.asarray(radii, dtype=float)[:, None, None, None]
    return lambda points: np.sqrt(((_rotated(points, angle) / scale) ** 2).sum(axis=0))


def _rotated(points: np.ndarray, angle: float) -> np.ndarray:
    z, y, x = points
    return np.stack([z, np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x])


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its six neighbours, so that two things never touch."""
    grown = mask.copy()
    for axis in range(mask.ndim):
        ahead = np.moveaxis(grown, axis, 0).copy()
        view = np.moveaxis(grown, axis, 0)
        view[1:] |= ahead[:-1]
        view[:-1] |= ahead[1:]
    return grown


def _smooth_noise(points: np.ndarray, rng: np.random.Generator, *, waves: int, shortest: float) -> np.ndarray:
    """A sum of plane waves of random direction, none shorter than `shortest` mm; about unit variance."""
    noise = np.zeros(points.shape[1:])
    for _ in range(waves):
        direction = rng.normal(size=3)
        direction *= 2 * np.pi / (np.linalg.norm(direction) * shortest * rng.uniform(1, 3))
        noise += np.cos(np.tensordot(direction, points, axes=1) + rng.uniform(0, 2 * np.pi))
    return noise * np.sqrt(2 / waves)


def _write_nifti(array: np.ndarray, spacing: tuple[float, float, float], path: Path) -> None:
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])  # SimpleITK counts axes x, y, z
    SimpleITK.WriteImage(image, str(path))
