"""The report of small models whose validation folders are made by hand."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from nnunet_sauron.analysis.report import Report, make_report, short_names
from nnunet_sauron.analysis.report_command import report
from nnunet_sauron.analysis.report_data import mean_numbers
from nnunet_sauron.analysis.report_html import page, write_html
from nnunet_sauron.analysis.report_plots import pareto_front, pictures
from nnunet_sauron.cli import main

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
    assert numbers["epoch_time_ratio"] == pytest.approx(0.4)
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
    written = report([once / STOCK, once / SAURON], tmp_path / "out", timing_seconds=0.01)
    assert [path.name for path in written] == ["report.html", "report.txt", "report.json", "report.csv", "cases.csv"]
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


def test_json_is_all_that_is_printed_with_json(once, tmp_path, capsys):
    assert main(["report", str(once / STOCK), "-o", str(tmp_path / "out"), "--timing", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["name"] == STOCK


def test_what_is_missing_is_named_with_the_command_that_makes_it(folders):
    (folders / SAURON / "fold_1" / "validation" / "summary.json").unlink()
    found = made(folders)
    (problem,) = found.problems
    assert "nnUNetv2_train DATASET 2d 1 -tr SauronTrainer -p nnUNetPlans --val" in problem
    assert list(found.models[1].scores) == ["0"]


def test_a_folder_that_is_no_model_does_not_stop_the_rest(once):
    found = make_report([once / STOCK, once / "references"], timing_seconds=0)
    assert [model.name for model in found.models] == [STOCK]
    assert "has no plans.json" in found.problems[0]


def test_a_baseline_that_cannot_be_read_is_replaced_and_said(once):
    found = make_report([once / "references", once / SAURON], timing_seconds=0, baseline=once / "references")
    assert found.baseline == SAURON
    assert "takes its place" in found.problems[-1]


def test_references_that_moved_are_asked_for(folders):
    summary = folders / SAURON / "fold_0" / "validation" / "summary.json"
    summary.write_text(json.dumps({"metric_per_case": [{"reference_file": "/no/such/folder/case.nii.gz"}]}))
    assert "give --labels" in made(folders).problems[0]
    assert made(folders, labels=folders / "references").problems == []


def test_other_cases_than_the_baselines_are_said(folders):
    shutil.rmtree(folders / STOCK / "fold_1")
    shutil.rmtree(folders / SAURON / "fold_0")
    assert "no scored case in common" in made(folders).problems[-1]


def test_a_compressed_model_does_not_show_the_log_of_its_source(folders):
    path = folders / SAURON / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "compression": {}}, path)
    sauron = made(folders).models[1]
    assert sauron.folds["0"].epoch_seconds == []
    assert sauron.folds["1"].epoch_seconds == pytest.approx([10, 8, 4])


def test_a_history_of_another_version_is_said_and_the_rest_reported(folders):
    path = folders / SAURON / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["logging"]["pruning"] = [{"channels": {}}]
    torch.save(checkpoint, path)
    found = made(folders)
    assert "pip install -U nnunet-sauron" in found.problems[0]
    assert mean_numbers(found.models[1])["cases"] == 2 * CASES
    assert page(found)


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
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_any_work(once, options, message):
    with pytest.raises(ValueError, match=message):
        made(once, **options)


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


def test_names_from_outside_are_escaped(folders):
    shutil.copytree(folders / SAURON, folders / "<script>alert(1)")
    text = page(make_report([folders / STOCK, folders / "<script>alert(1)"], timing_seconds=0))
    assert "<script>" not in text


def test_a_pruning_history_is_drawn(found):
    stock, sauron = found.models
    names = sauron.dense_widths
    history = [
        {"widths": {n: w - epoch for n, w in names.items()}, "state": {"tau": dict.fromkeys(names, 0.1 * epoch)}}
        for epoch in range(3)
    ]
    folds = {"0": replace(sauron.folds["0"], history=history)}
    drawn = [one.title for one in pictures(replace(found, models=[stock, replace(sauron, folds=folds)]))]
    assert drawn[-2:] == [f"{what} over the epochs: {SAURON.replace('__', ' ')}" for what in ("Channels", "Thresholds")]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here to open the page with")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_opens_the_page_without_a_complaint(found, tmp_path, theme):
    write_html(found, tmp_path / "report.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    flags += ["--enable-logging=stderr", f"--blink-settings=preferredColorScheme={int(theme == 'light')}"]
    url = (tmp_path / "report.html").as_uri()
    opened = subprocess.run(["chromium", *flags, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    assert opened.returncode == 0
    assert "Dice against cost" in opened.stdout
    assert "CONSOLE" not in opened.stderr
