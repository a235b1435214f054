"""`nnUNetv2_sauron export` in process; what bundles predict is in tests/runtime."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import sys
import zipfile

import numpy as np
import onnx
import pytest
import SimpleITK
import torch
from nnunet_sauron_runtime import Bundle
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from nnunet_sauron.cli import main
from nnunet_sauron.deploy import command

from ..full_disk import full_disk
from ..runtime.models import phantom, write_image, write_model


@pytest.fixture(autouse=True)
def _plain_errors(monkeypatch):
    monkeypatch.setenv("nnunet_sauron_debug", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A 2D model of two folds, and images for it."""
    folder = tmp_path_factory.mktemp("model") / "model"
    write_model(folder, dim=2, widths=[(6, 8, 10)] * 2, mirror_axes=(0, 1))
    for case in range(3):
        write_image(folder.parent / f"images/c{case}_0000.nii.gz", phantom((3, 24, 20), case))
    return folder


def export(folder, output, *words) -> int:
    return main(["export", "-m", str(folder), "-o", str(output), *map(str, words)])


def described(bundle) -> dict:
    if bundle.is_dir():
        return json.loads((bundle / "bundle.json").read_text())
    return json.loads(zipfile.ZipFile(bundle).read("bundle.json"))


def test_a_bundle_states_what_a_prediction_depends_on(model, tmp_path, capsys):
    assert export(model, tmp_path / "b.zip", "--name", "Small", "--licence", "CC0") == 0
    said = capsys.readouterr()
    assert f"nnUNetv2_sauron predict -b {tmp_path / 'b.zip'} -i IMAGES -o OUT" in said.out
    assert "logits differ from PyTorch's by at most" in said.err
    found = described(tmp_path / "b.zip")
    assert found["card"]["name"] == "Small" and found["card"]["licence"] == "CC0"
    assert "medical device" in found["card"]["warning"]
    (stage,) = found["stages"]
    assert stage["networks"] == ["fold_0.onnx", "fold_1.onnx"]
    assert stage["mirror_axes"] == [0, 1] and stage["patch_size"] == [16, 16] and stage["outputs"] == 3
    assert stage["resampling_data"] == {
        "function": "resample_data_or_seg_to_shape", "is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None
    }  # fmt: skip
    assert found["labels"] == {"background": 0, "low": 1, "high": 2} and found["regions_class_order"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"b.zip"}
    assert [len(stage) for stage in Bundle(tmp_path / "b.zip", threads=1).networks] == [2]


def test_a_folder_chosen_folds_regions_and_normalisation_with_numbers(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    dataset = {"labels": labels, "regions_class_order": [1, 2], "channel_names": {"0": "CT", "1": "T1"}}
    schemes = {"normalization_schemes": ["CTNormalization", "NoNormalization"], "use_mask_for_norm": [False, True]}
    transposed = {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    write_model(
        tmp_path / "model", widths=[(6, 8, 10)] * 2, dataset=dataset, configuration=schemes, plan=transposed,
        mirror_axes=(),
    )  # fmt: skip
    assert export(tmp_path / "model", tmp_path / "bundle", "-f", 1) == 0
    found = described(tmp_path / "bundle")
    (stage,) = found["stages"]
    assert found["regions_class_order"] == [1, 2] and stage["outputs"] == 2
    assert found["labels"] == labels
    assert stage["networks"] == ["fold_1.onnx"] and stage["mirror_axes"] is None
    assert stage["transpose_forward"] == [2, 0, 1]
    assert [one["use_mask_for_norm"] for one in stage["normalization"]] == [False, True]
    assert stage["normalization"][0]["percentile_99_5"] == 140.0
    assert Bundle(tmp_path / "bundle", threads=1).manifest.foreground_labels == (1, 2)


def test_folds_of_different_widths(tmp_path):
    write_model(tmp_path / "model", dim=2, widths=[(6, 8, 10), (4, 7, 9)], trainer="SauronTrainer")
    assert export(tmp_path / "model", tmp_path / "b.zip") == 0
    sizes = [file["bytes"] for file in described(tmp_path / "b.zip")["files"].values()]
    assert len(set(sizes)) == 2


def test_a_cascade_has_two_stages(tmp_path, capsys):
    write_model(tmp_path / "low")
    write_model(tmp_path / "high", configuration={"previous_stage": "3d_fullres"}, seed=3)
    assert export(tmp_path / "high", tmp_path / "b.zip") == 2
    assert "--previous-stage" in capsys.readouterr().err
    assert export(tmp_path / "high", tmp_path / "b.zip", "--previous-stage", tmp_path / "low") == 0
    low, high = described(tmp_path / "b.zip")["stages"]
    assert low["previous_stage_labels"] is None and high["previous_stage_labels"] == [1, 2]
    assert low["networks"] == ["lowres_fold_0.onnx"] and high["networks"] == ["fold_0.onnx"]
    assert len(high["normalization"]) == 1
    write_model(tmp_path / "other", dim=2)
    for words, said in (
        ((tmp_path / "high", tmp_path / "c.zip", "--previous-stage", tmp_path / "other"), "is a model of 2d"),
        ((tmp_path / "low", tmp_path / "c.zip", "--previous-stage", tmp_path / "low"), "has no stage before it"),
    ):
        assert export(*words) == 2
        assert said in capsys.readouterr().err


def test_stages_of_two_data_sets_are_refused(tmp_path, capsys):
    write_model(tmp_path / "low", dataset={"labels": {"background": 0, "a": 1, "b": 2}})
    write_model(tmp_path / "high", configuration={"previous_stage": "3d_fullres"})
    assert export(tmp_path / "high", tmp_path / "b.zip", "--previous-stage", tmp_path / "low") == 2
    assert "different labels" in capsys.readouterr().err


SQUARED = {"is_seg": False, "order": 2, "order_z": 0, "force_separate_z": None}


@pytest.mark.parametrize(
    ("configuration", "plan", "named"),
    [
        ({"resampling_fn_data": "resample_torch_fornnunet"}, {}, "resample_torch_fornnunet"),
        ({"resampling_fn_probabilities_kwargs": SQUARED}, {}, "'order': 2"),
        ({"resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 1}}, {}, "'order_z': 1"),
        ({"normalization_schemes": ["HistogramNormalization"]}, {}, "HistogramNormalization"),
        ({"normalization_schemes": []}, {}, "tells 0 normalisations, expected one a channel, 1"),
        ({"preprocessor_name": "MyPreprocessor"}, {}, "preprocessor"),
        ({}, {"image_reader_writer": "Tiff3DIO"}, "Tiff3DIO"),
        (
            {"normalization_schemes": ["CTNormalization"]},
            {"foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}}},
            "lacks std",
        ),
        ({"spacing": [1e7, 1]}, {}, "spacing is [10000000.0, 1.0], expected: 2 lengths in mm"),
        ({"spacing": None}, {}, "not iterable"),
        ({"patch_size": [16, "x"]}, {}, "'x'"),
    ],
)
def test_what_no_bundle_holds_is_refused_by_name(tmp_path, capsys, configuration, plan, named):
    write_model(tmp_path / "model", dim=2, configuration=configuration, plan=plan)
    assert export(tmp_path / "model", tmp_path / "b.zip") == 2
    error = capsys.readouterr().err
    assert named in error and str(tmp_path / "model") in error
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("dataset", "named"),
    [
        ({"labels": {"background": 0, "low": 1, "high": 5}}, "labels is [1, 5], expected: the numbers 1, 2"),
        ({"file_ending": "nii.gz"}, "file_ending is 'nii.gz'"),
    ],
)
def test_what_no_runtime_would_take_is_refused_before_a_network_is_written(
    tmp_path, capsys, monkeypatch, dataset, named
):
    monkeypatch.setattr(command, "write_network", None)
    write_model(tmp_path / "model", dim=2, dataset=dataset)
    assert export(tmp_path / "model", tmp_path / "b.zip") == 2
    error = capsys.readouterr().err
    assert named in error and "Mend its plans.json and dataset.json" in error and "bundle anew" not in error


def test_a_network_of_another_kind_is_refused_by_name(tmp_path, capsys, monkeypatch):
    write_model(tmp_path / "model", dim=2)
    monkeypatch.setattr("nnunet_sauron.model.networks.NetworkBuilder.build", lambda self: torch.nn.Identity())
    assert export(tmp_path / "model", tmp_path / "b.zip") == 2
    assert "Identity" in capsys.readouterr().err


def test_an_error_before_any_work(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "card.json").write_text('{"name": "x", "author": "y"}')
    for words, said in (
        ((model, tmp_path / "there"), "exists"),
        ((model, tmp_path / "no/where.zip"), "is no folder"),
        ((model, tmp_path / "b.zip", "-f", 7), "has no fold 7; there are 0, 1"),
        ((model, tmp_path / "b.zip", "-chk", "checkpoint_best.pth"), "checkpoint_best.pth"),
        ((tmp_path / "there", tmp_path / "b.zip"), "plans.json"),
        ((model, tmp_path / "b.zip", "--card", tmp_path / "card.json"), "author: 'y'"),
        ((model, tmp_path / "b.zip", "--card", tmp_path / "none.json"), "There is no card"),
        ((model, tmp_path / "b.zip", "--precision", "int8"), "with -i"),
        ((model, tmp_path / "b.zip", "-i", tmp_path / "there"), "CASE_0000.nii.gz"),
    ):
        assert export(*words) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export(model, tmp_path / "b.zip") == 2
    assert "onnx" in (error := capsys.readouterr().err) and "pip install '.[deploy]'" in error
    assert {path.name for path in tmp_path.iterdir()} == {"there", "card.json"}


@pytest.mark.parametrize("output", ["b.zip", "b"])
def test_a_network_that_computes_something_else_leaves_nothing(model, tmp_path, capsys, monkeypatch, output):
    def broken(network, *rest):
        network.decoder.seg_layers[-1].weight.data *= 1.01
        written(network, *rest)

    written = command.write_network
    monkeypatch.setattr(command, "write_network", broken)
    assert export(model, tmp_path / output, "-f", 1) == 2
    assert "fold_1.onnx differ from PyTorch's" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["network", "zip", "int8"])
def test_a_full_disk_is_said_as_such_and_leaves_nothing(model, tmp_path, capsys, monkeypatch, what):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ()
    if what == "zip":
        monkeypatch.setattr(zipfile.ZipFile, "write", full)
    elif what == "int8":
        monkeypatch.setattr("onnxruntime.quantization.quantize_static", full)
        words = "--precision", "int8", "-i", model.parent / "images"
    with full_disk(3000) if what == "network" else contextlib.nullcontext():
        assert export(model, tmp_path / "b.zip", "-f", 0, *words) == 2
    error = capsys.readouterr().err
    said = "File too large" if what == "network" else "No space left"
    assert f"{tmp_path}/b.zip could not be written: " in error and said in error and "Make room" in error
    assert not list(tmp_path.iterdir())


def test_smaller_numbers_tell_how_they_agree_with_float32(model, tmp_path, capsys):
    images = model.parent / "images"
    (tmp_path / "card.json").write_text('{"name": "From a file", "authors": "A, B"}')
    assert export(model, tmp_path / "b.zip", "-f", 0, "--precision", "int8", "-i", images, "--json", "--card",
                  tmp_path / "card.json", "--name", "Given") == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    for engine in ("onnxruntime", "openvino"):
        assert told["agreement"][engine]["voxels"] == 3 * 3 * 24 * 20
        assert 0.5 < told["agreement"][engine]["dice"] < 1
        assert any(kind.startswith("real") for kind in told["differences"][engine])
        assert told["nnunet"][engine]["voxels"] == 3 * 24 * 20  # of one of the three images
        assert told["nnunet"][engine]["different"] <= 1
    found = described(tmp_path / "b.zip")
    assert found["precision"] == "int8"
    assert (found["card"]["name"], found["card"]["authors"]) == ("Given", "A, B")
    network = onnx.load_from_string(zipfile.ZipFile(tmp_path / "b.zip").read("fold_0.onnx"))
    made_by = {name: node.op_type for node in network.graph.node for name in node.output}
    sources = [made_by.get(node.input[1]) for node in network.graph.node if node.op_type == "Conv"]
    assert sources[0] == sources[-1] is None and set(sources[1:-1]) == {"DequantizeLinear"}


def test_an_nnunet_that_computes_something_else_is_said(model, tmp_path, capsys, monkeypatch):
    images = model.parent / "images"
    assert export(model, tmp_path / "a.zip", "-i", images) == 0
    said = capsys.readouterr().err
    assert re.search(r"nnU-Net's prediction of c\d and that of openvino: Dice [01]\.\d{4}, \d+ of 1440 voxels", said)
    assert "before you trust the bundle" not in said and "I am process" not in said
    (tmp_path / "of nnU-Net's names").mkdir()
    shutil.copy(images / "c0_0000.nii.gz", tmp_path / "of nnU-Net's names/dataset_0000.nii.gz")
    assert export(model, tmp_path / "c.zip", "-i", tmp_path / "of nnU-Net's names") == 0
    monkeypatch.setattr(DefaultPreprocessor, "_normalize", lambda self, data, *_: -data)
    assert export(model, tmp_path / "b.zip", "-i", images) == 0
    assert "more than rounding does: look at both before you trust the bundle" in capsys.readouterr().err


def test_float16_without_images_says_what_is_not_known(model, tmp_path, capsys):
    assert export(model, tmp_path / "b.zip", "-f", 0, "--precision", "float16") == 0
    assert "give images with -i" in capsys.readouterr().err
    assert described(tmp_path / "b.zip")["precision"] == "float16"
    assert len(Bundle(tmp_path / "b.zip", threads=1).networks) == 1


@pytest.mark.parametrize(("kind", "why"), [("nan", "infinite or not numbers"), ("4D", "it has 4 axes")])
def test_an_image_that_a_bundle_cannot_be_compared_on_is_named_before_any_work(tmp_path, capsys, kind, why):
    names = ("T1", "T2") if kind == "4D" else ("T1",)  # each a volume of one file
    write_model(tmp_path / "model", dim=2, dataset={"channel_names": dict(zip("01", names, strict=False))})
    array = phantom((3, 24, 20))
    array[0, 0, 0] = np.nan if kind == "nan" else 0
    file = write_image(tmp_path / "images/c_0000.nii.gz", array)
    if kind == "4D":
        SimpleITK.WriteImage(SimpleITK.JoinSeries([SimpleITK.ReadImage(str(file))] * 2), str(file))
    assert export(tmp_path / "model", tmp_path / "b.zip", "-i", file.parent, "--precision", "float16") == 2
    said = capsys.readouterr().err
    assert f"{file}: a bundle cannot be compared on it: " in said and why in said and "writing ONNX" not in said
    assert not (tmp_path / "b.zip").exists()


def test_an_image_that_cannot_be_read_is_named_before_any_work(model, tmp_path, capsys):
    shutil.copytree(model.parent / "images", tmp_path / "images")
    (tmp_path / "images/c1_0000.nii.gz").write_bytes(b"cut")
    assert export(model, tmp_path / "b.zip", "-i", tmp_path / "images") == 2
    assert "c1_0000.nii.gz" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [".bmp", ".tif"])
def test_pictures_other_than_png_are_refused(tmp_path, capsys, ending):
    reader = {"image_reader_writer": "NaturalImage2DIO"}
    write_model(tmp_path / "model", dim=2, plan=reader, dataset={"file_ending": ending})
    assert export(tmp_path / "model", tmp_path / "b.zip") == 2
    assert f"takes pictures in {ending} files; a bundle reads PNG alone" in capsys.readouterr().err
    write_model(tmp_path / "png", dim=2, plan=reader, dataset={"file_ending": ".png"})
    assert export(tmp_path / "png", tmp_path / "b.zip") == 0


def test_channels_are_named_by_their_numbers(tmp_path):
    write_model(tmp_path / "model", dim=2, dataset={"channel_names": {"1": "T2", "0": "T1"}})
    assert export(tmp_path / "model", tmp_path / "b.zip") == 0
    assert described(tmp_path / "b.zip")["channel_names"] == {"0": "T1", "1": "T2"}
