"""ATLAS R2.0: pairs by BIDS names, sessions of a subject together, empty masks."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_sauron.dataset_conversion import atlas2

from .brain_trees import MNI, atlas2_file, write_atlas2
from .trees import convert, write


@pytest.fixture
def atlas(tmp_path: Path, raw: Path) -> Path:
    return write_atlas2(tmp_path / "download")


@pytest.fixture
def target(raw: Path) -> Path:
    return raw / "Dataset202_ATLAS2"


def test_sessions_of_a_subject_are_in_one_fold(atlas: Path, target: Path) -> None:
    assert convert(atlas2, atlas) == 0
    names = sorted(path.name for path in (target / "labelsTr").iterdir())
    assert names[:3] == ["sub-r001s001_ses-1.nii.gz", "sub-r001s001_ses-2.nii.gz", "sub-r001s002_ses-1.nii.gz"]
    assert [path.name for path in (target / "imagesTs").iterdir()] == ["sub-r003s001_ses-1_0000.nii.gz"]
    folds = json.loads((target / "splits_final.json").read_text())
    assert len(folds) == 5
    assert sorted(name for fold in folds for name in fold["val"]) == [name[:-7] for name in names]
    for fold in folds:
        subjects = [{name.split("_")[0] for name in fold[part]} for part in ("train", "val")]
        assert not subjects[0] & subjects[1]


@pytest.mark.parametrize("place", ["", "ATLAS_2", "ATLAS_2/Training", "ATLAS_2/Testing"])
def test_any_level_of_the_download_may_be_given(atlas: Path, target: Path, place: str, capsys) -> None:
    code = convert(atlas2, atlas.parent / place)
    if place.endswith("Testing"):
        assert code == 2
        assert "no training case" in capsys.readouterr().err
    else:
        assert code == 0
        assert len([*(target / "imagesTr").iterdir()]) == 7


def test_arrangement_of_the_isles_challenge(atlas: Path, target: Path) -> None:
    for part in ("Training", "Testing"):
        new = atlas.parent / "data" / {"Training": "train", "Testing": "test"}[part] / "derivatives" / "ATLAS"
        new.parent.mkdir(parents=True)
        (atlas / part).rename(new)
    assert convert(atlas2, atlas.parent / "data") == 0
    assert len([*(target / "imagesTr").iterdir()]) == 7
    assert len([*(target / "imagesTs").iterdir()]) == 1


def test_a_folder_called_test_above_says_nothing(tmp_path: Path, raw: Path, target: Path) -> None:
    write_atlas2(tmp_path / "test" / "down")
    assert convert(atlas2, tmp_path / "test") == 0
    assert len([*(target / "imagesTr").iterdir()]) == 7


def test_empty_and_rounded_masks(atlas: Path, target: Path, capsys) -> None:
    empty, rounded = (atlas / atlas2_file(f"sub-r001s00{n}", "ses-1", "mask") for n in (2, 3))
    there = nibabel.load(rounded).get_fdata() != 0
    write(empty, np.zeros_like(there, np.uint8), MNI)
    write(rounded, (there * 0.9999).astype(np.float32), MNI)
    assert convert(atlas2, atlas) == 0
    assert "1 of 8 cases have an empty segmentation" in capsys.readouterr().err
    written = nibabel.load(target / "labelsTr" / "sub-r001s003_ses-1.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(written.dataobj), there)


def test_all_problems_at_once(atlas: Path, raw: Path, capsys) -> None:
    def path(number: int, what: str) -> Path:
        return atlas / atlas2_file(f"sub-r001s00{number}", "ses-1", what)

    path(2, "mask").unlink()
    path(3, "T1w").unlink()
    labels = nibabel.load(path(4, "mask")).get_fdata()
    write(path(4, "mask"), labels * 0.01, MNI)
    write(path(5, "mask"), labels[:-1], MNI)
    write(path(6, "mask"), labels * 3, MNI)
    image = nibabel.load(path(6, "T1w")).get_fdata()
    image[0, 0, 0] = np.nan
    write(path(6, "T1w"), image, MNI)
    again = atlas / atlas2_file("sub-r001s001", "ses-1", "T1w").replace("MNI152NLin2009aSym", "orig")
    write(again, image, MNI)
    write(atlas / atlas2_file("sub-r001s001", "ses-3", "T1w", "Testing"), labels, MNI)
    assert convert(atlas2, atlas) == 2
    told = capsys.readouterr().err
    for words in (
        "sub-r001s002_ses-1: ", "has no segmentation", "sub-r001s003_ses-1: there is no T1-weighted image",
        "no whole numbers, such as 0.01", "has the shape (19, 24, 8)", "has the values 3", "nan or infinite",
        "are the same case", "sub-r001s001: there are training and test cases of this patient",
    ):  # fmt: skip
        assert words in told, words
    assert not [*raw.iterdir()]


def test_faulty_cases_can_be_left_out(atlas: Path, target: Path, capsys) -> None:
    (atlas / atlas2_file("sub-r001s002", "ses-1", "mask")).unlink()
    (atlas / atlas2_file("sub-r001s003", "ses-1", "T1w")).unlink()
    assert convert(atlas2, atlas, "--exclude", "sub-r001s002", "sub-r001s003_ses-1", "sub-r009s001") == 2
    assert "--exclude sub-r009s001" in capsys.readouterr().err
    assert convert(atlas2, atlas, "--exclude", "sub-r001s002", "sub-r001s003_ses-1") == 0
    assert convert(atlas2, atlas, "--exclude", "sub-r001s002", "sub-r001s003", "--overwrite") == 0
    assert len([*(target / "imagesTr").iterdir()]) == 5


def test_paper_split_is_the_first_fifth_of_the_subjects(atlas: Path, target: Path) -> None:
    assert convert(atlas2, atlas, "--paper-split", "--exclude", "sub-r001s003") == 0
    (fold,) = json.loads((target / "splits_final.json").read_text())
    assert fold["val"] == ["sub-r001s001_ses-1", "sub-r001s001_ses-2"]
    assert fold["train"] == [f"sub-r001s00{number}_ses-1" for number in (2, 4, 5, 6)]
    assert json.loads((target / "conversion.json").read_text())["options"]["paper_split"] is True


def test_a_split_of_which_nothing_is_left_is_refused(atlas: Path, target: Path, capsys) -> None:
    assert convert(atlas2, atlas, "--paper-split", "--exclude", "sub-r001s001") == 2
    assert "--exclude leaves fold 0 of the split without validation cases" in capsys.readouterr().err
    assert not target.exists()


def test_another_download_is_refused(tmp_path: Path, raw: Path, capsys) -> None:
    write(tmp_path / "other" / "scan.nii.gz", np.ones((4, 4, 4)), MNI)
    assert convert(atlas2, tmp_path / "other") == 2
    assert "no T1-weighted image" in capsys.readouterr().err
    assert convert(atlas2, tmp_path / "ATLAS_2.tar.gz") == 2
    assert "unpack it first" in capsys.readouterr().err
