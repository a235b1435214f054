from __future__ import annotations

import re
import shutil

import pytest

from .conftest import FIVE_FOLDS, TINY
from .nnunet import NnUNet, settings
from .plans import UNETS

pytestmark = pytest.mark.slow


@pytest.fixture
def empty(nnunet, tmp_path) -> NnUNet:
    """nnU-Net with no results yet."""
    return nnunet.with_results(tmp_path / "results")


def end_of(output: str) -> str:
    """The last lines that a user sees, as one."""
    return " ".join(" ".join(output.splitlines()[-50:]).split())


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("lamda_=0.3", "'lamda_=0.3' is not a setting of CertainCutsTrainer"),
        ("tau_max=high", "tau_max must be a number; got 'high'"),
        ("normalisation=max", "normalisation must be one of minmax, none, max_distance; got max"),
    ],
)
def test_a_bad_setting_stops_at_once_and_lists_the_valid_ones(empty, setting, complaint):
    end = end_of(empty.train(TINY, "2d", 0, setting=setting, fails=True))
    assert complaint in end
    assert re.search(r"Valid ones and their defaults: .*num_epochs=None.*lambda_=0\.5.*tau_max=0\.3", end)
    assert not list(empty.results.rglob("*"))


def test_a_network_that_cannot_be_pruned_is_refused_by_name(empty):
    def exchange_network(configurations: dict) -> None:
        architecture = configurations["2d"]["architecture"]
        architecture["network_class_name"] = f"{UNETS}.ResidualUNet"
        arguments = architecture["arch_kwargs"]
        arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")

    empty.edit_plans(TINY, exchange_network, new_name="nnUNetResidualUNetPlans")
    end = end_of(empty.train(TINY, "2d", 0, plans="nnUNetResidualUNetPlans", fails=True))
    assert f"A network of class {UNETS}.ResidualUNet cannot be pruned: known are PlainConvUNet and Res" in end
    assert "Choose plans that name one of them, for example nnUNetPlans" in end
    assert not list(empty.results.rglob("*"))


def test_plans_that_do_not_exist_are_named(empty):
    end = end_of(empty.train(TINY, "2d", 0, plans="nnUNetMissingPlans", fails=True))
    assert "No such file or directory" in end and "nnUNetMissingPlans.json" in end


def test_a_truncated_checkpoint_is_named_with_a_way_out(five_folds, tmp_path):
    copy = five_folds.with_results(tmp_path)
    fold = copy.model_folder(TINY, "2d") / "fold_0"
    fold.mkdir(parents=True)
    whole = (five_folds.model_folder(TINY, "2d") / "fold_0/checkpoint_final.pth").read_bytes()
    (fold / "checkpoint_latest.pth").write_bytes(whole[: len(whole) // 2])

    end = end_of(copy.train(TINY, "2d", 0, "--c", fails=True))
    assert f"{fold / 'checkpoint_latest.pth'} cannot be read: truncated, or no PyTorch checkpoint" in end
    assert "Delete it to continue from another checkpoint of that folder" in end
    assert (fold / "checkpoint_latest.pth").stat().st_size == len(whole) // 2


def test_a_checkpoint_of_another_architecture_is_not_continued(five_folds, tmp_path):
    copy = five_folds.with_results(tmp_path)

    def add_a_stage_s_convolution(configurations: dict) -> None:
        configurations["2d"]["architecture"]["arch_kwargs"]["n_conv_per_stage"] = [2, 2, 2]

    copy.edit_plans(TINY, add_a_stage_s_convolution, new_name="nnUNetDeeperPlans")
    fold = copy.model_folder(TINY, "2d", plans="nnUNetDeeperPlans") / "fold_0"
    fold.mkdir(parents=True)
    shutil.copy(five_folds.model_folder(TINY, "2d") / "fold_0/checkpoint_final.pth", fold)

    end = end_of(copy.train(TINY, "2d", 0, "--c", plans="nnUNetDeeperPlans", setting=FIVE_FOLDS, fails=True))
    assert f"{fold / 'checkpoint_final.pth'} does not fit: it was made by CertainCutsTrainer" in end
    assert "use -pretrained_weights" in end


def test_a_stock_checkpoint_is_not_continued_as_a_pruning_training(five_folds, stock_checkpoint, tmp_path):
    copy = five_folds.with_results(tmp_path)
    fold = copy.model_folder(TINY, "2d") / "fold_0"
    fold.mkdir(parents=True)
    shutil.copy(stock_checkpoint, fold)
    end = end_of(copy.train(TINY, "2d", 0, "--c", setting=settings(num_epochs=4), fails=True))
    assert "made by StockTrainer" in end and "without a pruning history" in end


def test_other_settings_than_those_of_the_continued_training_are_refused(five_folds, tmp_path):
    copy = five_folds.with_results(tmp_path)
    fold = copy.model_folder(TINY, "2d") / "fold_0"
    fold.mkdir(parents=True)
    shutil.copy(five_folds.model_folder(TINY, "2d") / "fold_0/checkpoint_final.pth", fold)
    before = (fold / "checkpoint_final.pth").read_bytes()
    end = end_of(copy.train(TINY, "2d", 0, "--c", setting=settings(num_epochs=7), fails=True))
    assert "was begun with num_epochs=2 (now 7), which cannot change any more" in end
    assert (fold / "checkpoint_final.pth").read_bytes() == before
