"""What is special to the Decathlon, KiTS19 and ACDC, and the command of a conversion in a process of its own."""

from __future__ import annotations

import gzip
import json
import runpy
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from nnunet_sauron.dataset_conversion import acdc, kits19, msd

from ..integration.nnunet import NnUNet
from .trees import convert, write, write_acdc, write_kits19, write_msd

HIPPOCAMPUS = Path(__file__).parents[3] / "shared/data/Task04_Hippocampus"


def test_a_name_that_nnunet_cannot_take_is_told(raw: Path, tmp_path: Path, capsys) -> None:
    task = write_msd(tmp_path).rename(tmp_path / "Task77_\u524d")
    assert convert(msd, task) == 2
    assert "its name, '\u524d', begins with no letter" in capsys.readouterr().err
    assert convert(msd, task.rename(tmp_path / "Task77_Gr\u00f6\u00dfe")) == 0
    assert "Its name, 'Gr\u00f6\u00dfe', is written Gre." in capsys.readouterr().err
    assert (raw / "Dataset077_Gre").is_dir()


def test_two_processes_write_what_one_does(raw: Path, tmp_path: Path) -> None:
    task, written = write_msd(tmp_path), []
    for processes in (1, 2):
        assert convert(msd, task, "-np", processes, "--overwrite") == 0
        dataset = raw / "Dataset002_Heart"
        files = {path.relative_to(dataset): path.read_bytes() for path in dataset.rglob("*.nii.gz")}
        written.append((files, json.loads((dataset / "conversion.json").read_text())["cases"]))
    assert written[0] == written[1] and len(written[0][0]) == 13


def test_the_command_in_a_process_of_its_own(nnunet: NnUNet, tmp_path: Path, monkeypatch, capsys) -> None:
    task = write_msd(tmp_path)
    told = nnunet.run(sys.executable, "-m", msd.__name__, task, "-np", 1, anew=True)
    assert "6 training and 1 test cases" in told
    assert json.loads((nnunet.raw / "Dataset002_Heart/conversion.json").read_text())["converter"] == "msd"
    # Again, where it is there already; in this process, which has imported all.
    monkeypatch.setattr(sys, "argv", ["msd", str(task)])
    monkeypatch.delitem(sys.modules, msd.__name__)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(msd.__name__, run_name="__main__")
    assert "is there already" in capsys.readouterr().err


class TestMSD:
    @pytest.mark.parametrize(
        ("fault", "words"),
        [
            (lambda task: (task / "imagesTr/la_002.nii.gz").unlink(), "la_002: there is no image"),
            (lambda task: (task / "labelsTr/la_002.nii.gz").unlink(), "la_002: there is no segmentation"),
            (
                lambda task: shutil.copy(task / "imagesTr/la_002.nii.gz", task / "imagesTr/la_002 (1).nii.gz"),
                "la_002 (1): dataset.json does not list it. If it is a copy of another one, remove it",
            ),
            (lambda task: edit(task, numTraining=7), "numTraining is 7, but 6 cases are listed"),
            (lambda task: edit(task, modality={"0": "T1", "1": "T2"}), "expected four axes"),
            (lambda task: edit(task, labels={"0": "background", "2": "la"}), "nnU-Net needs 0, 1, 2"),
            (lambda task: edit(task, labels={"0": "background", "1": None}), "a name for each"),
            (lambda task: edit(task, labels={}), "its labels are {}"),
            (lambda task: edit(task, modality={}), "is none of the Decathlon: ValueError('no modality')"),
            (
                lambda task: edit(task, training=[entry("la_000", "la_001")]),
                "pairs the image la_000 with the segmentation",
            ),
            (lambda task: edit(task, training=[entry("la_000", "la_000")] * 2), "lists la_000 2 times"),
            (lambda task: edit(task, test=["./imagesTs/la_006.nii.gz", "./imagesTs/la_9.nii.gz"]), "la_9: there is no"),
            (lambda task: edit(task, labels=None), "is none of the Decathlon"),
            (lambda task: (task / "dataset.json").write_text('{"labels":'), "is no JSON file, or was cut short"),
        ],
    )
    def test_a_fault_is_named(self, fault, words: str, tmp_path: Path, raw: Path, capsys) -> None:
        task = write_msd(tmp_path)
        fault(task)
        assert convert(msd, task) == 2
        assert words in capsys.readouterr().err and [*raw.iterdir()] == []

    @pytest.mark.parametrize("volumes", [2, 4])
    def test_files_with_other_than_a_volume_a_channel(self, volumes: int, tmp_path: Path, raw: Path, capsys) -> None:
        task = write_msd(tmp_path, channels=volumes)
        edit(task, modality={"0": "T1", "1": "T2", "2": "FLAIR"})
        assert convert(msd, task) == 2
        assert f"la_000.nii.gz has the shape (20, 24, 8, {volumes}); expected 3 volumes" in capsys.readouterr().err

    def test_a_renamed_task_takes_its_name_from_dataset_json_and_needs_a_number(self, tmp_path, raw, capsys) -> None:
        task = write_msd(tmp_path).rename(tmp_path / "download")
        assert convert(msd, task) == 2
        assert "needs a number" in capsys.readouterr().err
        assert convert(msd, task, "-d", 12) == 0 and (raw / "Dataset012_LeftAtrium").is_dir()

    def test_a_link_to_a_task_and_no_test_images(self, tmp_path: Path, raw: Path, capsys) -> None:
        task = write_msd(tmp_path / "store")
        shutil.rmtree(task / "imagesTs")
        edit(task, numTraining=None)
        stored = task.rename(tmp_path / "store" / "a1b2")
        (tmp_path / task.name).symlink_to(stored)
        assert convert(msd, tmp_path / task.name) == 0 and (raw / "Dataset002_Heart").is_dir()
        assert "has none of 1 test images" in capsys.readouterr().err

    def test_an_excluded_case_may_lack_anything(self, tmp_path: Path, raw: Path) -> None:
        task = write_msd(tmp_path)
        (task / "labelsTr/la_001.nii.gz").unlink()
        shutil.copy(task / "imagesTr/la_002.nii.gz", task / "imagesTr/la_002.nii")
        assert convert(msd, task, "--exclude", "la_001", "la_002") == 0
        assert len([*(raw / "Dataset002_Heart/labelsTr").iterdir()]) == 4

    def test_small_is_a_seeded_subset(self, tmp_path: Path, raw: Path) -> None:
        task, names = write_msd(tmp_path), []
        for seed in (1, 1, 2):
            assert convert(msd, task, "--small", 3, "--overwrite", "--seed", seed) == 0
            names.append(sorted(path.name for path in (raw / "Dataset002_Heart/labelsTr").iterdir()))
        assert names[0] == names[1] != names[2] and [len(drawn) for drawn in names] == [3, 3, 3]

    def test_real_hippocampi(self, raw: Path) -> None:
        if not HIPPOCAMPUS.is_dir():
            pytest.skip("The Decathlon's Task04_Hippocampus is not at ../shared/data (see its website; CC-BY-SA 4.0).")
        assert convert(msd, HIPPOCAMPUS, "--small", 12) == 0
        dataset = raw / "Dataset004_Hippocampus"
        for path in (dataset / "labelsTr").iterdir():
            written, source = nibabel.load(path), nibabel.load(HIPPOCAMPUS / "labelsTr" / path.name)
            assert written.get_data_dtype() == np.uint8 and np.array_equal(written.dataobj, source.dataobj)
            image = nibabel.load(dataset / "imagesTr" / path.name.replace(".nii", "_0000.nii"))
            assert np.array_equal(image.affine, written.affine) and image.shape == written.shape
        assert json.loads((dataset / "dataset.json").read_text())["numTraining"] == 12


class TestKiTS19:
    def test_faulty_cases_are_left_out_unless_kept(self, tmp_path: Path, raw: Path, capsys) -> None:
        tree = write_kits19(tmp_path / "kits19")
        assert convert(kits19, tree) == 0
        assert "Left out as faulty: case_00015" in capsys.readouterr().err
        assert not (raw / "Dataset040_KiTS19/labelsTr/case_00015.nii.gz").exists()
        assert convert(kits19, tree, "--keep-faulty", "--overwrite") == 0
        assert (raw / "Dataset040_KiTS19/labelsTr/case_00015.nii.gz").exists()
        assert [path.name for path in (raw / "Dataset040_KiTS19/imagesTs").iterdir()] == ["case_00210_0000.nii.gz"]

    def test_regions(self, tmp_path: Path, raw: Path) -> None:
        assert convert(kits19, write_kits19(tmp_path / "kits19"), "--regions") == 0
        told = json.loads((raw / "Dataset040_KiTS19/dataset.json").read_text())
        assert told["labels"] == {"background": 0, "kidney and tumour": [1, 2], "tumour": [2]}
        assert told["regions_class_order"] == [1, 2]

    def test_a_case_that_is_left_out_anyway_may_be_excluded(self, tmp_path: Path, raw: Path) -> None:
        assert convert(kits19, write_kits19(tmp_path / "kits19"), "--exclude", "case_00015", "case_00001") == 0

    def test_a_later_challenge(self, tmp_path: Path, raw: Path, capsys) -> None:
        assert convert(kits19, write_kits19(tmp_path / "kits19", (0, 1, 2, 3, 400))) == 2
        assert "case_00400: KiTS19 ends at case_00299" in capsys.readouterr().err

    def test_a_clone_without_its_images(self, tmp_path: Path, raw: Path, capsys) -> None:
        tree = write_kits19(tmp_path / "kits19")
        for file in tree.rglob("imaging.nii.gz"):
            file.unlink()
        (tree / "data/case_00002/segmentation.nii.gz").unlink()
        assert convert(kits19, tree) == 2
        told = capsys.readouterr().err
        assert "case_00000: there is no imaging.nii.gz; the clone has none until get_imaging" in told

    def test_a_labelled_case_without_its_segmentation(self, tmp_path: Path, raw: Path, capsys) -> None:
        tree = write_kits19(tmp_path / "kits19")
        (tree / "data/case_00002/segmentation.nii.gz").unlink()
        assert convert(kits19, tree) == 2
        assert "case_00002: there is no segmentation.nii.gz" in capsys.readouterr().err

    def test_masks_with_qform_alone_as_the_corrected_ones_have(self, tmp_path: Path, raw: Path) -> None:
        tree = write_kits19(tmp_path / "kits19")
        file = tree / "data/case_00001/segmentation.nii.gz"
        stored = nibabel.load(file)
        labels = np.asarray(stored.dataobj, dtype=np.uint16)
        again = nibabel.Nifti1Image(labels, stored.affine)
        again.set_sform(None, 0)
        again.set_qform(stored.affine, 1)
        nibabel.save(again, file)
        assert convert(kits19, tree) == 0
        written = nibabel.load(raw / "Dataset040_KiTS19/labelsTr/case_00001.nii.gz")
        assert written.header["sform_code"] == 1 and np.array_equal(written.dataobj, labels)


def test_acdc_without_labels_for_testing_has_no_labels_ts(tmp_path: Path, raw: Path) -> None:
    tree = write_acdc(tmp_path / "ACDC", training=2)
    for file in (tree / "testing").rglob("*_gt.nii.gz"):
        file.unlink()
    assert convert(acdc, tree) == 0
    assert not (raw / "Dataset027_ACDC/labelsTs").exists()
    assert len([*(raw / "Dataset027_ACDC/imagesTs").iterdir()]) == 2


@pytest.mark.parametrize("info", [b"\xef\xbb\xbfED: 1\r\nES: 9\r\n", b"ed : 1\n\n  es:9"])
def test_acdc_info_as_other_editors_leave_it(info: bytes, tmp_path: Path, raw: Path) -> None:
    tree = write_acdc(tmp_path / "ACDC", training=2)
    file = tree / "training/patient001/Info.cfg"
    file.unlink()
    file.with_name("info.cfg").write_bytes(info)
    assert convert(acdc, tree) == 0
    assert (raw / "Dataset027_ACDC/labelsTr/patient001_frame09.nii.gz").is_file()


@pytest.mark.parametrize("kinds", [("", "_gt"), ("_gt",), ("",)])
def test_acdc_with_the_sforms_of_its_download(kinds: tuple[str, ...], tmp_path: Path, raw: Path, capfd) -> None:
    tree = write_acdc(tmp_path / "ACDC", training=2)
    affine = np.diag([-1.5, -1.5, 5, 1])
    for kind in ("", "_gt"):
        file = tree / f"training/patient001/patient001_frame09{kind}.nii.gz"
        stored = np.asarray(nibabel.load(file).dataobj)
        header = nibabel.load(write(file, stored, affine)).header
        if kind in kinds:
            header.set_sform(np.diag([-1, -1, 1, 1]), 1)
        file.write_bytes(gzip.compress(nibabel.Nifti1Image(stored, None, header).to_bytes()))
    assert convert(acdc, tree) == 0
    assert "unexpected scales" not in capfd.readouterr().err
    name, dataset = "patient001_frame09", raw / "Dataset027_ACDC"
    for path in (dataset / f"imagesTr/{name}_0000.nii.gz", dataset / f"labelsTr/{name}.nii.gz"):
        image = SimpleITK.ReadImage(str(path))
        assert np.allclose(image.GetSpacing(), [1.5, 1.5, 5]) and np.allclose(image.GetOrigin(), 0)


@pytest.mark.parametrize("flat", [True, False])
def test_acdc_in_one_folder_or_in_capital_letters(flat: bool, tmp_path: Path, raw: Path) -> None:
    tree = write_acdc(tmp_path / "ACDC", training=2)
    for part in ("training", "testing"):
        for patient in [*(tree / part).iterdir()] if flat else ():
            patient.rename(tree / patient.name)
        (tree / part).rename(tree / part.capitalize())
    assert convert(acdc, tree) == 0
    counts = [len([*(raw / "Dataset027_ACDC" / name).iterdir()]) for name in ("imagesTr", "imagesTs")]
    assert counts == [4, 2]


def entry(image: str, label: str) -> dict[str, str]:
    return {"image": f"./imagesTr/{image}.nii.gz", "label": f"./labelsTr/{label}.nii.gz"}


def edit(task: Path, **values: object) -> None:
    """Change entries of a task's dataset.json."""
    told = json.loads((task / "dataset.json").read_text())
    (task / "dataset.json").write_text(json.dumps({**told, **values}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "two labels of one name"),
        ({"labels": {"background": 0, "a": 1}}, "Expected are modality and labels as in"),
        ({"modality": ["MRI"]}, "Expected are modality and labels as in"),
        ({"modality": None}, "Expected are modality and labels as in"),
    ],
)
def test_what_is_wrong_with_a_decathlon_dataset_json_is_said(tmp_path, raw, capsys, change, said):
    task = write_msd(tmp_path)
    told = json.loads((task / "dataset.json").read_text())
    (task / "dataset.json").write_text(json.dumps({**told, **change}))
    assert convert(msd, task) != 0
    assert said in capsys.readouterr().err
    assert not list(raw.iterdir())
