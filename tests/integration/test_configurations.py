from __future__ import annotations

import pytest

from ..old_torch import IS_OLDEST
from .conftest import TINY
from .nnunet import NnUNet, channels_by_epoch, settings, voxels

pytestmark = pytest.mark.slow


def assert_lost_channels(checkpoint) -> None:
    channels = channels_by_epoch(checkpoint)
    assert channels[0] > channels[1] > channels[2]


@pytest.fixture(scope="module")
def lowres(nnunet) -> NnUNet:
    """3d_lowres trained on all cases, which leaves the cascade a segmentation of each."""
    nnunet.train(TINY, "3d_lowres", "all")
    return nnunet


@pytest.mark.parametrize("plans", ["nnUNetPlans", "nnUNetResEncUNetMPlans"])
def test_3d_fullres_is_pruned_and_predicts(nnunet, tmp_path, plans):
    nnunet.train(TINY, "3d_fullres", 0, plans=plans)
    assert_lost_channels(nnunet.model_folder(TINY, "3d_fullres", plans=plans) / "fold_0/checkpoint_final.pth")
    predicted = nnunet.predict(TINY, "3d_fullres", tmp_path, "-f", 0, plans=plans)
    assert [voxels(path).shape for path in predicted.values()] == [(16, 32, 32)] * 2


@pytest.mark.skipif(IS_OLDEST, reason="nnU-Net's augmentation of cascades fails with PyTorch 2.1")
def test_a_cascade_is_pruned_at_both_stages_and_predicts(lowres, tmp_path):
    assert_lost_channels(lowres.model_folder(TINY, "3d_lowres") / "fold_all/checkpoint_final.pth")
    lowres.train(TINY, "3d_cascade_fullres", 0)
    assert_lost_channels(lowres.model_folder(TINY, "3d_cascade_fullres") / "fold_0/checkpoint_final.pth")

    first = lowres.predict(TINY, "3d_lowres", tmp_path / "lowres", "-f", "all")
    flags = ("-f", 0, "-prev_stage_predictions", tmp_path / "lowres")
    second = lowres.predict(TINY, "3d_cascade_fullres", tmp_path / "cascade", *flags)
    assert list(first) == list(second) == ["tinyTs_000", "tinyTs_001"]


def test_without_deep_supervision_channels_go_and_it_predicts(nnunet, tmp_path):
    own = nnunet.with_results(tmp_path / "results")
    own.train(TINY, "2d", 0, setting=settings(enable_deep_supervision=False))
    assert_lost_channels(own.model_folder(TINY, "2d") / "fold_0/checkpoint_final.pth")
    assert len(own.predict(TINY, "2d", tmp_path / "out", "-f", 0)) == 2


@pytest.mark.parametrize("dataset", [702, 703, 704], ids=["regions", "ignore", "regions and ignore"])
def test_regions_and_ignore_labels_are_trained_with_cuts_and_predicted(other_labels, tmp_path, dataset):
    other_labels.train(dataset, "2d", 0)
    assert_lost_channels(other_labels.model_folder(dataset, "2d") / "fold_0/checkpoint_final.pth")
    predicted = other_labels.predict(dataset, "2d", tmp_path, "-f", 0)
    assert len(predicted) == 2
    # What is ignored is never predicted.
    assert all(set(voxels(path).ravel().tolist()) <= {0, 1, 2} for path in predicted.values())
