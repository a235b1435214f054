"""The main job in seconds, by commands alone: train and prune, predict, evaluate, report.

On real data: `test_hippocampus.py`.
"""

from __future__ import annotations

import json

import pytest

from .conftest import TINY
from .nnunet import NnUNet, pruning_history

pytestmark = pytest.mark.slow

MACS = 0.4
LENGTH = "num_epochs=6,num_iterations_per_epoch=5,num_val_iterations_per_epoch=2"
SETTINGS = {"StockTrainer": LENGTH, "SauronTrainer": f"{LENGTH},target_macs={MACS},cuts=3,patches=24,cut_until=0.5"}


@pytest.fixture(scope="module")
def trained(nnunet, tmp_path_factory) -> NnUNet:
    """A stock and a pruned model of the tiny dataset."""
    own = nnunet.with_results(tmp_path_factory.mktemp("main_job"))
    for trainer, setting in SETTINGS.items():
        own.train(TINY, "2d", 0, trainer=trainer, setting=setting)
    return own


def test_a_pruned_model_meets_its_target_and_predicts(trained, tmp_path):
    """How well it segments so short a training cannot tell: the smallest class is found in some runs only."""
    labels = trained.dataset_folder(trained.raw, TINY) / "labelsTs"
    for trainer in SETTINGS:
        output = tmp_path / trainer
        trained.predict(TINY, "2d", output, "-f", 0, trainer=trainer)
        trained.run(
            "nnUNetv2_evaluate_folder", labels, output, "-djfile", output / "dataset.json",
            "-pfile", output / "plans.json", "-np", 1,
        )  # fmt: skip
        found = json.loads((output / "summary.json").read_text())
        assert len(found["metric_per_case"]) == len(list(labels.iterdir())), trainer
    history = pruning_history(trained.model_folder(TINY, "2d", "SauronTrainer") / "fold_0/checkpoint_final.pth")
    assert history[-1]["macs"] <= MACS * history[0]["macs"]
    assert history[-1]["target"]["reached"]


def test_both_are_reported_side_by_side(trained, tmp_path):
    folders = [trained.model_folder(TINY, "2d", trainer) for trainer in SETTINGS]
    printed = trained.run("nnUNetv2_sauron", "report", *folders, "-o", tmp_path / "report", "--timing", 0)
    assert "Dice" in printed
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    stock, pruned = (model["mean"] for model in report["models"])
    assert pruned["parameters"] < stock["parameters"] == report["models"][1]["dense"]["parameters"]
    # nnU-Net's own validation of the same segmentations.
    validated = json.loads((folders[1] / "fold_0/validation/summary.json").read_text())
    assert pruned["dice"] == pytest.approx(validated["foreground_mean"]["Dice"], abs=1e-6)
