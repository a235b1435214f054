"""The report of small models whose validation folders are made by hand."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import SimpleITK
import torch
from rich.console import Console
from torch import nn

from nnunet_sauron.analysis.report.command import report
from nnunet_sauron.analysis.report.compare import make_report, short_names
from nnunet_sauron.analysis.report.contents import ModelReport, Report
from nnunet_sauron.analysis.report.data import as_json, mean_numbers, stage_channels, summary_frame
from nnunet_sauron.analysis.report.page import page
from nnunet_sauron.analysis.report.plots import pareto_front, pictures
from nnunet_sauron.analysis.report.table import COST, fold_rows, notes, print_report, rows, target_rows
from nnunet_sauron.cli import main
from nnunet_sauron.files import check_writable
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning.cost import count_parameters
from nnunet_sauron.pruning.timing import Timing

from ..compression.small_model import write_model

STOCK, SAURON = "nnUNetTrainer__nnUNetPlans__2d", "SauronTrainer__nnUNetPlans__2d"
CASES = 3


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))


def validate(model: Path, references: Path, fold: int, miss: int) -> None:
    """Validation as nnU-Net leaves it: cubes of 4 x 4 x 4, of which the prediction misses `miss` slices."""
    cases = []
    for case in range(CASES):
        reference = np.zeros((8, 8, 8), dtype=np.uint8)
        reference[2:6, 2:6, 2:6] = 1
        prediction = reference.copy()
        prediction[2 : 2 + miss + (miss > 0 and case == 2)] = 0
        name = f"fold_{fold}_case_{case}.nii.gz"
        save(references / name, reference)
        save(model / f"fold_{fold}" / "validation" / name, prediction)
        cases.append({"reference_file": str(references / name)})
    summary = model / f"fold_{fold}" / "validation" / "summary.json"
    summary.write_text(json.dumps({"metric_per_case": cases}))


def dice(missed: int) -> float:
    return 2 * (4 - missed) / (4 - missed + 4)


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """Two models of two folds; the second one is narrower in fold 1. Nobody changes them."""
    tmp_path = tmp_path_factory.mktemp("once")
    write_model(tmp_path / STOCK, folds=(0, 1))
    write_model(tmp_path / SAURON, folds=(0, 1))
    narrow = write_model(tmp_path / "narrow", folds=(1,), widths=(3, 4, 5)) / "fold_1" / "checkpoint_final.pth"
    for fold in (0, 1):
        validate(tmp_path / STOCK, tmp_path / "references", fold, miss=0)
        validate(tmp_path / SAURON, tmp_path / "references", fold, miss=1)
        for model in (STOCK, SAURON):
            path = tmp_path / model / f"fold_{fold}" / "checkpoint_final.pth"
            checkpoint = torch.load(path, weights_only=False)
            if model == SAURON and fold == 1:
                checkpoint["network_weights"] = torch.load(narrow, weights_only=False)["network_weights"]
            seconds = [10.0, 8.0, 4.0]
            checkpoint["logging"] = {
                "epoch_start_timestamps": [100.0 * epoch for epoch in range(3)],
                "epoch_end_timestamps": [100.0 * epoch + length for epoch, length in enumerate(seconds)],
            }
            checkpoint["trainer_name"] = model.split("__")[0]
            torch.save(checkpoint, path)
    shutil.rmtree(tmp_path / "narrow")
    return tmp_path


@pytest.fixture(scope="module")
def found(once) -> Report:
    return made(once)


@pytest.fixture
def folders(once, tmp_path) -> Path:
    """A copy to change; its validations name the original's references."""
    shutil.copytree(once, tmp_path / "copy")
    return tmp_path / "copy"


def made(folders: Path, **options) -> Report:
    return make_report([folders / STOCK, folders / SAURON], timing_seconds=0, **options)


def test_numbers_are_those_of_the_folders(found):
    stock, sauron = found.models
    assert found.problems == []
    assert found.baseline == stock.name == STOCK
    assert mean_numbers(stock)["dice"] == 1
    expected = [dice(1), dice(1), dice(2)]
    for fold in ("0", "1"):
        assert [score.mean("dice") for score in sauron.scores[fold]] == pytest.approx(expected)
    numbers = mean_numbers(sauron)
    assert numbers["dice"] == pytest.approx(sum(expected) / 3)
    assert numbers["absolute_volume_error"] == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    assert numbers["volume_error"] == pytest.approx(-(0.25 + 0.25 + 0.5) / 3)
    assert numbers["cases"] == 2 * CASES
    assert numbers["epoch_time_ratio"] == pytest.approx(0.5)  # the first epoch warms up and does not count
    assert sauron.folds["0"].cost == stock.folds["0"].cost == sauron.dense_cost
    assert sauron.folds["1"].cost.parameters < stock.folds["1"].cost.parameters
    assert numbers["parameters"] == np.mean([fold.cost.parameters for fold in sauron.folds.values()])


def test_differences_are_case_by_case_against_the_baseline(once, found):
    difference = found.models[1].differences["dice"]
    assert difference.mean == pytest.approx((2 * dice(1) + dice(2)) / 3 - 1)
    assert difference.cases == 2 * CASES
    assert difference.high < 0
    assert difference.p == pytest.approx(2 / 64)
    turned = made(once, baseline=once / SAURON).models[0].differences["dice"]
    assert turned.mean == pytest.approx(-difference.mean)


def test_empty_masks_are_counted_and_left_out_of_distances(folders):
    nothing = np.zeros((8, 8, 8), dtype=np.uint8)
    save(folders / SAURON / "fold_0" / "validation" / "fold_0_case_0.nii.gz", nothing)
    model = made(folders).models[1]
    assert mean_numbers(model)["empty_prediction"] == 1
    assert not math.isnan(mean_numbers(model)["hd95"])
    difference = model.differences["hd95"]
    assert (difference.cases, difference.left_out) == (2 * CASES - 1, 1)


def test_predictions_are_scored_in_place_of_validations(once, tmp_path):
    shutil.copytree(once / "references", tmp_path / "predicted", ignore=shutil.ignore_patterns("fold_1*"))
    found = made(once, predictions=[None, tmp_path / "predicted"], labels=once / "references")
    assert mean_numbers(found.models[1])["dice"] == 1
    assert found.models[1].differences["dice"].cases == CASES
    assert any("3 references" in problem for problem in found.problems)


def test_files_hold_the_same_numbers(once, tmp_path, capsys):
    report([once / STOCK, once / SAURON], tmp_path / "out", timing_seconds=0.01)
    written = {"report.json", "report.csv", "cases.csv", "report.txt", "report.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    lines = list(csv.DictReader((tmp_path / "out" / "report.csv").open()))
    cases = list(csv.DictReader((tmp_path / "out" / "cases.csv").open()))
    assert [line["fold"] for line in lines] == ["0", "1", "mean"] * 2
    assert float(lines[-1]["dice"]) == pytest.approx(data["models"][1]["mean"]["dice"])
    assert data["models"][1]["folds"]["1"]["widths"] != data["models"][0]["folds"]["1"]["widths"]
    assert data["models"][0]["folds"]["0"]["timing"]["cpu"]["repeats"] >= 3
    assert data["models"][0]["mean"]["dice: high"] is None  # no case has this class, and JSON knows no nan
    assert len(cases) == 2 * 2 * CASES * 2  # models, folds, classes
    printed = capsys.readouterr().out
    assert f"{data['models'][1]['mean']['dice']:.3f}" in printed
    assert "report.html" in printed


def test_json_is_all_that_is_printed_with_json(once, tmp_path, capfd):
    assert main(["report", str(once / STOCK), "-o", str(tmp_path / "out"), "--timing", "0", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["models"][0]["name"] == STOCK


@pytest.mark.parametrize("json_output", [[], ["--json"]])
def test_a_model_that_was_asked_for_and_left_out_is_in_the_exit_code_and_the_json(once, tmp_path, capsys, json_output):
    words = [str(once / STOCK), str(tmp_path / "gone"), "-o", str(tmp_path / "out"), "--timing", "0", *json_output]
    assert main(["report", *words]) == 1
    said = json.loads((tmp_path / "out" / "report.json").read_text())
    assert said["left_out"] == [str(tmp_path / "gone")] and "gone is not in the report" in said["problems"][0]
    if json_output:
        assert json.loads(capsys.readouterr().out) == said


def test_commands_in_problems_can_be_pasted(folders, tmp_path, capsys):
    # Narrower than the commands, which a terminal would otherwise break into lines.
    model = tmp_path / "a  folder" / STOCK
    shutil.copytree(folders / STOCK, model)
    shutil.rmtree(model / "fold_0" / "validation")
    for fold in (0, 1):
        (model / f"fold_{fold}" / "checkpoint_final.pth").rename(model / f"fold_{fold}" / "checkpoint_best.pth")
    words = [str(model), "-o", str(tmp_path / "out"), "--timing", "0", "-chk", "checkpoint_best.pth"]
    assert main(["report", *words]) == 0
    printed = capsys.readouterr().out
    predict = f"nnUNetv2_predict_from_modelfolder -m '{model}' -f 0 -i IN -o OUT -chk checkpoint_best.pth "
    go_on = "nnUNetv2_train Dataset001_Random 2d 0 -tr nnUNetTrainer -p nnUNetPlans --c --val_best "  # --val would fail
    for text in (printed, (tmp_path / "out" / "report.txt").read_text()):
        assert predict in text and go_on in text
    assert html.escape(predict) in (tmp_path / "out" / "report.html").read_text()


def test_what_is_missing_is_named_with_the_command_that_makes_it(folders):
    (folders / SAURON / "fold_1" / "validation" / "summary.json").unlink()
    found = made(folders)
    problem, unequal = found.problems
    assert "nnUNetv2_train Dataset001_Random 2d 1 -tr SauronTrainer -p nnUNetPlans --val" in problem
    assert "over different cases, 3 and 6" in unequal
    assert list(found.models[1].scores) == ["0"]


def test_a_folder_that_is_no_model_does_not_stop_the_rest(once):
    found = make_report([once / STOCK, once / "references"], timing_seconds=0)
    assert [model.name for model in found.models] == [STOCK]
    assert "has no plans.json" in found.problems[0]


def test_a_model_of_which_nothing_could_be_used_is_told_by_the_exit_code(tmp_path):
    model = write_model(tmp_path / "model")
    path = model / "fold_0/checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    torch.save({**checkpoint, "network_weights": {"other": torch.zeros(1)}}, path)
    assert main(["report", str(model), "-o", str(tmp_path / "out"), "--timing", "0"]) == 1


def test_a_baseline_that_cannot_be_read_is_replaced_and_said(once):
    found = make_report([once / "references", once / SAURON], timing_seconds=0, baseline=once / "references")
    assert found.baseline == SAURON
    assert "takes its place" in found.problems[-1]


def test_references_that_moved_are_asked_for(folders):
    summary = folders / SAURON / "fold_0" / "validation" / "summary.json"
    summary.write_text(json.dumps({"metric_per_case": [{"reference_file": "/no/such/folder/case.nii.gz"}]}))
    assert "give --labels" in made(folders).problems[0]
    assert made(folders, labels=folders / "references").problems == []


@pytest.mark.parametrize(
    "named", [r"C:\nn\gt_segmentations\case_0.nii.gz", "case_0.nii.gz", "{elsewhere}/case_0.nii.gz"]
)
def test_references_are_found_where_nnunet_preprocessed_has_them(folders, tmp_path, monkeypatch, named):
    """Validated on another system, or a folder that is there still and holds other cases now."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(folders / "references", tmp_path / "Dataset001_Random/gt_segmentations")
    monkeypatch.setattr("nnunet_sauron.analysis.report.scores.nnUNet_preprocessed", str(tmp_path))
    summary = folders / SAURON / "fold_0" / "validation" / "summary.json"
    file = named.replace("{elsewhere}", str(tmp_path / "elsewhere"))
    summary.write_text(json.dumps({"metric_per_case": [{"reference_file": file}]}))
    found = made(folders)
    assert found.problems == [] and found.models[1].scores["0"]


def test_a_validated_case_that_is_gone_is_named(folders):
    validation = folders / SAURON / "fold_0" / "validation"
    cases = [
        {"reference_file": str(folders / "references" / file.name), "prediction_file": f"C:\\val\\{file.name}"}
        for file in sorted(validation.glob("*.nii.gz"))
    ]
    (validation / "summary.json").write_text(json.dumps({"metric_per_case": cases}))
    assert made(folders).problems == []
    gone = sorted(validation.glob("*.nii.gz"))[0]
    gone.unlink()
    problem = made(folders).problems[0]
    assert f"fold 0: 1 of {len(cases)} validated cases have no segmentation" in problem
    assert gone.name in problem and "--val" in problem


def test_a_checkpoint_is_no_bundle(folders):
    checkpoint = folders / SAURON / "fold_0" / "checkpoint_final.pth"
    found = make_report([folders / STOCK, checkpoint], timing_seconds=0)
    assert f"{checkpoint} is a checkpoint; expected a model's folder or a bundle. Give {folders / SAURON}." in str(
        found.problems
    )


def test_other_cases_than_the_baselines_are_said(folders):
    shutil.rmtree(folders / STOCK / "fold_1")
    shutil.rmtree(folders / SAURON / "fold_0")
    assert "over the 0 in common" in made(folders).problems[-1]


def test_a_compressed_model_does_not_show_the_log_of_its_source(folders):
    path = folders / SAURON / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "compression": {}}, path)
    sauron = made(folders).models[1]
    assert sauron.folds["0"].epoch_seconds == []
    assert sauron.folds["1"].epoch_seconds == pytest.approx([10, 8, 4])


def test_a_model_that_was_compressed_with_images_of_scored_cases_is_told(folders):
    path = folders / SAURON / "fold_0" / "checkpoint_final.pth"
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (path.parent / "validation").glob("*.nii.gz"))
    fitted_on = {"compression": {"fitted_on": ["other", cases[1], cases[0]]}}
    torch.save({**torch.load(path, weights_only=False), **fitted_on}, path)
    (problem,) = made(folders).problems
    assert f"fold 0: compress fitted it on images called as 2 of the {CASES} cases that are scored" in problem
    assert f"({cases[0]}, {cases[1]})" in problem


def test_a_history_of_another_version_is_said_and_the_rest_reported(folders):
    path = folders / SAURON / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["logging"]["pruning"] = [{"channels": {}}]
    torch.save(checkpoint, path)
    found = made(folders)
    assert "pip install -U nnunet-sauron" in found.problems[0]
    assert mean_numbers(found.models[1])["cases"] == 2 * CASES
    assert page(found)


def test_a_class_that_the_model_missed_does_not_better_its_distance(tmp_path, once):
    """Where the baseline has both classes, far off in the second one, and the model leaves the second one out."""
    folders = []
    for name, second in (("baseline", 2), ("model", 0)):
        folders.append(write_model(tmp_path / name))
        cases = []
        for case in range(3):
            reference = np.zeros((12, 12, 12), dtype=np.uint8)
            reference[1:4, 1:4, 1:4], reference[8:11, 8:11, 8:11] = 1, 2
            prediction = np.where(reference == 1, 1, 0).astype(np.uint8)
            if second:
                prediction[8 - second : 11 - second, 8:11, 8:11] = 2
            save(tmp_path / "references" / f"case_{case}.nii.gz", reference)
            save(tmp_path / name / "fold_0" / "validation" / f"case_{case}.nii.gz", prediction)
            cases.append({"reference_file": str(tmp_path / "references" / f"case_{case}.nii.gz")})
        summary = tmp_path / name / "fold_0" / "validation" / "summary.json"
        summary.write_text(json.dumps({"metric_per_case": cases}))
    baseline, model = make_report(folders, timing_seconds=0).models
    assert mean_numbers(model)["hd95"] < mean_numbers(baseline)["hd95"]  # the trap: it is over other pairs
    assert mean_numbers(model)["empty_prediction: high"] == 3
    assert model.differences["hd95"].mean == 0
    assert model.differences["dice"].mean < 0


def test_models_of_other_classes_are_compared_in_none_of_them(folders):
    path = folders / SAURON / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": {"background": 0, "low": 2, "other": 1}}))
    for path in [*folders.rglob("validation/*.nii.gz"), *(folders / "references").glob("*.nii.gz")]:
        array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))
        array[0, 0] = 2  # so that both values are defined everywhere
        save(path, array)
    found = made(folders, labels=folders / "references")
    assert "low, other are not the same classes" in found.problems[-1]
    assert found.models[1].differences["dice"].cases == 0


def test_a_fold_that_cannot_be_read_does_not_take_the_others_along(folders):
    (folders / SAURON / "fold_1" / "checkpoint_final.pth").write_bytes(b"cut short")
    found = made(folders)
    assert list(found.models[1].folds) == ["0"]
    assert "cannot be read" in found.problems[0]
    assert "nnUNetv2_train Dataset001_Random 2d 1 -tr SauronTrainer -p nnUNetPlans --c" in found.problems[1]


def test_a_case_that_cannot_be_read_does_not_take_the_others_along(folders):
    (folders / SAURON / "fold_1" / "validation" / "fold_1_case_0.nii.gz").write_bytes(b"cut short")
    found = made(folders)
    assert [len(scores) for scores in found.models[1].scores.values()] == [3, 2]
    assert "a case is left out" in found.problems[0]


def test_a_network_that_nobody_here_can_build_is_scored_all_the_same(folders):
    path = folders / SAURON / "plans.json"
    path.write_text(path.read_text().replace("unet.PlainConvUNet", "unet.SomebodyElsesUNet"))
    found = made(folders)
    assert found.models[1].folds == {}
    assert mean_numbers(found.models[1])["cases"] == 2 * CASES
    assert "SomebodyElsesUNet" in " ".join(found.problems)
    assert page(found)


class Somebodys(nn.Module):
    """A network whose first parameter is no convolution's, and which may want numbers where the cost is counted."""

    def __init__(self, wants_numbers: bool):
        super().__init__()
        self.scale, self.conv, self.wants_numbers = nn.Parameter(torch.ones(1)), nn.Conv2d(1, 3, 1), wants_numbers

    def forward(self, x):
        return self.conv(x) * (self.scale.item() if self.wants_numbers else self.scale)


@pytest.mark.parametrize("wants_numbers", [False, True])
def test_a_network_whose_cost_cannot_be_counted_is_not_timed_and_ends_nothing(folders, monkeypatch, wants_numbers):
    theirs, network = folders / SAURON, TrainedModel.network
    monkeypatch.setattr(
        TrainedModel,
        "network",
        lambda model, fold: Somebodys(wants_numbers) if model.folder == theirs else network(model, fold),
    )
    stock, sauron = make_report([folders / STOCK, theirs], timing_seconds=0.01).models
    assert all("cpu" in fold.timing for fold in (*stock.folds.values(), *sauron.folds.values()))
    assert list(sauron.folds) == ([] if wants_numbers else ["0", "1"])


def test_a_checkpoint_without_a_log_is_measured_all_the_same(folders):
    path = folders / STOCK / "fold_0/checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "logging": None}, path)
    found = make_report([folders / STOCK], timing_seconds=0.01)
    problems = [problem for problem in found.problems if "this machine was busy" not in problem]
    assert problems == [] and found.models[0].folds["0"].epoch_seconds == []


def test_patches_of_other_sizes_have_no_ratios_of_what_a_patch_costs(folders):
    path = folders / SAURON / "plans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["2d"]["patch_size"] = [64, 64]
    path.write_text(json.dumps(plans))
    found = made(folders)
    assert "their patches differ" in found.problems[-1]
    cells = dict(rows(found, COST))
    assert "x)" in cells["parameters"][1]
    assert "x)" not in cells["MACs of a patch"][1]


def test_costs_of_another_checkpoint_than_the_validated_one_are_said(folders):
    for model in (STOCK, SAURON):
        for fold in (0, 1):
            shutil.copy(
                folders / model / f"fold_{fold}" / "checkpoint_final.pth",
                folders / model / f"fold_{fold}" / "checkpoint_best.pth",
            )
    assert "its costs are of checkpoint_best.pth" in made(folders, checkpoint="checkpoint_best.pth").problems[0]


def test_timing_that_fails_leaves_the_rest(folders, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("nnunet_sauron.analysis.report.measure.time_networks", out_of_memory)
    found = make_report([folders / STOCK], timing_seconds=1)
    assert "out of memory" in found.problems[0]
    assert mean_numbers(found.models[0])["dice"] == 1


@pytest.mark.parametrize(("upper", "said"), [(1.2, False), (1.4, True)])
def test_times_of_a_busy_machine_are_said_to_be_so(once, monkeypatch, upper, said):
    scattered = Timing(1.0, 1.0, upper, 3, 1, "cpu")
    monkeypatch.setattr(
        "nnunet_sauron.analysis.report.measure.time_networks",
        lambda networks, *_, **options: dict.fromkeys(networks, scattered),
    )
    assert ("busy" in " ".join(make_report([once / STOCK], timing_seconds=1).problems)) == said


def test_equal_networks_are_timed_once(once, monkeypatch):
    timed = []

    def note(networks, shapes, **options):
        assert networks.keys() == shapes.keys()
        timed.extend(count_parameters(network) for network in networks.values())
        return dict.fromkeys(networks, Timing(1.0, 1.0, 1.0, 3, 1, "cpu"))

    monkeypatch.setattr("nnunet_sauron.analysis.report.measure.time_networks", note)
    found = make_report([once / STOCK, once / SAURON], timing_seconds=1)
    assert timed == [found.models[0].folds["0"].cost.parameters, found.models[1].folds["1"].cost.parameters]
    assert all(fold.timing["cpu"].median == 1 for model in found.models for fold in model.folds.values())


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(once, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "nnunet_sauron.analysis.report.command.make_report", lambda *args, **options: pytest.fail("measured")
    )
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        report([once / STOCK], tmp_path / "file" / "report")


def test_large_numbers_keep_to_three_digits():
    show = {row.key: row.show for row in COST}
    assert show["flops"](1.06e12) == "1.06 T"
    assert show["macs"](999.6e6) == "1 G"
    assert show["seconds_cpu"](12.34) == "12.3 s"
    assert show["seconds_cpu"](0.01234) == "12.3 ms"


def test_stages_are_sums_of_their_layers():
    widths = {"encoder.stages.0.0.convs.0": 4, "encoder.stages.0.0.convs.1": 5, "decoder.transpconvs.0": 6,
              "decoder.stages.0.convs.0": 7, "encoder.stem.convs.0": 8}  # fmt: skip
    assert stage_channels(widths) == {"encoder.stages.0": 9, "decoder.stages.0": 13, "encoder": 8}


def test_nothing_to_report_is_an_error(tmp_path, capsys):
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "has no plans.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictions": [Path("p")], "labels": Path("l")}, "for each of the 2 models"),
        ({"predictions": [Path("p"), Path("q")]}, "no --labels"),
        ({"baseline": Path("other")}, "--baseline other is none of the models"),
        ({"tolerance_mm": -1}, "-1 mm"),
        ({"tolerance_mm": math.nan}, "nan mm"),
        ({"timing_seconds": math.inf}, "inf s"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_any_work(once, options, message):
    with pytest.raises(ValueError, match=message):
        make_report([once / STOCK, once / SAURON], **options)


def test_names_are_as_short_as_they_can_be():
    assert short_names([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert short_names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="given twice"):
        short_names([Path("/a/x"), Path("/a/x")])


def test_pareto_front_holds_what_nothing_beats():
    points = [(4, 0.9), (2, 0.8), (3, 0.7), (2, 0.6), (1, 0.5), (4, 0.9)]
    assert pareto_front(points) == [4, 1, 0, 5]


def test_the_page_is_one_file_that_fetches_nothing(found):
    text = page(found)
    fetched = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert all(address.startswith(("#", "data:")) for address in fetched)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in fetched if address.startswith("#")} <= set(ids)
    assert text.count("<figure>") == len(list(pictures(found))) == 4


class OpenTags(HTMLParser):
    """Which tags are open, and which closed another one than the last."""

    VOID = ("meta", "link", "br", "hr", "img", "input", "col", "!doctype")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.crossed = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        if tag not in self.VOID:
            self.open.append(tag)
        if len(names) > len(set(names)):
            self.crossed.append((tag, names))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            self.crossed.append((tag, self.getpos()))


def test_a_parser_reads_the_page_without_a_complaint(found):
    text = page(replace(found, models=[found.models[0], with_history(found.models[1])]))
    tags = OpenTags(text)
    assert (tags.open, tags.crossed) == ([], [])
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == text.count("<figure>")
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_names_from_outside_are_escaped(folders):
    name = 'x"><script>alert(1)<'
    shutil.copytree(folders / SAURON, folders / name)
    found = make_report([folders / STOCK, folders / name], timing_seconds=0)
    text = page(replace(found, models=[found.models[0], with_history(found.models[1])]))
    assert text.count("<details>") == 2  # all of it was written
    assert "<script>" not in text


def with_history(model: ModelReport) -> ModelReport:
    """With three epochs in which every layer loses a channel."""
    names = model.dense_widths
    history = [
        {"widths": {n: w - epoch for n, w in names.items()}, "state": {"tau": dict.fromkeys(names, 0.1 * epoch)}}
        for epoch in range(3)
    ]
    return replace(model, folds={"0": replace(model.folds["0"], history=history)})


def test_a_pruning_history_is_drawn_and_stands_in_the_data(found):
    stock, sauron = found.models
    pruned = replace(found, models=[stock, with_history(sauron)])
    drawn = [one.title for one in pictures(pruned)]
    assert drawn[-2:] == [f"{what} over the epochs: {SAURON.replace('__', ' ')}" for what in ("Channels", "Thresholds")]
    fold = as_json(pruned)["models"][1]["folds"]["0"]
    assert [sum(widths.values()) for widths in fold["widths_by_epoch"]] == [
        sum(sauron.dense_widths.values()) - epoch * len(sauron.dense_widths) for epoch in range(3)
    ]
    assert len(fold["tau_by_epoch"]) == 3


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")  # GitHub's machines have the second


@pytest.mark.skipif(not BROWSER, reason="no chromium here to open the page with")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_opens_the_page_without_a_complaint(found, tmp_path, theme):
    (tmp_path / "report.html").write_text(page(found), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    flags += ["--enable-logging=stderr", f"--blink-settings=preferredColorScheme={int(theme == 'light')}"]
    url = (tmp_path / "report.html").as_uri()
    opened = subprocess.run([BROWSER, *flags, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    assert opened.returncode == 0
    assert "Dice against cost" in opened.stdout
    assert "CONSOLE" not in opened.stderr


def with_targets(folders: Path, found: Report, targets: list[dict | None]) -> Report:
    """The second model's folds with such a target in the newest epoch of their pruning history."""
    for fold, target in zip(("0", "1"), targets, strict=True):
        path = folders / SAURON / f"fold_{fold}" / "checkpoint_final.pth"
        checkpoint = torch.load(path, weights_only=False)
        epoch = {"widths": found.models[1].folds[fold].widths, "state": {}, "parameters": 1, "macs": 1}
        checkpoint["logging"]["pruning"] = [epoch, epoch, {**epoch, "target": target} if target else epoch]
        torch.save(checkpoint, path)
    return made(folders)


REACHED = {"name": "target_macs", "value": 0.5, "asked": 0.5, "left": 0.48, "reached": True, "why": None}
MISSED = {**REACHED, "left": 0.7, "reached": False, "why": "k=2 in 4 steps is too little"}


def test_what_became_of_a_target_is_in_tables_page_and_data(folders, found):
    report = with_targets(folders, found, [REACHED, MISSED])
    assert target_rows(report) == [
        ("target", ["-", "fold 0: target_macs=0.5 reached, 0.48 left; fold 1: target_macs=0.5 missed, 0.7 left"])
    ]
    why = f"{SAURON}, fold 1: target_macs=0.5 missed, 0.7 left: k=2 in 4 steps is too little."
    assert report.problems == [why]
    console = Console(record=True, width=400, file=io.StringIO())
    print_report(report, console)
    for text in (console.export_text(), html.unescape(page(report))):
        assert "reached, 0.48 left; fold 1: target_macs=0.5 missed, 0.7 left" in text and why in text
    assert ("target", ["-", "target_macs=0.5 reached, 0.48 left", "target_macs=0.5 missed, 0.7 left"]) in fold_rows(
        report.models[1]
    )[1]
    _, sauron = as_json(report)["models"]
    assert [fold["target"] for fold in sauron["folds"].values()] == [REACHED, MISSED]
    row = summary_frame(report).set_index(["model", "fold"]).loc[SAURON, "1"]
    assert (row["target_asked"], row["target_left"]) == (0.5, 0.7)


def test_folds_that_agree_are_one_and_no_target_is_no_row(folders, found):
    other = {**REACHED, "left": 0.5}
    report = with_targets(folders, found, [REACHED, other])
    assert target_rows(report) == [("target", ["-", "target_macs=0.5 reached, 0.49 left"])]
    assert report.problems == []
    assert target_rows(found) == []


def test_a_target_of_an_older_training_is_judged_by_its_numbers(folders, found):
    old = {key: MISSED[key] for key in ("name", "asked", "left")}
    report = with_targets(folders, found, [None, old])
    assert target_rows(report) == [("target", ["-", "target_macs=0.5 missed, 0.7 left"])]
    going_on = {**MISSED, "reached": None, "why": "cuts go on until epoch 7"}
    report = with_targets(folders, found, [None, going_on])
    assert report.problems[0].endswith("not reached yet, 0.7 left: cuts go on until epoch 7.")


@pytest.mark.parametrize("missing", ["predictions", "labels"])
def test_a_folder_of_segmentations_that_is_not_there_is_refused_before_any_work(once, tmp_path, missing):
    folders = {"predictions": [tmp_path], "labels": tmp_path}
    folders[missing] = [tmp_path / "none"] if missing == "predictions" else tmp_path / "none"
    with pytest.raises(FileNotFoundError, match=rf"--{missing} .*none is no folder"):
        make_report([once / STOCK], **folders)


def test_fold_all_has_no_say_in_differences_beside_others(folders):
    """It was trained on the very cases that it is validated on."""
    alone = made(folders).model(SAURON).differences["dice"]
    shutil.copytree(folders / SAURON / "fold_0", folders / SAURON / "fold_all")
    for path in (folders / SAURON / "fold_all" / "validation").glob("*.nii.gz"):
        shutil.copy(folders / STOCK / "fold_0" / "validation" / path.name, path)  # better than fold 0
    found = made(folders).model(SAURON)
    assert found.scores["all"][0].mean("dice") > found.scores["0"][0].mean("dice")
    assert found.differences["dice"] == alone and alone.mean < 0


def test_a_case_that_two_folds_validate_counts_twice(folders):
    """As with splits of one's own, whose validation sets overlap."""
    for model in (STOCK, SAURON):
        first, second = (folders / model / f"fold_{fold}" / "validation" for fold in (0, 1))
        shutil.copytree(first, second, dirs_exist_ok=True)
    perfect, one = (folders / model / "fold_1" / "validation" / "fold_0_case_0.nii.gz" for model in (STOCK, SAURON))
    shutil.copy(perfect, one)
    found = made(folders).model(SAURON)
    again = {name: score.mean("dice") for name, score in found.cases.items() if "case_0" in name}
    assert again["fold_0_case_0, fold 0"] == pytest.approx(dice(1)) and again["fold_0_case_0, fold 1"] == 1
    assert found.differences["dice"].cases == len(found.cases) == mean_numbers(found)["cases"]


def test_each_devices_times_have_a_note_of_their_own(found):
    def timed(model: ModelReport) -> ModelReport:
        times = {"cpu": Timing(1.0, 1.0, 1.0, 4, 2, "cpu"), "cuda": Timing(0.1, 0.1, 0.1, 30, 2, "cuda")}
        return replace(model, folds={fold: replace(one, timing=times) for fold, one in model.folds.items()})

    said = [note for note in notes(replace(found, models=list(map(timed, found.models)))) if "forward passes" in note]
    assert len(said) == 2
    assert "CPU threads, float32: median of 4 " in said[0] and "GPU, autocast" in said[1] and " of 30 " in said[1]


def test_fold_all_keeps_its_cost_beside_a_folder_of_predictions(once, tmp_path):
    folder = write_model(tmp_path / "model", folds=("all",))
    found = make_report([folder], predictions=[once / "references"], labels=once / "references", timing_seconds=0)
    numbers = mean_numbers(found.models[0])
    assert numbers["dice"] == 1 and numbers["macs"] == found.models[0].folds["all"].cost.macs


def test_predictions_that_are_none_are_named_and_in_the_exit_code(once, tmp_path, capsys):
    (tmp_path / "predictions").mkdir()
    words = ["--predictions", str(tmp_path / "predictions"), "--labels", str(once / "references"), "--json"]
    assert main(["report", str(once / STOCK), "-o", str(tmp_path / "out"), "--timing", "0", *words]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert any(f"{tmp_path / 'predictions'} holds no segmentations (*.nii.gz)" in problem for problem in problems)


def test_references_without_a_prediction_are_counted_though_others_have_none_either(once, tmp_path):
    shutil.copytree(once / "references", tmp_path / "references")
    shutil.copytree(once / "references", tmp_path / "predictions")
    first, second, *_ = sorted(path.name for path in (tmp_path / "references").iterdir())
    (tmp_path / "references" / first).unlink()
    (tmp_path / "predictions" / second).unlink()
    found = make_report([once / STOCK], predictions=[tmp_path / "predictions"], labels=tmp_path / "references",
                        timing_seconds=0)  # fmt: skip
    said = " ".join(found.problems)
    assert f"Case {first} has no reference" in said and "1 references in" in said


@pytest.mark.parametrize("verb", ["report", "feature_maps", "clusterability"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, monkeypatch, verb):
    monkeypatch.setenv("nnunet_sauron_debug", "0")
    monkeypatch.setattr("nnunet_sauron.model.trained.TrainedModel.read", lambda *_, **__: pytest.fail("read"))
    (tmp_path / "file").touch()
    model = {"report": ["m"], "feature_maps": ["-m", "m", "-i", "i"], "clusterability": ["-m", "m"]}[verb]
    assert main([verb, *model, "-o", str(tmp_path / "file" / "out")]) == 2
    assert f"{tmp_path / 'file' / 'out'} cannot be written" in capsys.readouterr().err


def test_checking_a_place_makes_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_link_to_what_is_not_there_yet_is_written_through(once, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "later")
    report([once / STOCK], tmp_path / "link", timing_seconds=0)
    assert (tmp_path / "later" / "report.html").is_file() and (tmp_path / "link").is_symlink()
