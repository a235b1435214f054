from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from .conftest import TINY
from .nnunet import NnUNet, channels_by_epoch, network_weights, segmentations, voxels

pytestmark = pytest.mark.slow


@pytest.fixture
def finished(five_folds, tmp_path) -> NnUNet:
    """A finished fold 0 of its own, without its validation."""
    copy = five_folds.with_results(tmp_path)
    source = five_folds.model_folder(TINY, "2d") / "fold_0"
    shutil.copytree(source, copy.model_folder(TINY, "2d") / "fold_0", ignore=shutil.ignore_patterns("validation"))
    return copy


def fold_0(nnunet: NnUNet) -> Path:
    return nnunet.model_folder(TINY, "2d") / "fold_0"


def assert_validated_alike(one: NnUNet, other: NnUNet, *, alike: bool = True) -> None:
    assert (fold_0(one) / "validation/summary.json").is_file()
    ours, theirs = (segmentations(fold_0(nnunet) / "validation") for nnunet in (one, other))
    assert ours.keys() == theirs.keys() and len(ours) > 0
    assert all(np.array_equal(voxels(path), voxels(theirs[case])) for case, path in ours.items()) == alike


def test_val_repeats_the_validation_of_the_final_network(five_folds, finished):
    finished.train(TINY, "2d", 0, "--val", setting="")
    assert_validated_alike(finished, five_folds)


def test_val_best_validates_a_network_wider_than_the_final_one(five_folds, finished):
    best = channels_by_epoch(fold_0(finished) / "checkpoint_best.pth")
    final = channels_by_epoch(fold_0(finished) / "checkpoint_final.pth")
    assert best[-1] > final[-1]
    finished.train(TINY, "2d", 0, "--val", "--val_best", setting="")
    assert_validated_alike(finished, five_folds, alike=False)


def test_continuing_a_finished_run_only_validates_it(five_folds, finished):
    before = network_weights(fold_0(finished) / "checkpoint_final.pth")
    output = finished.train(TINY, "2d", 0, "--c", setting="")  # in a shell without the variable
    assert "Current learning rate" not in output
    after = network_weights(fold_0(finished) / "checkpoint_final.pth")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert_validated_alike(finished, five_folds)
