"""What all conversions do: where they write, when they refuse, what they leave behind, folds, links, checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_sauron.dataset_conversion import acdc
from nnunet_sauron.dataset_conversion.raw_dataset import writing

from .trees import convert, write_acdc

NAME = "Dataset027_ACDC"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_acdc(tmp_path_factory.mktemp("download") / "ACDC")


@pytest.fixture
def download(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "ACDC"))


def files(folder: Path) -> dict[str, str]:
    """All files below a folder with their checksums."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def folds(dataset: Path) -> list[dict[str, list[str]]]:
    return json.loads((dataset / "splits_final.json").read_text())


def test_a_data_set_is_written_and_its_source_left_alone(download: Path, raw: Path, capsys) -> None:
    before = files(download)
    assert convert(acdc, download) == 0
    assert files(download) == before
    dataset = raw / NAME
    counts = {path.name: len([*path.iterdir()]) for path in dataset.iterdir() if path.is_dir()}
    assert counts == {"imagesTr": 10, "labelsTr": 10, "imagesTs": 2, "labelsTs": 2}
    assert "10 training and 2 test cases" in capsys.readouterr().out
    frame = "training/patient003/patient003_frame09"
    assert files(dataset)["imagesTr/patient003_frame09_0000.nii.gz"] == before[f"{frame}.nii.gz"]
    assert files(dataset)["labelsTr/patient003_frame09.nii.gz"] == before[f"{frame}_gt.nii.gz"]
    record = json.loads((dataset / "conversion.json").read_text())
    assert record["source"] == str(download) and len(record["cases"]) == 12
    case = next(case for case in record["cases"] if case["name"] == "patient003_frame09")
    assert case["group"] == "patient003"
    assert case["sha256"] == {
        str(download / f"{frame}{end}"): before[f"{frame}{end}"] for end in (".nii.gz", "_gt.nii.gz")
    }


def test_plain_nii_is_compressed(tmp_path: Path, raw: Path) -> None:
    assert convert(acdc, write_acdc(tmp_path / "ACDC", training=1, testing=0, ending=".nii"), "--link") == 0
    for path in (raw / NAME).glob("*Tr/*"):
        assert path.name.endswith(".nii.gz") and not path.is_symlink() and path.read_bytes()[:2] == b"\x1f\x8b"


def test_frames_of_a_patient_are_in_one_fold_and_the_seed_decides(download: Path, raw: Path) -> None:
    assert convert(acdc, download) == 0
    first = folds(raw / NAME)
    names = sorted(path.name.removesuffix(".nii.gz") for path in (raw / NAME / "labelsTr").iterdir())
    assert len(first) == 5 and sorted(name for fold in first for name in fold["val"]) == names
    for fold in first:
        assert sorted(fold["train"] + fold["val"]) == names
        assert not {name[:10] for name in fold["train"]} & {name[:10] for name in fold["val"]}
    assert convert(acdc, download, "--overwrite") == 0 and folds(raw / NAME) == first
    assert convert(acdc, download, "--overwrite", "--seed", 1) == 0 and folds(raw / NAME) != first


def test_few_patients_make_few_folds(tmp_path: Path, raw: Path, capsys) -> None:
    assert convert(acdc, write_acdc(tmp_path / "two", training=2, testing=0)) == 0
    assert len(folds(raw / NAME)) == 2 and "too few for 5 folds: there are 2" in capsys.readouterr().err
    assert convert(acdc, write_acdc(tmp_path / "one", training=1, testing=0), "--overwrite") == 0
    assert not (raw / NAME / "splits_final.json").exists() and "train fold all" in capsys.readouterr().err


def test_links_where_nothing_changes(download: Path, raw: Path, capsys) -> None:
    assert convert(acdc, download, "--link") == 0
    assert "24 files are links; 0" in capsys.readouterr().err
    image = raw / NAME / "imagesTr" / "patient001_frame01_0000.nii.gz"
    assert image.is_symlink() and image.resolve() == download / "training/patient001/patient001_frame01.nii.gz"


def test_a_relative_source_is_named_in_full(download: Path, raw: Path, monkeypatch) -> None:
    monkeypatch.chdir(download / "training")
    assert convert(acdc, Path(".."), "--link") == 0
    image = raw / NAME / "imagesTr" / "patient001_frame01_0000.nii.gz"
    case = json.loads((raw / NAME / "conversion.json").read_text())["cases"][0]
    assert case["images"][0]["file"] == str(download / "training/patient001/patient001_frame01.nii.gz")
    assert str(image.readlink()) in case["sha256"]


@pytest.mark.parametrize("value", [None, ""])
def test_nnunet_raw_must_be_set(value: str | None, download: Path, raw: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("nnUNet_raw") if value is None else monkeypatch.setenv("nnUNet_raw", value)
    assert convert(acdc, download) == 2
    assert "nnUNet_raw is not set" in capsys.readouterr().err


def test_what_is_there_is_replaced_only_if_told(download: Path, raw: Path, capsys) -> None:
    (raw / NAME).mkdir()
    (raw / NAME / "thesis.tex").write_text("mine")
    assert convert(acdc, download) == 2
    assert "--overwrite" in capsys.readouterr().err and [*files(raw)] == [f"{NAME}/thesis.tex"]
    assert convert(acdc, download, "--overwrite") == 0
    assert "thesis.tex" not in files(raw / NAME) and [path.name for path in raw.iterdir()] == [NAME]


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_a_number_is_never_given_twice(variable: str, download: Path, raw: Path, capsys) -> None:
    (raw.parent / variable / "Dataset027_Other").mkdir()
    assert convert(acdc, download, "--overwrite") == 2
    assert "taken by Dataset027_Other" in capsys.readouterr().err
    assert convert(acdc, download, "-d", 28) == 0 and (raw / "Dataset028_ACDC").is_dir()


@pytest.mark.parametrize("number", [0, -3, 1000])
def test_numbers_that_nnunet_cannot_name(number: int, download: Path, raw: Path, capsys) -> None:
    assert convert(acdc, download, "-d", number) == 2
    assert "from 1 to 999" in capsys.readouterr().err


def test_a_source_in_its_own_target_is_refused(raw: Path, capsys) -> None:
    write_acdc(raw / NAME, training=1, testing=0)
    before = files(raw)
    for source in (raw / NAME, raw / NAME / "training"):
        assert convert(acdc, source, "--overwrite") == 2
        assert "over SOURCE" in capsys.readouterr().err and files(raw) == before


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_what_is_interrupted_leaves_the_old_and_can_be_run_again(
    error: BaseException, code: int, download: Path, raw: Path, monkeypatch, capsys
) -> None:
    assert convert(acdc, download) == 0
    before = files(raw)
    done = []

    def fails(case, **options):
        done.append(case)
        if len(done) == 4:
            raise error
        return write_case(case, **options)

    write_case = writing.write_case
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_case", fails)
        assert convert(acdc, download, "--overwrite", "--seed", 1) == code
    assert files(raw) == before and [path.name for path in raw.iterdir()] == [NAME]
    assert ("No space left" if code == 2 else "nothing was written") in capsys.readouterr().err
    (raw / f".{NAME}.tmp" / "imagesTr").mkdir(parents=True)  # of a run that was killed
    (raw / f".{NAME}.tmp" / "imagesTr" / "half").touch()
    assert convert(acdc, download, "--overwrite") == 0
    assert files(raw).keys() == before.keys() and [path.name for path in raw.iterdir()] == [NAME]


def test_folds_of_an_earlier_conversion_do_not_stay(download: Path, raw: Path, capsys) -> None:
    old = raw.parent / "nnUNet_preprocessed" / NAME / "splits_final.json"
    old.parent.mkdir()
    old.write_text("[]")
    assert convert(acdc, download) == 2
    assert f"{old} holds other folds" in capsys.readouterr().err and [*raw.iterdir()] == []
    assert convert(acdc, download, "--overwrite") == 0 and not old.exists()
    shutil.copy(raw / NAME / "splits_final.json", old)
    capsys.readouterr()
    assert convert(acdc, download, "--overwrite") == 0 and old.exists()
    assert "--verify_dataset_integrity --clean" in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "training/patient001", "testing"])
def test_another_level_of_the_download(below: str, download: Path, raw: Path, capsys) -> None:
    assert convert(acdc, download.parent if not below else download / below) == (2 if below else 0)
    assert not below or f"give {download}" in capsys.readouterr().err


def test_several_downloads_are_not_chosen_from(download: Path, raw: Path, capsys) -> None:
    shutil.copytree(download, download.parent / "ACDC_old")
    assert convert(acdc, download.parent) == 2
    assert "several folders that fit" in capsys.readouterr().err


def test_help_tells_source_licence_and_layout(capsys) -> None:
    with pytest.raises(SystemExit):
        convert(acdc, Path("--help"))
    told = capsys.readouterr().out
    for words in ("https://www.creatis.insa-lyon.fr/Challenge/acdc", "CC BY-NC-SA 4.0", "Info.cfg", "--overwrite"):
        assert words in told


def test_a_number_of_processes_that_is_none_is_named(download: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nnunet_sauron.dataset_conversion.acdc", str(download)]
    environment = {**os.environ, "nnUNet_raw": str(tmp_path), "nnUNet_def_n_proc": "abc"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert "nnUNet_def_n_proc: 'abc' is no whole number" in ended.stderr
