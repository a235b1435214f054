from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

from nnunet_sauron.datasets import phantom
from nnunet_sauron.datasets.phantom import LABELS, phantom_case, write_phantom


@pytest.fixture(scope="module")
def cases() -> list[tuple[np.ndarray, np.ndarray, tuple[float, float, float]]]:
    return [phantom_case(np.random.default_rng([0, 0, index])) for index in range(6)]


def voxels(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.rglob("*.nii.gz"))
    return {
        str(path.relative_to(folder)): SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).tobytes()
        for path in files
    }


def test_same_seed_gives_the_same_voxels_and_another_seed_others(tmp_path):
    first, again, other = (
        voxels(write_phantom(tmp_path / name, training_cases=5, test_cases=1, seed=seed))
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert len(first) == 12
    assert first == again
    assert first.keys() == other.keys()
    assert not any(first[name] == other[name] for name in first)


def test_a_case_does_not_depend_on_how_many_there_are(tmp_path):
    few = voxels(write_phantom(tmp_path / "few", training_cases=5, test_cases=1))
    more = voxels(write_phantom(tmp_path / "more", training_cases=6, test_cases=2))
    assert few.items() <= more.items()


def test_nnunet_finds_nothing_wrong_with_the_dataset(tmp_path):
    verify_dataset_integrity(str(write_phantom(tmp_path, training_cases=5, test_cases=1)), num_processes=1)


def test_every_case_has_every_class_in_a_small_image(cases):
    for image, labels, _ in cases:
        assert image.shape == labels.shape
        assert all(40 <= side <= 56 for side in image.shape)
        counts = np.bincount(labels.ravel(), minlength=4)
        assert all(counts[value] > 200 for name, value in LABELS.items() if name != "background")


def test_spacings_differ_within_and_between_cases(cases):
    spacings = {spacing for _, _, spacing in cases}
    for axis in range(3):
        assert len({spacing[axis] for spacing in spacings}) == len(cases)
    assert any(spacing[0] / spacing[1] > 1.1 for spacing in spacings)


@pytest.mark.parametrize("organ", [name for name in LABELS if name != "background"])
def test_intensity_alone_does_not_tell_an_organ(cases, organ):
    dice = []
    for image, labels, _ in cases:
        mask = labels == LABELS[organ]
        low, high = np.percentile(image[mask], (10, 90))
        found = (image >= low) & (image <= high)
        dice.append(2 * (found & mask).sum() / (found.sum() + mask.sum()))
    assert np.mean(dice) < 0.83  # though the thresholds are each case's own


def test_an_interrupted_generation_leaves_no_dataset_and_the_next_one_is_whole(tmp_path, monkeypatch):
    written = []

    def interrupt_at_third(array, spacing, path):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        path.touch()

    with monkeypatch.context() as patch:
        patch.setattr(phantom, "_write_nifti", interrupt_at_third)
        with pytest.raises(KeyboardInterrupt):
            write_phantom(tmp_path, training_cases=5, test_cases=1)
    assert not list(tmp_path.glob("Dataset*"))

    folder = write_phantom(tmp_path, training_cases=5, test_cases=1)
    assert len(voxels(folder)) == 12
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_whose_name_is_no_text_is_refused_before_simpleitk_ends_the_process(tmp_path):
    with pytest.raises(ValueError, match="has a name that is no UTF-8; rename it, or its folder"):
        write_phantom(tmp_path / os.fsdecode(b"caf\xe9"))
    assert list(tmp_path.iterdir()) == []


def test_a_new_phantom_replaces_an_old_one(tmp_path):
    write_phantom(tmp_path, training_cases=6, test_cases=2)
    assert len(voxels(write_phantom(tmp_path, training_cases=5, test_cases=1))) == 12


@pytest.mark.parametrize("counts", [{"training_cases": 4}, {"test_cases": -1}])
def test_too_few_cases_are_refused_by_number(tmp_path, counts):
    ((name, value),) = counts.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        write_phantom(tmp_path, **counts)
