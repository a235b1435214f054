from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .nnunet import NnUNet, settings
from .phantom import IGNORE, PLAIN, REGIONS, REGIONS_AND_IGNORE, write_dataset
from .plans import make_residual, make_tiny

TINY = 701
FIVE_FOLDS = settings(num_epochs=2)
OTHER_LABELS = {702: ("Regions", REGIONS), 703: ("Ignore", IGNORE), 704: ("RegionsAndIgnore", REGIONS_AND_IGNORE)}


@pytest.fixture(scope="session")
def nnunet(tmp_path_factory) -> NnUNet:
    """nnU-Net with the tiny dataset 701 planned and preprocessed for all of its four configurations."""
    nnunet = NnUNet.below(tmp_path_factory.mktemp("nnunet"))
    write_dataset(nnunet.raw, "Dataset701_Tiny", PLAIN)
    nnunet.run("nnUNetv2_plan_and_preprocess", "-d", TINY, "--no_pp", "-npfp", 1)
    nnunet.edit_plans(TINY, make_tiny)
    nnunet.edit_plans(TINY, make_residual, new_name="nnUNetResEncUNetMPlans")
    nnunet.run("nnUNetv2_preprocess", "-d", TINY, "-c", "2d", "3d_fullres", "3d_lowres", "-np", 1)
    return nnunet


@pytest.fixture(scope="session")
def other_labels(nnunet) -> NnUNet:
    """The same images with regions, an ignore label, or both (702, 703, 704), under the tiny dataset's plans."""
    source = nnunet.preprocessed / "Dataset701_Tiny"
    for number, (name, labels) in OTHER_LABELS.items():
        folder = f"Dataset{number}_{name}"
        description = write_dataset(nnunet.raw, folder, labels) / "dataset.json"
        target = nnunet.preprocessed / folder
        target.mkdir()
        shutil.copy(source / "dataset_fingerprint.json", target)
        shutil.copy(description, target)
        plans = (source / "nnUNetPlans.json").read_text().replace("Dataset701_Tiny", folder)
        (target / "nnUNetPlans.json").write_text(plans)
    nnunet.run("nnUNetv2_preprocess", "-d", *OTHER_LABELS, "-c", "2d", "-np", 1)
    return nnunet


@pytest.fixture(scope="session")
def five_folds(nnunet) -> NnUNet:
    """All five folds of the tiny dataset's 2d configuration, trained with cuts, probabilities kept (`--npz`)."""
    for fold in range(5):
        nnunet.train(TINY, "2d", fold, "--npz", setting=FIVE_FOLDS, anew=fold == 0)
    return nnunet


@pytest.fixture(scope="session")
def stock_checkpoint(nnunet) -> Path:
    """The final checkpoint of a stock training of the tiny dataset."""
    nnunet.train(TINY, "2d", 0, trainer="StockTrainer", setting="num_epochs=1,num_iterations_per_epoch=2")
    return nnunet.model_folder(TINY, "2d", "StockTrainer") / "fold_0/checkpoint_final.pth"
