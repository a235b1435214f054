"""Rat lesions: study, time point and animal from the folders; animals together."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_sauron.dataset_conversion import rats

from .brain_trees import write_rats
from .trees import convert, write


@pytest.fixture
def tree(tmp_path: Path, raw: Path) -> Path:
    return write_rats(tmp_path / "MRI dätä")


@pytest.fixture
def target(raw: Path) -> Path:
    return raw / "Dataset203_Rats"


@pytest.mark.parametrize("swap", [False, True])
def test_names_tell_study_time_point_and_animal_and_animals_stay_together(
    tmp_path: Path, raw: Path, target: Path, swap: bool
) -> None:
    assert convert(rats, write_rats(tmp_path / "tree", swap=swap)) == 0
    names = sorted(path.name for path in (target / "labelsTr").iterdir())
    assert len(names) == 12
    assert names[:2] == ["21JUL2015_24h_32.nii.gz", "21JUL2015_24h_33.nii.gz"]
    assert names[-1] == "Study-1_2h_5.nii.gz"
    for fold in json.loads((target / "splits_final.json").read_text()):
        animals = [{(name.split("_")[0], name.split("_")[2]) for name in fold[part]} for part in ("train", "val")]
        assert not animals[0] & animals[1]


@pytest.mark.parametrize("swap", [False, True])
def test_time_points_of_other_names_must_be_told(tmp_path: Path, raw: Path, target: Path, capsys, swap: bool) -> None:
    tree = write_rats(tmp_path / "tree", swap=swap)
    for folder in [path for path in tree.rglob("*h") if path.is_dir()]:
        folder.rename(folder.with_name({"2h": "TP1", "24h": "TP2"}[folder.name]))
    assert convert(rats, tree) == 2
    assert "it is not known which folders are animals" in capsys.readouterr().err
    assert convert(rats, tree, "--time-points", "tp1", "TP2") == 0
    cases = json.loads((target / "conversion.json").read_text())["cases"]
    assert {case["group"] for case in cases} == {
        f"{study}/{animal}" for study in ("21JUL2015", "Study 1") for animal in (5, 32, 33)
    }


def test_an_animal_with_two_spellings_of_its_number_is_named(tree: Path, capsys) -> None:
    (tree / "21JUL2015" / "2h" / "5").rename(tree / "21JUL2015" / "2h" / "05")
    assert convert(rats, tree) == 2
    assert "are one number, and animals of 21JUL2015 are known by it" in capsys.readouterr().err


def test_a_fourth_axis_of_length_one_is_dropped(tree: Path, target: Path) -> None:
    assert convert(rats, tree) == 0
    image = nibabel.load(target / "imagesTr" / "21JUL2015_24h_5_0000.nii.gz")
    labels = nibabel.load(target / "labelsTr" / "21JUL2015_24h_5.nii.gz")
    source = nibabel.load(tree / "21JUL2015" / "24h" / "5" / "scan.nii.gz")
    assert image.shape == labels.shape == source.shape[:3]
    assert np.array_equal(image.get_fdata(), source.get_fdata()[..., 0])
    assert np.array_equal(image.affine, labels.affine)


def test_a_mask_loses_that_axis_as_its_scan_does(tree: Path, target: Path) -> None:
    for mask in tree.rglob("scan_lesion.nii.gz"):
        write(mask, np.asarray(nibabel.load(mask).dataobj)[..., None])
    assert convert(rats, tree) == 0
    for labels in (target / "labelsTr").iterdir():
        image = nibabel.load(target / "imagesTr" / labels.name.replace(".nii.gz", "_0000.nii.gz"))
        assert nibabel.load(labels).shape == image.shape and len(image.shape) == 3


def test_a_study_alone_is_named_by_its_folder(tree: Path, target: Path) -> None:
    assert convert(rats, tree / "21JUL2015") == 0
    assert (target / "labelsTr" / "21JUL2015_24h_5.nii.gz").is_file()
    assert len([*(target / "labelsTr").iterdir()]) == 6


def test_time_points_can_be_left_out(tree: Path, target: Path, capsys) -> None:
    assert convert(rats, tree, "--exclude-time-points", "2H", "48h") == 2
    assert "--exclude-time-points 48h: there are the time points 24h, 2h" in capsys.readouterr().err
    assert convert(rats, tree, "--exclude-time-points", "2H") == 0
    assert {path.name.split("_")[1] for path in (target / "labelsTr").iterdir()} == {"24h"}


def test_a_missing_mask_is_an_error_until_the_user_says_what_it_means(tree: Path, target: Path, capsys) -> None:
    (tree / "Study 1" / "24h" / "5" / "scan_lesion.nii.gz").unlink()
    assert convert(rats, tree) == 2
    assert "Study-1_24h_5: there is no scan_lesion.nii.gz" in capsys.readouterr().err
    assert convert(rats, tree, "--unlabelled", "leave-out") == 0
    assert len([*(target / "labelsTr").iterdir()]) == 11
    assert "1 scans without a mask were left out" in capsys.readouterr().err
    assert convert(rats, tree, "--unlabelled", "empty", "--overwrite") == 0
    labels = nibabel.load(target / "labelsTr" / "Study-1_24h_5.nii.gz")
    image = nibabel.load(target / "imagesTr" / "Study-1_24h_5_0000.nii.gz")
    assert labels.shape == image.shape
    assert not np.asarray(labels.dataobj).any()
    assert "1 of 12 cases have an empty segmentation" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["21JUL2015_24h_32", "21JUL2015/32"])
@pytest.mark.parametrize("missing", ["scan", "scan_lesion"])
def test_a_scan_or_an_animal_can_be_left_out(tree: Path, target: Path, name: str, missing: str) -> None:
    (tree / "21JUL2015" / "24h" / "32" / f"{missing}.nii.gz").unlink()
    assert convert(rats, tree, "--exclude", name) == 0
    written = {path.name for path in (target / "labelsTr").iterdir()}
    assert "21JUL2015_24h_32.nii.gz" not in written
    assert ("21JUL2015_2h_32.nii.gz" in written) is (name == "21JUL2015_24h_32")


def test_an_excluded_scan_may_be_of_an_excluded_time_point(tree: Path, target: Path) -> None:
    assert convert(rats, tree, "--exclude-time-points", "2h", "--exclude", "21JUL2015_2h_32") == 0


def test_animal_and_time_point_in_another_order_than_elsewhere(tree: Path, raw: Path, capsys) -> None:
    (tree / "21JUL2015" / "32").mkdir()
    (tree / "21JUL2015" / "24h" / "32").rename(tree / "21JUL2015" / "32" / "24h")
    assert convert(rats, tree) == 2
    assert "its time point, 24h, is not where other scans have theirs (32)" in capsys.readouterr().err


def test_all_problems_at_once(tree: Path, raw: Path, capsys) -> None:
    study = tree / "21JUL2015"
    (study / "24h" / "5" / "scan.nii.gz").unlink()
    (study / "24h" / "32" / "scan_lesion.nii.gz").unlink()
    scan = study / "2h" / "5" / "scan.nii.gz"
    scan.write_bytes(scan.read_bytes()[:2000])
    write(study / "2h" / "32" / "scan.nii.gz", np.ones((20, 24, 8, 2), np.float32))
    write(tree / "scan.nii.gz", np.ones((20, 24, 8), np.float32))
    write(tree / "Study 1" / "2h" / "5" / "scan.nii", np.ones((20, 24, 8), np.float32))
    write(tree / "Study-1" / "2h" / "32" / "scan.nii.gz", np.ones((20, 24, 8), np.float32))
    write(tree / "Study-1" / "2h" / "32" / "scan_lesion.nii.gz", np.ones((20, 24, 8), np.uint8))
    assert convert(rats, tree) == 2
    told = capsys.readouterr().err
    for words in (
        "no scan.nii.gz beside this mask", "no scan_lesion.nii.gz beside", "damaged or was cut short", "(20, 24, 8, 2)",
        "does not lie in the expected folders", "are the same case", "there are 2 cases of this name",
    ):  # fmt: skip
        assert words in told, words
    assert not [*raw.iterdir()]


def test_a_time_point_two_folders_too_high_is_refused(tmp_path: Path, raw: Path, capsys) -> None:
    for path in [*write_rats(tmp_path / "tree").rglob("scan*.nii.gz")]:
        deeper = path.parent / "anat" / path.name
        deeper.parent.mkdir(exist_ok=True)
        path.rename(deeper)
    assert convert(rats, tmp_path / "tree") == 2
    assert "two folders too high" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["2h", "24 h", "D3", "day_7", "3weeks", "baseline", "35d"])
def test_time_points(name: str) -> None:
    assert rats.TIME_POINT.fullmatch(name) is not None


@pytest.mark.parametrize("name", ["32", "M1", "21JUL2015", "rat5", "Study 1", "R12", "animal24h"])
def test_no_time_points(name: str) -> None:
    assert rats.TIME_POINT.fullmatch(name) is None
