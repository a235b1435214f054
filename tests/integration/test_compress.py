"""A trained model made smaller by the real command, then predicted, exported and trained on by nnU-Net's."""

from __future__ import annotations

import json
import shutil
import zipfile

import pytest

from .conftest import TINY
from .nnunet import NnUNet, network_weights, segmentations, voxels

pytestmark = pytest.mark.slow

SHORT = "num_iterations_per_epoch=2,num_val_iterations_per_epoch=1,num_epochs="


def compress(nnunet: NnUNet, model, output, *words, images=None, **options) -> dict:
    images = images or nnunet.dataset_folder(nnunet.raw, TINY) / "imagesTs"
    printed = nnunet.run(
        "nnUNetv2_sauron", "compress", "-m", model, "-i", images, "-o", output, "--json", *words, **options
    )
    return json.loads(printed[printed.index("{") :])


def predict(nnunet: NnUNet, model, output, *flags, **options) -> dict:
    images = nnunet.dataset_folder(nnunet.raw, TINY) / "imagesTs"
    nnunet.run(
        "nnUNetv2_predict_from_modelfolder", "-m", model, "-i", images, "-o", output, "-device", "cpu",
        "-npp", 1, "-nps", 1, *flags, **options,
    )  # fmt: skip
    return segmentations(output)


def test_five_pruned_folds_become_smaller_and_predict_together(five_folds, tmp_path):
    model = five_folds.model_folder(TINY, "2d")
    described = compress(five_folds, model, tmp_path / "small", "--macs", "0.5")
    assert len({tuple(fold["after"].values()) for fold in described["folds"].values()}) > 1
    assert all(fold["macs"][1] <= 0.5 * fold["macs"][0] for fold in described["folds"].values())
    assert len(predict(five_folds, tmp_path / "small", tmp_path / "out")) == 2


def test_a_model_recovers_from_images_alone_and_predicts(five_folds, tmp_path):
    model, images = five_folds.model_folder(TINY, "2d"), five_folds.dataset_folder(five_folds.raw, TINY) / "imagesTr"
    words = "--macs", "0.5", "-f", "0", "--recover", "2", "--recover-steps", "3"
    described = compress(five_folds, model, tmp_path / "small", *words, images=images)
    assert "agreement_dice_before_recovery" in described
    notes = json.loads((tmp_path / "small/compression.json").read_text())["recovery"]
    assert notes["folds"]["0"]["epochs"] == 2
    assert len(predict(five_folds, tmp_path / "small", tmp_path / "out", "-f", 0)) == 2


def test_with_uniform_stages_five_folds_become_one_plain_model(five_folds, tmp_path):
    """Folds of different widths, by the installed command. nnU-Net alone predicts with such a model in test_stages."""
    small, model = tmp_path / "small", five_folds.model_folder(TINY, "2d")
    described = compress(five_folds, model, small, "--macs", "0.5", "--uniform-stages", anew=True)
    assert len({tuple(fold["after"].values()) for fold in described["folds"].values()}) == 1
    assert len(predict(five_folds, small, tmp_path / "out", nnUNet_extTrainer="")) == 2


def test_with_next_to_no_tolerance_it_gives_the_old_models_segmentations(five_folds, tmp_path):
    model = five_folds.model_folder(TINY, "2d")
    described = compress(five_folds, model, tmp_path / "same", "--tolerance", "1e-6", "-f", "0")
    assert all(dice is None or dice > 0.99 for dice in described["agreement_dice"].values())
    old = predict(five_folds, model, tmp_path / "old", "-f", 0)
    new = predict(five_folds, tmp_path / "same", tmp_path / "new", "-f", 0)
    assert any(voxels(path).any() for path in old.values())  # else nothing would be compared
    for case, path in old.items():
        assert (voxels(path) == voxels(new[case])).mean() > 0.999


def test_a_residual_3d_model_is_compressed_trained_on_continued_and_exported(nnunet, tmp_path):
    own = nnunet.with_results(tmp_path / "results")
    residual = {"plans": "nnUNetResEncUNetMPlans"}
    own.train(TINY, "3d_fullres", 0, trainer="StockTrainer", setting=f"{SHORT}2", **residual)
    stock = own.model_folder(TINY, "3d_fullres", "StockTrainer", **residual)
    small = tmp_path / "small"
    compress(own, stock, small, "--params", "0.6")
    compressed = network_weights(small / "fold_0/checkpoint_final.pth")

    # Where nnU-Net looks for models of a dataset, it is exported like any other.
    model = own.model_folder(TINY, "3d_fullres", "CompressedTrainer", **residual)
    shutil.copytree(small, model)
    exported = ("-d", TINY, "-o", tmp_path / "model.zip", "-c", "3d_fullres", "-tr", "CompressedTrainer")
    own.run("nnUNetv2_export_model_to_zip", *exported, "-p", residual["plans"], "-f", 0)
    assert any(
        name.endswith("fold_0/checkpoint_final.pth") for name in zipfile.ZipFile(tmp_path / "model.zip").namelist()
    )

    of_ours = {"trainer": "CompressedTrainer", **residual}
    own.train(TINY, "3d_fullres", 0, setting=f"{SHORT}2,start_from={small}", **of_ours)
    own.train(TINY, "3d_fullres", 0, "--c", setting="", **of_ours)
    logged = "".join(path.read_text() for path in (model / "fold_0").glob("training_log*"))
    assert logged.count(f"Teacher: {stock}, with labels") == 2  # the source, found by itself and again after --c
    trained = network_weights(model / "fold_0/checkpoint_final.pth")
    assert {n: t.shape for n, t in trained.items()} == {n: t.shape for n, t in compressed.items()}
    assert sum(t.numel() for t in trained.values()) < sum(
        t.numel() for t in network_weights(stock / "fold_0/checkpoint_final.pth").values()
    )
    assert len(own.predict(TINY, "3d_fullres", tmp_path / "out", "-f", 0, **of_ours)) == 2
