from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from nnunet_sauron.plugin import find_nnunet
from nnunet_sauron.plugin.installation import SHIMS

from .conftest import TINY
from .nnunet import NnUNet, channels_by_epoch, network_weights, pruning_history, voxels

pytestmark = pytest.mark.slow

# StockTrainer is nnU-Net's own trainer but for its length; nnU-Net's own shortest takes 250 steps (test_matrix).
SHORT = "num_epochs=1,num_iterations_per_epoch=2,num_val_iterations_per_epoch=1"


@pytest.fixture
def own(nnunet: NnUNet, tmp_path: Path) -> NnUNet:
    """nnU-Net with the tiny dataset and no results yet."""
    return nnunet.with_results(tmp_path / "results")


def plans(nnunet: NnUNet, name: str) -> dict:
    return json.loads((nnunet.dataset_folder(nnunet.preprocessed, TINY) / f"{name}.json").read_text())


def data_folders(nnunet: NnUNet) -> list[str]:
    return sorted(path.name for path in nnunet.dataset_folder(nnunet.preprocessed, TINY).iterdir() if path.is_dir())


def shapes(nnunet: NnUNet, configuration: str, trainer: str, plans: str) -> dict[str, tuple[int, ...]]:
    checkpoint = nnunet.model_folder(TINY, configuration, trainer, plans) / "fold_0/checkpoint_final.pth"
    return {name: tuple(weight.shape) for name, weight in network_weights(checkpoint).items()}


def test_flat_plans_are_trained_and_predicted_by_stock_nnunet(own, tmp_path):
    before, lean = data_folders(own), {"trainer": "StockTrainer", "plans": "nnUNetLUnet16Plans"}
    output = own.run("nnUNetv2_sauron", "plan", "-d", TINY, "--flat", 16, "-c", "2d", "--same-memory", anew=True)
    assert "8-12-16" in output and "16-16-16" in output
    own.train(TINY, "2d", 0, **lean, setting=SHORT)
    assert data_folders(own) == before
    trained = shapes(own, "2d", **lean)
    assert {shape[0] for name, shape in trained.items() if name.endswith(".conv.weight")} == {16}
    predicted = own.predict(TINY, "2d", tmp_path / "out", "-f", 0, **lean)
    assert [voxels(path).shape for path in predicted.values()] == [(16, 32, 32)] * 2


@pytest.mark.parametrize(
    ("configuration", "source", "pruned", "network"),
    [
        ("2d", "nnUNetPlans", "nnUNetPrunedPlans", "PrunedPlainConvUNet"),
        ("3d_fullres", "nnUNetResEncUNetMPlans", "nnUNetResEncUNetMPrunedPlans", "PrunedResidualEncoderUNet"),
    ],
    ids=["plain", "residual"],
)
def test_widths_of_a_pruned_checkpoint_are_trained_anew_by_stock_nnunet(
    own, tmp_path, configuration, source, pruned, network
):
    own.train(TINY, configuration, 0, plans=source)
    checkpoint = own.model_folder(TINY, configuration, plans=source) / "fold_0/checkpoint_final.pth"
    own.run("nnUNetv2_sauron", "plan", "-d", TINY, "-p", source, "--widths-from", checkpoint)
    assert network in plans(own, pruned)["configurations"][configuration]["architecture"]["network_class_name"]

    own.train(TINY, configuration, 0, trainer="StockTrainer", plans=pruned, setting=SHORT)
    anew = shapes(own, configuration, "StockTrainer", pruned)
    assert anew == shapes(own, configuration, "CertainCutsTrainer", source)
    predicted = own.predict(TINY, configuration, tmp_path / "out", "-f", 0, trainer="StockTrainer", plans=pruned)
    assert [voxels(path).shape for path in predicted.values()] == [(16, 32, 32)] * 2

    # A pruning trainer goes on from there.
    own.train(TINY, configuration, 0, plans=pruned)
    further = own.model_folder(TINY, configuration, plans=pruned) / "fold_0/checkpoint_final.pth"
    assert pruning_history(further)[0]["widths"] == pruning_history(checkpoint)[-1]["widths"]
    channels = channels_by_epoch(further)
    assert channels[0] > channels[1] > channels[2]


def test_planners_are_found_by_name_once_installed_and_plan_for_the_same_data(own, tmp_path):
    copy = tmp_path / "site-packages" / "nnunetv2"
    ignored = shutil.ignore_patterns("__pycache__", *(shim.file for shim in SHIMS))
    shutil.copytree(find_nnunet(), copy, ignore=ignored)
    search = os.pathsep.join((str(copy.parent), own.environment()["PYTHONPATH"]))
    there = {"PYTHONPATH": search, "anew": True}

    own.run("nnUNetv2_sauron", "install", **there)
    own.run("nnUNetv2_plan_experiment", "-d", TINY, "-pl", "LUnet8Planner", **there)
    own.run("nnUNetv2_sauron", "uninstall", **there)
    assert not list(copy.rglob("*sauron*"))

    for key, configuration in plans(own, "nnUNetLUnet8Plans")["configurations"].items():
        assert set(configuration["architecture"]["arch_kwargs"]["features_per_stage"]) == {8}
        assert configuration["data_identifier"] == f"nnUNetPlans_{key}"
    lean = {"trainer": "StockTrainer", "plans": "nnUNetLUnet8Plans"}
    own.train(TINY, "2d", 0, **lean, setting=SHORT)
    assert len(own.predict(TINY, "2d", tmp_path / "out", "-f", 0, **lean)) == 2
