"""The study's grids: each can be read, and all commands that it leads to are ones that exist."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from nnunet_sauron import cli, trainers
from nnunet_sauron.trainers.settings import VARIABLE, Given

from .conftest import STUDY

from grid import Grid  # isort: skip
from tucker_trainer import TuckerTrainer  # isort: skip

GRIDS = sorted(STUDY.glob("*.yaml"))
BASE = {
    "name": "tiny", "dataset": "Dataset701_Tiny", "configuration": "2d", "plans": "P", "batch_size": 2,
    "settings": {"num_epochs": 2},
}  # fmt: skip


def small_grid(folder: Path, *runs: dict, **changes) -> Grid:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**BASE, "runs": list(runs), **changes}))
    return Grid(path, folder / "work")


def test_there_are_grids():
    assert {path.stem for path in GRIDS} >= {"hippocampus", "hippocampus_3d", "hippocampus_200", "phantom", "resenc"}
    assert len({Grid(path, Path()).name for path in GRIDS}) == len(GRIDS)  # or results would replace each other


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_command_of_a_grid_is_one_that_exists(path, tmp_path, monkeypatch):
    grid = Grid(path, tmp_path)
    compared = {"TuckerTrainer"} if path.stem != "hippocampus_own_batch" else set()
    assert {run.trainer for run in grid.runs.values()} > {"StockTrainer", "ShrinkTrainer"} | compared
    for name, fold in grid.tasks():
        *before, training = grid.steps(name, fold)
        if grid.runs[name].trainer is None:
            assert training.program == "nnUNetv2_predict_from_modelfolder" and before
            continue
        for step in before:
            words = shlex.split(str(step))
            assert words[0] == "nnUNetv2_sauron" and cli._parser().parse_args(words[1:]).verb in ("plan", "compress")
        variables, words = {}, shlex.split(str(training))
        while "=" in words[0]:
            variable, _, value = words.pop(0).partition("=")
            variables[variable] = value
        assert words[:4] == ["nnUNetv2_train", grid.dataset, grid.configuration, str(fold)]
        trainer = {**vars(trainers), "TuckerTrainer": TuckerTrainer}[words[words.index("-tr") + 1]]
        monkeypatch.setenv(VARIABLE, variables[VARIABLE])
        Given(trainer, *trainer.settings_classes()).settings()


def test_without_a_trainer_the_compressed_model_is_the_runs(tmp_path):
    small = {"name": "small", "start": "stock", "compress": ["--macs", 0.1]}
    grid = small_grid(tmp_path, {"name": "stock", "trainer": "StockTrainer"}, small)
    compress, segment = grid.steps("small", 0)
    model, segmented = grid.results_of(grid.runs["small"], 0)
    assert compress.made == model and grid.runs["small"].settings == {}
    images, output = (segment.words[segment.words.index(option) + 1] for option in ("-i", "-o"))
    assert (images, output) == (str(grid.images(0, "val")), str(segmented)) and segment.words[1] == str(model)
    with pytest.raises(ValueError, match="the run small lacks trainer"):
        small_grid(tmp_path, {"name": "stock", "trainer": "StockTrainer"}, {"name": "small", "start": "stock"})
    with pytest.raises(ValueError, match="flat begins with small, which must be trained"):
        small_grid(
            tmp_path, {"name": "stock", "trainer": "StockTrainer"}, small,
            {"name": "flat", "trainer": "ShrinkTrainer", "teacher": "small"},
        )  # fmt: skip


def test_a_run_begins_with_other_runs_models(tmp_path):
    grid = small_grid(
        tmp_path,
        {"name": "stock", "trainer": "StockTrainer"},
        {"name": "small-10", "trainer": "CompressedTrainer", "start": "stock", "compress": ["--macs", 0.1]},
        {"name": "flat", "trainer": "ShrinkTrainer", "plan": ["--flat", 8], "teacher": "stock"},
    )
    stock = grid.folder / "tiny" / "stock" / "Dataset701_Tiny" / "StockTrainer__P__2d"
    assert grid.model(grid.runs["stock"]) == stock
    compress, training = grid.steps("small-10", 0)
    assert compress.words[1:3] == ("-m", str(stock)) and compress.words[-4:] == ("-f", "0", "--macs", "0.1")
    assert training.settings == {"num_epochs": 2, "start_from": str(compress.made)}
    plan, training = grid.steps("flat", 0)
    assert plan.words[-4:] == ("-o", "tiny_flat", "--flat", "8") and training.settings["teacher"] == str(stock)
    assert training.words[-4:] == ("-p", "tiny_flat", "-device", "cpu")


@pytest.mark.parametrize("checkpoint", ["checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"])
def test_an_interrupted_training_goes_on_with_its_own_settings(tmp_path, checkpoint):
    grid = small_grid(tmp_path, {"name": "stock", "trainer": "StockTrainer"})
    fold = grid.model(grid.runs["stock"]) / "fold_0"
    fold.mkdir(parents=True)
    (training,) = grid.steps("stock", 0)
    assert "--c" not in training.words and training.settings
    (fold / checkpoint).touch()
    (training,) = grid.steps("stock", 0)
    assert training.words[-1] == "--c" and not training.settings


def test_folds_come_one_after_the_other(tmp_path):
    run = {"trainer": "StockTrainer"}
    grid = small_grid(tmp_path, {"name": "a", **run, "folds": [0, 1]}, {"name": "b", **run})
    assert grid.tasks() == [("a", 0), ("b", 0), ("a", 1)]


STOCK = {"name": "stock", "trainer": "StockTrainer"}


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([STOCK, STOCK], "two runs called stock"),
        ([{"name": "a", "trainer": "T", "start": "stock"}, STOCK], "a begins with stock, which must be trained before"),
        ([STOCK, {"name": "a", "trainer": "T", "teacher": "stock", "folds": [0, 1]}], "on its folds"),
        ([{**STOCK, "fold": 1}], "the run stock has fold; known are"),
        ([{"name": "stock"}], "the run stock lacks trainer"),
    ],
)
def test_a_wrong_run_is_named(tmp_path, runs, message):
    with pytest.raises(ValueError, match=message):
        small_grid(tmp_path, *runs)


def test_what_is_no_grid_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no grid: it has .*plan_name"):
        small_grid(tmp_path, STOCK, plan_name="x")
    for text, message in (("", "no grid: it has no keys"), ("a: [1", "no YAML")):
        (tmp_path / "other.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            Grid(tmp_path / "other.yaml", tmp_path)


def test_the_phantom_is_made_and_nothing_converted(tmp_path):
    grid = small_grid(tmp_path, STOCK, dataset="Dataset943_Phantom")
    (step,) = grid.preparation(tmp_path)
    assert step.program == "nnUNetv2_plan_and_preprocess" and step.words[:2] == ("-d", "943")
    convert, _ = small_grid(tmp_path, STOCK).preparation(Path("msd"))
    assert str(convert) == "nnUNetv2_convert_MSD_dataset -i msd"


def test_its_plans_are_nnunets_with_another_batch(tmp_path):
    grid = small_grid(tmp_path, STOCK, from_plans="Q")
    grid.preprocessed.mkdir(parents=True)
    (grid.preprocessed / "Q.json").write_text('{"plans_name": "Q", "configurations": {"2d": {"batch_size": 99}}}')
    grid.write_plans()
    written = yaml.safe_load((grid.preprocessed / "P.json").read_text())
    assert written == {"plans_name": "P", "configurations": {"2d": {"batch_size": 2}}}
