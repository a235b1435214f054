from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from .conftest import TINY
from .nnunet import NnUNet, network_weights, segmentations, voxels

pytestmark = pytest.mark.slow

CASES = ["tinyTs_000", "tinyTs_001"]


@pytest.fixture(scope="module")
def ensemble(five_folds, tmp_path_factory) -> Path:
    """The test cases predicted by all five folds, with probabilities."""
    output = tmp_path_factory.mktemp("ensemble")
    five_folds.predict(TINY, "2d", output, "--save_probabilities", "-npp", 1, "-nps", 1, anew=True)
    return output


def assert_same_segmentations(one: Path, other: Path) -> None:
    assert list(segmentations(one)) == list(segmentations(other)) == CASES
    for case, path in segmentations(one).items():
        np.testing.assert_array_equal(voxels(path), voxels(segmentations(other)[case]), err_msg=case)


def test_folds_end_at_different_widths(five_folds):
    checkpoints = [five_folds.model_folder(TINY, "2d") / f"fold_{fold}/checkpoint_final.pth" for fold in range(5)]
    shapes = [{name: tuple(w.shape) for name, w in network_weights(checkpoint).items()} for checkpoint in checkpoints]
    assert all(one != other for i, one in enumerate(shapes) for other in shapes[:i])


def test_npz_keeps_the_validation_probabilities(five_folds):
    saved = [path.stem for path in five_folds.model_folder(TINY, "2d").glob("fold_*/validation/*.npz")]
    assert sorted(saved) == [f"tinyTr_{index:03d}" for index in range(8)]


def test_one_fold_predicts(five_folds, tmp_path):
    predicted = five_folds.predict(TINY, "2d", tmp_path / "out", "-f", 3)
    assert list(predicted) == CASES
    assert voxels(predicted[CASES[0]]).shape == (16, 32, 32)


def test_five_folds_of_different_widths_predict_the_mean_of_their_logits(five_folds, ensemble, tmp_path):
    image = five_folds.raw / f"Dataset701_Tiny/imagesTs/{CASES[0]}_0000.nii.gz"
    script = Path(__file__).with_name("logits_of_folds.py")
    five_folds.run(sys.executable, script, five_folds.model_folder(TINY, "2d"), image, tmp_path / "logits.npz")
    logits = np.load(tmp_path / "logits.npz")

    assert np.abs(logits["single"][0] - logits["single"][1]).max() > 0.01
    np.testing.assert_allclose(logits["ensemble"], logits["mean"], atol=1e-4)
    np.testing.assert_allclose(logits["ensemble"], logits["single"].mean(0), rtol=2**-9, atol=4e-3)  # float16
    commanded = np.load(ensemble / f"{CASES[0]}.npz")["probabilities"]
    np.testing.assert_allclose(commanded, logits["probabilities"], atol=1e-4)


def test_predicting_from_the_model_folder_gives_the_same(five_folds, ensemble, tmp_path):
    five_folds.run(
        "nnUNetv2_predict_from_modelfolder", "-m", five_folds.model_folder(TINY, "2d"),
        "-i", five_folds.raw / "Dataset701_Tiny/imagesTs", "-o", tmp_path, "-device", "cpu", "-npp", 1, "-nps", 1,
    )  # fmt: skip
    assert_same_segmentations(tmp_path, ensemble)


def test_find_best_configuration_evaluates_all_folds(five_folds):
    output = five_folds.run("nnUNetv2_find_best_configuration", TINY, "-c", "2d", "-tr", "CertainCutsTrainer")
    assert "nnUNetv2_predict -d Dataset701_Tiny" in output and "-tr CertainCutsTrainer -c 2d" in output
    crossval = five_folds.model_folder(TINY, "2d") / "crossval_results_folds_0_1_2_3_4"
    assert len(segmentations(crossval)) == 8


def test_a_model_installed_from_a_zip_predicts_the_same(five_folds, ensemble, tmp_path):
    archive = tmp_path / "model.zip"
    five_folds.run("nnUNetv2_export_model_to_zip", "-d", TINY, "-o", archive, "-c", "2d", "-tr", "CertainCutsTrainer")
    elsewhere: NnUNet = five_folds.with_results(tmp_path / "results")
    elsewhere.results.mkdir()
    elsewhere.run("nnUNetv2_install_pretrained_model_from_zip", archive)
    elsewhere.predict(TINY, "2d", tmp_path / "out")
    assert_same_segmentations(tmp_path / "out", ensemble)
