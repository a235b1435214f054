from __future__ import annotations

import pytest

from .conftest import TINY
from .nnunet import channels_by_epoch, network_weights

pytestmark = pytest.mark.slow


def test_a_stock_model_is_pruned_by_training_on(nnunet, stock_checkpoint, tmp_path):
    own = nnunet.with_results(tmp_path)
    output = own.train(TINY, "2d", 0, "-pretrained_weights", stock_checkpoint)
    assert "Loading pretrained weights from file" in output
    channels = channels_by_epoch(own.model_folder(TINY, "2d") / "fold_0/checkpoint_final.pth")
    assert channels[0] > channels[1] > channels[2]


def test_a_pruned_checkpoint_is_refused_until_it_is_densified(five_folds, tmp_path):
    pruned = five_folds.model_folder(TINY, "2d") / "fold_1/checkpoint_final.pth"
    own = five_folds.with_results(tmp_path / "results")
    refused = own.train(TINY, "2d", 0, "-pretrained_weights", pruned, fails=True)
    assert "The shape of the parameters of key" in refused

    dense = tmp_path / "dense.pth"
    own.run("nnUNetv2_sauron", "densify", pruned, "-o", dense)
    assert network_weights(dense)["encoder.stages.2.0.convs.1.conv.weight"].shape[:2] == (16, 16)
    own.train(TINY, "2d", 0, "-pretrained_weights", dense)
    channels = channels_by_epoch(own.model_folder(TINY, "2d") / "fold_0/checkpoint_final.pth")
    assert channels[0] == channels_by_epoch(pruned)[0] > channels[-1]
