"""Bundles as columns of the report."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import SimpleITK

from nnunet_sauron.analysis.report.compare import make_report
from nnunet_sauron.analysis.report.data import fold_numbers
from nnunet_sauron.analysis.report.page import page
from nnunet_sauron.cli import main
from nnunet_sauron.deploy.command import export

from ..compression.small_model import write_images, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of two folds, its bundle, images, references, and a folder of segmentations for each."""
    folder = tmp_path_factory.mktemp("bundles")
    write_model(folder / "model", folds=(0, 1), ignore=3)
    export(folder / "model", folder / "model.zip")
    write_images(folder / "images", count=2, labels=folder / "labels")
    reference = next((folder / "labels").iterdir())
    for name, flipped in (("ours", 0), ("theirs", 1)):
        (folder / name).mkdir()
        for file in (folder / "labels").iterdir():
            array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))
            array[0] *= 1 - flipped
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(folder / name / file.name))
    array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(reference)))
    array[-1] = 3  # which nobody judged
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(reference))
    return folder


def test_a_bundle_stands_beside_its_model(place, tmp_path, capsys):
    words = ["report", place / "model", place / "model.zip", "-o", tmp_path, "--timing", "0.1", "--json",
             "--labels", place / "labels", "--predictions", place / "theirs", place / "ours"]  # fmt: skip
    assert main(list(map(str, words))) == 0
    model, bundle = json.loads(capsys.readouterr().out)["models"]
    assert bundle["trainer"] == "bundle" and bundle["plans"] == "float32, openvino"
    for fold in ("0", "1"):
        numbers = bundle["folds"][fold]
        assert numbers["weights_bytes"] == _described(place)["files"][f"fold_{fold}.onnx"]["bytes"]
        assert "macs" not in numbers and 0 < numbers["seconds_cpu"] < 10
    # The same weights: a few hundred bytes apart, not the number of folds.
    assert bundle["mean"]["weights_bytes"] == pytest.approx(model["mean"]["weights_bytes"], rel=0.8)
    assert bundle["mean"]["dice"] == 1 and model["mean"]["dice"] < 1
    assert bundle["differences"]["dice"]["mean"] > 0
    assert "model.zip" in (tmp_path / "report.html").read_text()


def _described(place):
    import zipfile

    return json.loads(zipfile.ZipFile(place / "model.zip").read("bundle.json"))


def test_folds_of_a_bundle_are_timed_apart(place):
    made = make_report([place / "model.zip"], timing_seconds=0.05)
    times = [fold.timing["cpu"].median for fold in made.models[0].folds.values()]
    assert len(times) == 2 and times[0] != times[1]
    assert not any(math.isnan(value) for value in fold_numbers(made.models[0], "0").values())
    assert "bundle" in page(made)


def test_a_fold_of_a_bundle_can_be_chosen(place):
    bundle = make_report([place / "model", place / "model.zip"], timing_seconds=0, folds=["1"]).model("model.zip")
    assert list(bundle.folds) == ["1"]
    found = make_report([place / "model", place / "model.zip"], timing_seconds=0, folds=["0", "1"])
    assert list(found.model("model.zip").folds) == ["0", "1"]


def test_a_fold_that_a_bundle_lacks_is_named(place, tmp_path):
    export(place / "model", tmp_path / "one.zip", folds=["0"])
    found = make_report([place / "model", tmp_path / "one.zip"], timing_seconds=0, folds=["1"])
    assert [model.name for model in found.models] == ["model"]
    assert any("it holds folds 0 and not 1" in problem for problem in found.problems)


def test_bundles_alone_are_not_timed_on_a_gpu(place, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = make_report([place / "model.zip"], timing_seconds=0.05)
    assert not any("timed" in problem for problem in found.problems)
    assert list(found.models[0].folds["0"].timing) == ["cpu"]


def test_without_segmentations_it_says_how_to_make_them(place):
    made = make_report([place / "model.zip"], timing_seconds=0)
    (problem,) = made.problems
    assert f"nnUNetv2_sauron predict -b {place / 'model.zip'} -i IMAGES -o OUT" in problem
    assert made.left_out == []


def test_segmentations_that_fit_no_reference_cost_the_bundle_its_quality_alone(place, tmp_path):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((2, 2, 2), np.uint8)), str(tmp_path / "case_9.nii.gz"))
    made = make_report(
        [place / "model", place / "model.zip"], timing_seconds=0, labels=place / "labels",
        predictions=[place / "theirs", tmp_path],
    )  # fmt: skip
    assert made.left_out == [tmp_path] and made.models[0].scores and not made.models[1].scores
    assert any("case_9.nii.gz" in problem for problem in made.problems)


@pytest.mark.parametrize("damage", ["changed", "cut", "empty folder"])
def test_a_damaged_bundle_is_named_and_the_others_are_reported(place, tmp_path, damage):
    bad = tmp_path / "bad.zip"
    if damage == "empty folder":
        bad.mkdir()
        (bad / "bundle.json").write_text("{}")
    else:
        shutil.copy(place / "model.zip", bad)
        content = bytearray(bad.read_bytes())
        content[len(content) // 2] ^= 1
        bad.write_bytes(content if damage == "changed" else content[:1000])
    made = make_report([place / "model.zip", bad], timing_seconds=0)
    assert made.left_out == [bad] and len(made.models) == 1
    assert any("bad.zip is not in the report" in problem for problem in made.problems)
