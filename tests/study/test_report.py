"""The study's table and pictures, of results as the runner writes them and of logs as nnU-Net keeps them."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from ..compression.small_model import write_images
from ..compression.small_model import write_model as write_trained_model
from .conftest import STUDY  # noqa: F401

import criterion  # isort: skip
import figures  # isort: skip
import report  # isort: skip


def write_results(
    folder, name: str, fold: int, dice: float, macs: int, epochs: int, start: str | None = None, **more
) -> None:
    one = {
        "run": name, "fold": fold, "dice": dice, "hd95_mm": 2 - dice, "macs": macs, "parameters": macs // 2,
        "epoch_seconds": [60.0] * epochs, "start": start, "machine": {"gpu": None}, **more,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{name}_fold{fold}.json").write_text(json.dumps(one))


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "study"
    for fold, dice in ((0, 0.84), (1, 0.86)):
        write_results(folder, "stock", fold, dice, 1000, 50)
    write_results(folder, "compressed-10", 1, 0.85, 100, 20, start="stock")
    write_results(folder, "lunet-16", 0, 0.80, 90, 50)
    write_results(folder, "lunet-16-teacher", 0, 0.81, 80, 50, teacher="stock")
    return folder


def test_differences_are_to_stocks_same_folds(results):
    rows = {row["run"]: row for row in report.rows(report.read(results))}
    assert rows["compressed-10"]["dice_difference"] == pytest.approx(-0.01)
    assert rows["compressed-10"]["hd95_mm_difference"] == pytest.approx(0.01)
    assert rows["compressed-10"]["macs"] == pytest.approx(0.1)
    assert rows["stock"]["dice"] == [0.84, 0.86] and rows["stock"]["dice_difference"] == 0
    assert list(rows) == ["stock", "compressed-10", "lunet-16", "lunet-16-teacher"]  # the largest first


def test_a_second_training_of_a_fold_counts_in_its_mean(results):
    for fold, dice in ((0, 0.80), (1, 0.86)):
        write_results(results, "shrink", fold, dice, 100, 50)
    for name, dice in (("stock_fold1", 0.90), ("shrink_fold0", 0.82)):
        again = json.loads((results / f"{name}.json").read_text()) | {"dice": dice}
        (results / f"{name}_again.json").write_text(json.dumps(again))
    rows = {row["run"]: row for row in report.rows(report.read(results))}
    assert rows["compressed-10"]["dice_difference"] == pytest.approx(0.85 - 0.88)
    assert rows["stock"]["dice_differences"] == pytest.approx([0, -0.02, 0.02])
    assert rows["shrink"]["dice_difference"] == pytest.approx((0.81 - 0.84 + 0.86 - 0.88) / 2)  # folds alike


def test_what_starts_from_a_model_is_told_with_that_models_length(results):
    rows = {row["run"]: row for row in report.rows(report.read(results))}
    assert rows["compressed-10"]["epochs"] == [50, 20] and rows["compressed-10"]["minutes"] == [50, 20]
    assert rows["lunet-16"]["minutes"] == [50] and rows["lunet-16-teacher"]["minutes"] == [50, 50]


def test_a_gpus_minutes_are_left_out(results, capsys):
    write_results(results, "stock", 1, 0.86, 1000, 7, machine={"gpu": "H100"})
    write_results(results, "lunet-16", 0, 0.80, 90, 7, machine={"gpu": "H100"})
    rows = {row["run"]: row for row in report.rows(report.read(results))}
    assert rows["stock"]["minutes"] == [50] and rows["lunet-16"]["minutes"] == []
    report.write(results)
    assert "| 7 | - | 0 |" in capsys.readouterr().out


def test_the_report_names_what_is_missing(results, capsys):
    report.write(results, [("stock", 2), ("tucker-10", 0), ("tucker-10", 1)])
    written = (results / "table.md").read_text()
    assert "Not there yet: stock (fold 2); tucker-10 (fold 0, 1)." in written
    row = "| compressed-10 | 10.0% | 10.0% | 0.850 | -0.010 | - | 1.15 | +0.01 | 50 + 20 | 50 + 20 | 1 |"
    assert row in written and row in capsys.readouterr().out
    assert (results / "front.png").stat().st_size > 1000


@pytest.mark.parametrize("missing_stock", [True, False])
def test_without_stock_or_without_anything_there_is_a_report_all_the_same(tmp_path, missing_stock):
    folder = tmp_path / "study"
    if missing_stock:
        write_results(folder, "lunet-16", 0, 0.80, 90, 50)
    report.write(folder, [("stock", 0)])
    text = (folder / "table.md").read_text()
    assert "Not there yet: stock (fold 0)." in text and ("| lunet-16 | - | - | 0.800 | - |" in text) == missing_stock


def test_channels_are_counted_level_by_level():
    widths = {
        "encoder.stem.convs.0": 1, "encoder.stages.0.0.convs.0": 2, "encoder.stages.1.0.convs.0": 4,
        "encoder.stages.2.0.convs.0": 8, "decoder.transpconvs.0": 16, "decoder.stages.0.convs.0": 32,
        "decoder.stages.1.convs.0": 64,
    }  # fmt: skip
    assert figures.channels_of_levels(widths) == {
        ("encoder", 0): 3, ("encoder", 1): 4, ("encoder", 2): 8, ("decoder", 1): 48, ("decoder", 0): 64,
    }  # fmt: skip
    assert list(figures.layers_of_levels(widths)) == [
        ("encoder", 0), ("encoder", 1), ("encoder", 2), ("decoder", 1), ("decoder", 0)
    ]  # fmt: skip


def write_model(folder, seconds: list[float], widths: list[int]):
    starts = [100.0 * i for i in range(len(seconds))]
    log = {"epoch_start_timestamps": starts}
    log["epoch_end_timestamps"] = [start + one for start, one in zip(starts, seconds, strict=True)]
    if widths:
        names = "encoder.stages.0.0.convs.0", "encoder.stages.1.0.convs.0", "decoder.stages.0.convs.0"
        log["pruning"] = [{"widths": dict.fromkeys(names, width)} for width in widths]
    (folder / "fold_0").mkdir(parents=True)
    torch.save({"network_weights": {}, "logging": log}, folder / "fold_0" / "checkpoint_latest.pth")
    return folder


def test_pictures_are_drawn_of_trainings_with_and_without_cuts(tmp_path, monkeypatch):
    lines = {}

    def remember(figure, path, **_):
        lines[path.name] = [
            (line.get_label(), list(line.get_ydata())) for axes in figure.axes for line in axes.get_lines()
        ]

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", remember)
    pruned = write_model(tmp_path / "sauron-10" / "Dataset1_A" / "SauronTrainer__P__2d", [2, 400, 1], [8, 8, 4])
    stock = write_model(tmp_path / "Stock", [3, 3], [])
    other = write_model(tmp_path / "other" / "Stock", [1, 2], [])
    models = map(str, (pruned, stock, other))
    monkeypatch.setattr(sys, "argv", ["figures.py", *models, "-o", str(tmp_path / "out")])
    figures.main()
    times = dict(lines["epoch_time.png"])
    assert times["sauron-10 (first: 2.0 s)"] == [1, figures.BEYOND, 0.5]  # a pause does not flatten all other epochs
    assert times["Stock (first: 3.0 s)"] == [1, 1] and times[f"{other} (first: 1.0 s)"] == [1, 2]
    assert dict(lines["levels.png"])["encoder, level 1 (8)"] == [1, 1, 0.5]


def test_the_interval_is_of_the_cases_of_all_folds(results):
    """Differences of -0.02 and -0.04 in every case of folds 0 and 1: their mean is nowhere near 0."""
    for fold, loss in ((0, 0.02), (1, 0.04)):
        dice = {f"c{i}": 0.7 + 0.01 * i for i in range(20)}
        write_results(results, "stock", fold, 0.8, 1000, 50, case_dice=dice)
        lost = {case: value - loss for case, value in dice.items()}
        write_results(results, "shrink", fold, 0.8 - loss, 100, 50, case_dice=lost)
    write_results(results, "l1", 0, 0.7, 100, 50, case_dice={"c0": 0.7})
    write_results(results, "l1", 1, 0.7, 100, 50)
    rows = {row["run"]: row["interval"] for row in report.rows(report.read(results))}
    low, high = rows["shrink"]
    assert -0.035 < low < -0.03 < high < -0.025
    assert rows["stock"] is None and rows["l1"] is None and rows["lunet-16"] is None


def test_a_model_without_the_fold_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figures.py", str(tmp_path), "-f", "3", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        figures.main()
    assert "fold_3 has no checkpoint" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_stamps_criterion_is_lower_where_a_layer_is_wider(tmp_path, monkeypatch, capsys):
    model = write_trained_model(tmp_path / "model", widths=(8, 16, 32))
    images = write_images(tmp_path / "images")
    picture = tmp_path / "criterion.png"
    monkeypatch.setattr(sys, "argv", ["criterion.py", str(model), "-i", str(images), "-o", str(picture)])
    criterion.main()
    before, after = capsys.readouterr().out.split("after training")
    rows = [line.split() for text in (before, after) for line in text.splitlines()[1:]]
    assert len({row[0] for row in rows}) * 2 == len(rows)
    for _, channels, expected, median, lowest in rows:
        assert float(expected) == pytest.approx(int(channels) ** -0.5, abs=6e-4)
        assert float(lowest) < float(median) == pytest.approx(float(expected), rel=0.2)
    assert picture.stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["criterion.py", str(model), "-i", str(tmp_path / "none"), "-o", str(picture)])
    with pytest.raises(SystemExit):
        criterion.main()
    assert "is no folder" in capsys.readouterr().err
