"""HarP: two masks to one label map; crops around each hippocampus, and back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_sauron.dataset_conversion import harp
from nnunet_sauron.dataset_conversion.raw_dataset.crops import around, undo_main

from .brain_trees import ACPC, HEAD, SUBJECTS, harp_voxels, write_harp, write_minc
from .trees import convert, write

FIRST = f"ADNI_{SUBJECTS[0]}"


@pytest.fixture
def tree(tmp_path: Path, raw: Path) -> Path:
    return write_harp(tmp_path / "HarP")


@pytest.fixture
def target(raw: Path) -> Path:
    return raw / "Dataset135_HarP"


def voxels(file: Path) -> np.ndarray:
    return np.asarray(nibabel.load(file).dataobj)


def undo(target: Path, output: Path, predictions: Path | None = None) -> int:
    return undo_main(135, ["--undo-crop", str(predictions or target / "labelsTr"), "-o", str(output)])


def test_left_is_one_and_right_two(tree: Path, target: Path) -> None:
    assert convert(harp, tree) == 0
    assert sorted(path.name for path in (target / "labelsTr").iterdir()) == [f"ADNI_{s}.nii.gz" for s in SUBJECTS]
    for number, subject in enumerate(SUBJECTS):
        _, left, right = harp_voxels(number)
        assert np.array_equal(voxels(target / "labelsTr" / f"ADNI_{subject}.nii.gz"), left + 2 * right)
    assert json.loads((target / "dataset.json").read_text())["labels"] == {"background": 0, "left": 1, "right": 2}


def test_one_class(tree: Path, target: Path) -> None:
    assert convert(harp, tree, "--one-class") == 0
    _, left, right = harp_voxels(0)
    assert np.array_equal(voxels(target / "labelsTr" / f"{FIRST}.nii.gz"), left + right)
    assert json.loads((target / "dataset.json").read_text())["labels"] == {"background": 0, "hippocampus": 1}


@pytest.mark.parametrize("flags", [(), ("--one-class",)])
@pytest.mark.parametrize("size", [10, 26, 64])
def test_undoing_crops_gives_the_label_maps(tree: Path, target: Path, tmp_path: Path, flags: tuple, size: int) -> None:
    assert convert(harp, tree, "--crop", "--crop-size", size, *flags) == 0
    shape = tuple(min(size, length) for length in HEAD)
    files = [*(target / "imagesTr").iterdir(), *(target / "labelsTr").iterdir()]
    assert len(files) == 4 * len(SUBJECTS)
    assert {nibabel.load(file).shape for file in files} == {shape}
    assert undo(target, tmp_path / "out") == 0
    for number, subject in enumerate(SUBJECTS):
        _, left, right = harp_voxels(number)
        whole = nibabel.load(tmp_path / "out" / f"ADNI_{subject}.nii.gz")
        assert np.array_equal(np.asarray(whole.dataobj), left + (1 if flags else 2) * right)
        assert np.allclose(whole.affine, ACPC)


def test_crops_lie_where_the_hippocampi_do_and_stay_together(tree: Path, target: Path) -> None:
    assert convert(harp, tree, "--crop", "--crop-size", 16) == 0
    scan, *masks = harp_voxels(0)
    for side, mask, other in zip("LR", masks, masks[::-1], strict=True):
        image = nibabel.load(target / "imagesTr" / f"{FIRST}_{side}_0000.nii.gz")
        labels = voxels(target / "labelsTr" / f"{FIRST}_{side}.nii.gz")
        assert np.count_nonzero(labels == harp.SIDES[side]) == mask.sum()
        corner = np.rint(np.linalg.inv(ACPC) @ image.affine[:, 3])[:3].astype(int)
        there = tuple(slice(first, first + length) for first, length in zip(corner, image.shape, strict=True))
        assert np.array_equal(np.asarray(image.dataobj), scan[there])
        assert np.count_nonzero(labels == 3 - harp.SIDES[side]) == other[there].sum()
    for fold in json.loads((target / "splits_final.json").read_text()):
        assert {f"{name[:-1]}L" for name in fold["val"]} | {f"{name[:-1]}R" for name in fold["val"]} == {*fold["val"]}


def test_a_box_is_moved_into_the_volume() -> None:
    mask = np.zeros((20, 9, 30))
    mask[:3, 2:4, -2:] = 1
    assert around([mask, mask], 0, 10) == (slice(0, 10), slice(0, 9), slice(20, 30))
    mask = np.zeros((20, 20, 20))
    mask[8:12, 9:12, 5] = 1
    assert around([mask], 0, 6) == (slice(7, 13), slice(7, 13), slice(2, 8))


def test_a_crop_that_would_cut_a_hippocampus_is_refused_before_anything_is_written(
    tree: Path, raw: Path, capsys
) -> None:
    assert convert(harp, tree, "--crop", "--crop-size", "8") == 2
    told = capsys.readouterr().err
    assert told.count("would cut it: --crop-size 9") == len(SUBJECTS)
    assert not [*raw.iterdir()]


def test_of_two_overlapping_predictions_the_nearer_crop_counts(tree: Path, target: Path, tmp_path: Path) -> None:
    assert convert(harp, tree, "--crop", "--crop-size", "30") == 0
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    for side, value in (("L", 1), ("R", 2)):
        image = nibabel.load(target / "labelsTr" / f"{FIRST}_{side}.nii.gz")
        write(predictions / f"{FIRST}_{side}.nii.gz", np.full(image.shape, value, np.uint8), image.affine)
    (predictions / "dataset.json").write_text("{}")
    assert undo(target, tmp_path / "out", predictions) == 0
    along = voxels(tmp_path / "out" / f"{FIRST}.nii.gz")[:, 10, 8]
    assert along.tolist() == [1] * 17 + [2] * 17


def test_undo_names_all_problems_and_writes_nothing(tree: Path, target: Path, tmp_path: Path, capsys) -> None:
    assert convert(harp, tree, "--crop", "--crop-size", "12") == 0
    predictions = shutil.copytree(target / "labelsTr", tmp_path / "predictions")
    (predictions / f"{FIRST}_R.nii.gz").unlink()
    names = [f"ADNI_{subject}" for subject in SUBJECTS]
    image = nibabel.load(predictions / f"{names[1]}_L.nii.gz")
    labels = np.array(image.dataobj)
    write(predictions / f"{names[1]}_L.nii.gz", labels[1:], image.affine)
    write(predictions / f"{names[2]}_L.nii.gz", labels, image.affine)
    write(predictions / "other.nii.gz", labels, image.affine)
    capsys.readouterr()
    assert undo(target, tmp_path / "out", predictions) == 2
    told = capsys.readouterr().err
    for words in (
        f"no {FIRST}_R.nii.gz", "has the shape (11, 12, 12); the crop has (12, 12, 12)",
        f"{names[2]}_R.nii.gz does not lie where", "has no case of this name",
    ):  # fmt: skip
        assert words in told, words
    assert not (tmp_path / "out").exists()
    assert undo(target, tmp_path / "out", tmp_path / "none") == 2
    assert "is no folder" in capsys.readouterr().err
    assert undo_main(27, ["--undo-crop", str(predictions), "-o", str(tmp_path / "out")]) == 2
    assert "give the data set with -d" in capsys.readouterr().err


def test_a_crop_size_below_one_is_refused(tree: Path, raw: Path, capsys) -> None:
    assert convert(harp, tree, "--crop", "--crop-size", "0") == 2
    assert "--crop-size is 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", '{"cases": [1]}', "[]", '{"cases": [{"name": "a"'])
def test_undo_refuses_a_damaged_record(text: str, target: Path, tmp_path: Path, capsys) -> None:
    target.mkdir()
    (target / "conversion.json").write_text(text)
    assert undo(target, tmp_path / "out") == 2
    assert "convert" in capsys.readouterr().err


CROP = {"whole": "a", "voxels": [[0, 2], [1, 4], [0, 9]], "of": [2, 4, 9]}


@pytest.mark.parametrize(
    "change",
    [
        {"whole": None}, {"whole": "../a"}, {"whole": ""}, {"voxels": [[0, 2], [1, 4]]},
        {"voxels": [[0, 2], [1, 4], 9]}, {"voxels": [[0, 2], [1, 5], [0, 9]]},
        {"voxels": [[0, 2], [1, 3.5], [0, 9]]}, {"of": [2, 4]}, {"of": "2x4"},
        *({missing: ...} for missing in CROP),
    ],
)  # fmt: skip
def test_undo_refuses_a_damaged_crop_by_name(change: dict, target: Path, tmp_path: Path, capsys) -> None:
    crop = {name: value for name, value in (CROP | change).items() if value is not ...}
    write(target / "labelsTr" / "a_L.nii.gz", np.ones((2, 3, 9), np.uint8), ACPC)
    (target / "conversion.json").write_text(json.dumps({"cases": [{"name": "a_L", "crop": crop}]}))
    assert undo(target, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "conversion.json: the crop of a_L is {" in told and "convert the data set anew" in told


def test_undo_that_is_interrupted_leaves_nothing(tree: Path, target: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    assert convert(harp, tree, "--crop", "--crop-size", "12") == 0
    monkeypatch.setattr(nibabel, "save", interrupted)
    assert undo(target, tmp_path / "out", target / "labelsTr") == 130
    assert "Interrupted; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_undo_of_what_was_not_cropped_is_refused(tree: Path, target: Path, tmp_path: Path, capsys) -> None:
    assert convert(harp, tree) == 0
    assert undo(target, tmp_path / "out") == 2
    assert "without --crop" in capsys.readouterr().err


def test_scans_without_masks(tree: Path, target: Path, tmp_path: Path, capsys) -> None:
    write(tree / "more" / "ADNI_011_S_0002_111_ACPC.nii.gz", harp_voxels(9)[0], ACPC)
    assert convert(harp, tree) == 2
    assert "there are no masks of the scan" in capsys.readouterr().err
    assert convert(harp, tree, "--unlabelled", "leave-out") == 0
    assert not [*(target / "imagesTs").iterdir()]
    assert convert(harp, tree, "--unlabelled", "test", "--crop", "--crop-size", "12", "--overwrite") == 0
    (test,) = (target / "imagesTs").iterdir()
    assert nibabel.load(test).shape == HEAD
    predictions = tmp_path / "predictions"
    write(predictions / "ADNI_011_S_0002_111_ACPC.nii.gz", np.ones(HEAD, np.uint8), ACPC)
    assert undo(target, tmp_path / "out", predictions) == 0
    assert voxels(tmp_path / "out" / "ADNI_011_S_0002_111_ACPC.nii.gz").all()


def test_all_problems_at_once(tree: Path, raw: Path, capsys) -> None:
    def mask(number: int, side: str) -> Path:
        return next(tree.glob(f"Labels_*/ADNI_{SUBJECTS[number]}_{side}.nii"))

    mask(0, "R").unlink()
    left, right = harp_voxels(1)[1:]
    overlapping = right | np.roll(left, 2, axis=0)
    write(mask(1, "R"), overlapping, ACPC)
    write(mask(2, "L"), left * 2, ACPC)
    (tree / "100" / f"ADNI_{SUBJECTS[3]}_ACPC.nii.gz").unlink()
    moved = ACPC.copy()
    moved[0, 3] += 1
    write(mask(4, "R"), harp_voxels(4)[2], moved)
    write(tree / "again" / f"ADNI_{SUBJECTS[4]}_MNI.nii.gz", harp_voxels(4)[0], ACPC)
    assert convert(harp, tree) == 2
    told = capsys.readouterr().err
    count = np.count_nonzero((left > 0) & (overlapping > 0))
    assert count == 3 * 8 * 4
    for words in (
        "no mask of the other side", f"{count} voxels are marked in more than one",
        "has the values 2; expected 0, 1", "found none", "found 2: ",
    ):  # fmt: skip
        assert words in told, words
    (tree / "again" / f"ADNI_{SUBJECTS[4]}_MNI.nii.gz").unlink()
    assert convert(harp, tree) == 2
    assert "voxels are up to 1 mm apart" in capsys.readouterr().err
    assert not [*raw.iterdir()]


@pytest.mark.parametrize("name", [FIRST, SUBJECTS[0][:10]])
@pytest.mark.parametrize("flags", [(), ("--crop", "--crop-size", "16")])
def test_a_subject_can_be_left_out(tree: Path, target: Path, name: str, flags: tuple) -> None:
    assert convert(harp, tree, *flags, "--exclude", name) == 0
    (tree / "Labels_100_NIFTI" / f"{FIRST}_R.nii").unlink()
    assert convert(harp, tree, *flags, "--exclude", name, "--overwrite") == 0
    assert len([*(target / "labelsTr").iterdir()]) == (8 if flags else 4)


def test_an_empty_mask_of_one_side(tree: Path, raw: Path, capsys) -> None:
    file = write(tree / "Labels_100_NIFTI" / f"{FIRST}_R.nii", np.zeros(HEAD, np.uint8), ACPC)
    assert convert(harp, tree) == 2
    assert f"is empty (all background): {file}; --allow-empty" in capsys.readouterr().err


def test_minc_2_without_its_package(tree: Path, raw: Path, monkeypatch, capsys) -> None:
    (tree / "100" / f"{FIRST}_ACPC.nii.gz").unlink()
    (tree / "100" / f"{FIRST}_ACPC.mnc").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(900))
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert convert(harp, tree) == 2
    assert f"{FIRST}_ACPC.mnc cannot be read without h5py: pip install h5py" in capsys.readouterr().err


def test_scans_as_adni_names_them(tree: Path, target: Path) -> None:
    for number, subject in enumerate(SUBJECTS):
        person, image = subject[:10], subject[11:]
        part = "100" if number < len(SUBJECTS) - 1 else "35"
        name = f"ADNI_{person}_MR_MPR__GradWarp__N3_Br_20070525165331428_S13408_I{image}.nii"
        place = tree / "ADNI" / person / "MPR" / "2006-04-18" / name
        write(place, harp_voxels(number)[0], ACPC)
        write(place.parent / name.replace(image, "99999"), harp_voxels(number)[0], ACPC)
        (tree / part / f"ADNI_{subject}_ACPC.nii.gz").unlink()
    assert convert(harp, tree, "--unlabelled", "leave-out") == 0
    record = json.loads((target / "conversion.json").read_text())["cases"][0]
    assert record["images"][0]["file"].endswith("I13722.nii")


def test_known_swapped_names_are_swapped_back(tree: Path, target: Path, capsys) -> None:
    for file in [*tree.rglob(f"ADNI_{SUBJECTS[1]}_*")]:
        file.rename(file.with_name(file.name.replace(SUBJECTS[1], "007_S_1304_74384")))
    left, right = (tree / "Labels_100_NIFTI" / f"ADNI_007_S_1304_74384_{side}.nii" for side in "LR")
    assert convert(harp, tree) == 0
    assert "swapped" not in capsys.readouterr().err
    right.rename(tree / "x")
    left.rename(right)
    (tree / "x").rename(left)
    assert convert(harp, tree, "--overwrite") == 0
    assert "ADNI_007_S_1304_74384: left and right are swapped" in capsys.readouterr().err
    _, of_left, of_right = harp_voxels(1)
    written = voxels(target / "labelsTr" / "ADNI_007_S_1304_74384.nii.gz")
    assert np.array_equal(written, of_left + 2 * of_right)


def test_masks_with_a_shifted_pair_of_values(tree: Path, target: Path) -> None:
    file = tree / "Labels_100_NIFTI" / f"{FIRST}_L.nii"
    _, left, right = harp_voxels(0)
    write(file, left.astype(np.float32) + np.float32(26896.988), ACPC)
    assert convert(harp, tree) == 0
    assert np.array_equal(voxels(target / "labelsTr" / f"{FIRST}.nii.gz"), left + 2 * right)


def test_release_split(tree: Path, target: Path, capsys) -> None:
    assert convert(harp, tree, "--release-split") == 0
    (fold,) = json.loads((target / "splits_final.json").read_text())
    assert fold["val"] == [f"ADNI_{SUBJECTS[-1]}"]
    assert len(fold["train"]) == 4
    (tree / "Labels_35_NIFTI").rename(tree / "Labels_100_NIFTI" / "more")
    assert convert(harp, tree, "--release-split", "--overwrite") == 2
    assert "Labels_35_NIFTI" in capsys.readouterr().err


def test_scans_in_minc(tree: Path, target: Path) -> None:
    for number, subject in enumerate(SUBJECTS):
        (file,) = tree.glob(f"*/ADNI_{subject}_ACPC.nii.gz")
        write_minc(file.with_name(f"ADNI_{subject}_ACPC.mnc"), harp_voxels(number)[0], ACPC)
        file.unlink()
    assert convert(harp, tree) == 0
    image = nibabel.load(target / "imagesTr" / f"{FIRST}_0000.nii.gz")
    assert np.allclose(image.affine, ACPC)
    assert np.allclose(image.get_fdata(), harp_voxels(0)[0], atol=0.01)


def test_a_folder_without_masks_is_refused(tmp_path: Path, raw: Path, capsys) -> None:
    write(tmp_path / "other" / "ADNI_002_S_0295_13722_ACPC.nii.gz", np.ones((4, 4, 4)), ACPC)
    assert convert(harp, tmp_path / "other") == 2
    assert "holds no masks of HarP" in capsys.readouterr().err
