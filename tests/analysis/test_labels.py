"""Labels as nnU-Net's LabelManager reads them, and segmentations whose values are none of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage import io

from nnunet_sauron.analysis.feature_maps.maps import feature_maps
from nnunet_sauron.cli import main
from nnunet_sauron.model.cases import Case
from nnunet_sauron.model.evaluation import Segmentations, evaluate_folder
from nnunet_sauron.model.labels import class_values, foreground_values
from nnunet_sauron.model.trained import TrainedModel

from ..compression.small_model import write_images, write_model


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch):
    monkeypatch.setenv("nnunet_sauron_debug", "0")


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))


def change_labels(folder: Path, labels: dict) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": labels}))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"background": "0", "a": "1", "b": "2"}, {"a": (1,), "b": (2,)}),
        ({"a": 1, "background": 0, "b": "2"}, {"a": (1,), "b": (2,)}),
        ({"background": 0, "a": ["1", 2], "b": [2], "air": [0, 0]}, {"a": (1, 2), "b": (2,)}),
        ({"background": 0, "a": 1.0, "ignore": 2}, {"a": (1,)}),
    ],
)
def test_values_may_be_text_or_lists_in_any_order(labels, expected):
    assert foreground_values(labels, 2 if "ignore" in labels else None) == expected


@pytest.mark.parametrize("value", ["one", None, [], {"a": 1}, [1, "x"]])
def test_a_value_that_is_no_number_is_named(value):
    with pytest.raises(ValueError, match=r"The label 'organ' of dataset.json has the value"):
        class_values({"background": 0, "organ": value})


def test_a_model_whose_labels_are_text(tmp_path):
    folder = write_model(tmp_path / "model")
    change_labels(folder, {"high": "2", "background": "0", "low": "1"})
    model = TrainedModel.read(folder)
    assert model.classes == {"high": (2,), "low": (1,)}
    image = write_images(tmp_path / "images", 1, (3, 16, 16), labels=tmp_path / "labels") / "case_0_0000.nii.gz"
    found = feature_maps(model, "0", Case("case_0", (str(image),)), reference=tmp_path / "labels" / "case_0.nii.gz")
    assert found.classes == {1: "low", 2: "high"}
    (score,) = evaluate_folder(tmp_path / "labels", tmp_path / "labels", model.segmentations)
    assert score.values("dice") == {"high": 1, "low": 1}


@pytest.mark.parametrize(
    "labels", [{"0": "background", "1": "organ"}, {"background": 1}, [], {"background": 0, "a": "x"}]
)
def test_labels_that_nnunet_cannot_use_are_named(tmp_path, labels):
    folder = write_model(tmp_path / "model")
    change_labels(folder, labels)
    with pytest.raises(ValueError, match=rf"plans.json and dataset.json of {folder} are not those of a model"):
        TrainedModel.read(folder)


KIND = Segmentations({"background": 0, "organ": 1, "lesion": "2"}, values=frozenset({0, 1, 2}))


@pytest.mark.parametrize("which", ["prediction", "reference"])
@pytest.mark.parametrize(("value", "dtype"), [(255, np.uint8), (3, np.uint8), (0.5, np.float32), (-1, np.int16)])
def test_values_that_are_no_class_are_an_error(tmp_path, which, value, dtype):
    for name in ("prediction", "reference"):
        array = np.zeros((4, 6, 8), dtype)
        array[1, 2, 2:5] = value if name == which else 1
        save(tmp_path / name / "c.nii.gz", array)
    with pytest.raises(ValueError, match=rf"{which}/c.nii.gz has values that are no class: {value}; .* are 0, 1, 2\."):
        evaluate_folder(tmp_path / "prediction", tmp_path / "reference", KIND)


def test_a_class_beside_an_unknown_value_is_scored_where_the_data_set_is_not_known(tmp_path):
    array = np.zeros((4, 6, 8), np.uint8)
    array[1, 2, 2:5] = 1, 1, 7
    save(tmp_path / "a" / "c.nii.gz", array)
    (score,) = evaluate_folder(tmp_path / "a", tmp_path / "a", Segmentations({"background": 0, "organ": 1}))
    assert score.values("dice") == {"organ": 1}
    save(tmp_path / "a" / "c.nii.gz", array * 7)
    with pytest.raises(ValueError, match="no class: 7, 49"):
        evaluate_folder(tmp_path / "a", tmp_path / "a", Segmentations({"background": 0, "organ": 1}))


def test_values_of_regions_and_of_ignored_voxels_are_known(tmp_path):
    model = TrainedModel.read(write_model(tmp_path / "model", whole=[1, 2], core=[2]))
    array = np.zeros((4, 6, 8), np.uint8)
    array[1, 2, 2:6] = 1, 2, 3, 4  # nnU-Net writes the values of regions_class_order
    save(tmp_path / "a" / "c.nii.gz", array)
    assert evaluate_folder(tmp_path / "a", tmp_path / "a", model.segmentations)


@pytest.mark.parametrize("colours", [3, 4])
def test_colours_are_no_segmentation(tmp_path, colours):
    kind = Segmentations({"background": 0, "organ": 1}, ending=".png", reader=NaturalImage2DIO())
    (tmp_path / "a").mkdir()
    io.imsave(tmp_path / "a" / "c.png", np.ones((8, 9, colours), np.uint8), check_contrast=False)
    with pytest.raises(ValueError, match=rf"c.png has {colours} channels"):
        evaluate_folder(tmp_path / "a", tmp_path / "a", kind)


class TestTiff:
    """3D TIFF, whose spacing stands in a JSON file beside it, which nnU-Net does not copy with the references."""

    KIND = Segmentations({"background": 0, "organ": 1}, ending=".tif", reader=Tiff3DIO())

    @pytest.fixture
    def folders(self, tmp_path):
        for name, voxel in (("predictions", 2), ("references", 4)):
            (tmp_path / name).mkdir()
            for case in "ab":
                array = np.zeros((4, 6, 8), np.uint8)
                array[1, 2, voxel] = 1
                tifffile.imwrite(tmp_path / name / f"{case}.tif", array)
                (tmp_path / name / f"{case}.json").write_text('{"spacing": [2, 0.5, 0.5]}')
        return tmp_path

    @pytest.mark.parametrize("without", [["references"], ["predictions"], [], ["predictions", "references"]])
    def test_the_other_sides_spacing_is_taken_and_that_is_said_once(self, folders, capsys, without):
        for name in without:
            for path in (folders / name).glob("*.json"):
                path.unlink()
        notes = []
        scores = evaluate_folder(folders / "predictions", folders / "references", self.KIND, on_note=notes.append)
        assert [score.mean("hd95") for score in scores] == [2 if len(without) == 2 else 1] * 2
        assert len(notes) == bool(without)
        assert all("spacing" in note for note in notes) and capsys.readouterr().out == ""

    def test_spacings_that_differ_are_refused(self, folders):
        (folders / "references" / "b.json").write_text('{"spacing": [2, 0.5, 0.7]}')
        with pytest.raises(ValueError, match=r"b.tif has shape .*spacing \(2.0, 0.5, 0.5\) mm, .*\(2.0, 0.5, 0.7\) mm"):
            evaluate_folder(folders / "predictions", folders / "references", self.KIND)

    def test_shapes_are_compared_without_a_spacing(self, folders):
        tifffile.imwrite(folders / "references" / "a.tif", np.zeros((4, 6, 9), np.uint8))
        (folders / "references" / "a.json").unlink()
        with pytest.raises(ValueError, match=r"a.tif has shape \(4, 6, 8\).*a.tif \(4, 6, 9\) \(no spacing\)"):
            evaluate_folder(folders / "predictions", folders / "references", self.KIND)

    def test_report(self, folders, capsys):
        model = write_model(folders / "model", 3, reader="Tiff3DIO", ending=".tif")
        for path in (folders / "references").glob("*.json"):
            path.unlink()
        words = ["--predictions", str(folders / "predictions"), "--labels", str(folders / "references"), "--json"]
        assert main(["report", str(model), "-o", str(folders / "report"), "--timing", "0", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["models"][0]["mean"]["cases"] == 2
        assert [problem for problem in found["problems"] if "spacing" in problem] == [
            f"References in {folders / 'references'} tell no spacing: that of the segmentations is taken."
        ]


class TestReport:
    """What is damaged costs a case, is named, and leaves everything else."""

    @pytest.fixture
    def folders(self, tmp_path):
        for model in ("good", "other"):
            write_model(tmp_path / model, reader="NibabelIOWithReorient")
            for case in "abc":
                array = np.zeros((4, 16, 16), np.uint8)
                array[1, 2:5, 2:5] = 1
                save(tmp_path / "references" / f"{case}.nii.gz", array)
                save(tmp_path / model / "fold_0" / "validation" / f"{case}.nii.gz", array)
                (tmp_path / model / "fold_0" / "validation" / f"._{case}.nii.gz").write_text("of macOS")
            cases = [{"reference_file": str(tmp_path / "references" / "a.nii.gz")}]
            (tmp_path / model / "fold_0" / "validation" / "summary.json").write_text(
                json.dumps({"metric_per_case": cases})
            )
        return tmp_path

    def report(self, folders, capsys, code=0) -> tuple[dict, str]:
        models = [str(folders / name) for name in ("good", "other")]
        assert main(["report", *models, "-o", str(folders / "report"), "--timing", "0", "--json"]) == code
        captured = capsys.readouterr()
        assert len(list((folders / "report").iterdir())) == 5
        return json.loads(captured.out), captured.err

    @pytest.mark.parametrize("damage", ["cut", "4D", "text", "shape", "values", "folder"])
    @pytest.mark.parametrize("which", ["references", "other/fold_0/validation"])
    def test_one_case(self, folders, capsys, damage, which):
        path = folders / which / "b.nii.gz"
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-20])
        elif damage == "4D":
            save(path, np.zeros((4, 16, 16, 2), np.uint8))
        elif damage == "text":
            path.write_text("no image")
        elif damage == "shape":
            save(path, np.zeros((4, 16, 17), np.uint8))
        elif damage == "values":
            save(path, np.full((4, 16, 16), 255, np.uint8))
        else:
            path.unlink()
            path.mkdir()
        found, _ = self.report(folders, capsys)
        assert found["models"][1]["mean"]["cases"] == 2
        assert found["models"][0]["mean"]["cases"] == (2 if which == "references" else 3)
        assert any(str(path) in problem for problem in found["problems"])

    def test_no_case_that_can_be_scored_is_an_error(self, folders, capsys):
        for path in (folders / "other" / "fold_0" / "validation").glob("[abc].nii.gz"):
            save(path, np.full((4, 16, 16), 255, np.uint8))
        found, _ = self.report(folders, capsys, code=1)
        assert found["models"][1]["mean"].get("dice") is None and found["models"][0]["mean"]["dice"] == 1
        assert found["left_out"] == [str(folders / "other")]

    @pytest.mark.parametrize(
        "text", ['{"metric_per_case": [{"ref', "[]", '{"metric_per_case": [1]}', '{"metric_per_case": {"a": 1}}', "\0"]
    )
    def test_summary(self, folders, capsys, monkeypatch, text):
        monkeypatch.setattr("nnunet_sauron.analysis.report.scores.nnUNet_preprocessed", str(folders / "preprocessed"))
        path = folders / "other" / "fold_0" / "validation" / "summary.json"
        path.write_text(text)
        found, _ = self.report(folders, capsys, code=1)
        assert found["models"][0]["mean"]["cases"] == 3
        assert any(str(path) in problem for problem in found["problems"])
        name = json.loads((folders / "other" / "plans.json").read_text())["dataset_name"]
        shutil.copytree(folders / "references", folders / "preprocessed" / name / "gt_segmentations")
        found, _ = self.report(folders, capsys)
        assert found["models"][1]["mean"]["cases"] == 3

    @pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
    @pytest.mark.parametrize("text", ['{"labels": ', "", "[1]", "{}", "\x80"])
    def test_json_of_the_model(self, folders, capsys, name, text):
        (folders / "other" / name).write_text(text, encoding="latin-1")
        found, _ = self.report(folders, capsys, code=1)
        assert len(found["models"]) == 1 and found["models"][0]["mean"]["cases"] == 3
        assert any(name in problem and str(folders / "other") in problem for problem in found["problems"])
