"""The main job on real data: from the Decathlon's folder to evaluated predictions by nnU-Net's commands alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .nnunet import NnUNet, channels_by_epoch

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[3] / "shared/data/Task04_Hippocampus"
DATASET = 4
TRAINING_CASES, TEST_CASES = 40, 8
EPOCHS = 48

# A threshold moves when the loss fluctuates more than it falls, and the guard against collapse must bear that: few
# iterations an epoch, a short look back, a wide guard. At the paper's settings so short a training may lose nothing.
SETTINGS = (
    f"num_epochs={EPOCHS},num_iterations_per_epoch=12,num_val_iterations_per_epoch=2,"
    "tau_max=0.4,kappa=2,rho=2,max_loss_increase=0.2,cut_from=0.2,cut_until=0.65"
)


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory) -> NnUNet:
    """A part of the data set converted, planned and preprocessed; further labelled cases are its test cases."""
    if not SOURCE.is_dir():
        pytest.skip("The Decathlon's Task04_Hippocampus is not at ../shared/data (see its website; CC-BY-SA 4.0).")
    root = tmp_path_factory.mktemp("hippocampus")
    part = _part_of_the_decathlon(root)
    nnunet = NnUNet.below(root)
    nnunet.raw.mkdir()
    nnunet.run("nnUNetv2_convert_MSD_dataset", "-i", part, "-np", 1)
    shutil.copytree(part / "heldOut", nnunet.dataset_folder(nnunet.raw, DATASET) / "labelsTs")
    nnunet.run("nnUNetv2_plan_and_preprocess", "-d", DATASET, "-c", "2d", "-np", 2, "-npfp", 2)
    nnunet.edit_plans(DATASET, lambda configurations: configurations["2d"].update(batch_size=8))
    return nnunet


def test_sauron_keeps_the_dice_on_held_out_hippocampi_with_fewer_channels(hippocampus, tmp_path):
    hippocampus.train(DATASET, "2d", 0, trainer="SauronTrainer", setting=SETTINGS)
    channels = channels_by_epoch(
        hippocampus.model_folder(DATASET, "2d", "SauronTrainer") / "fold_0/checkpoint_final.pth"
    )
    assert len(channels) == EPOCHS and channels[-1] < channels[0]

    predicted = hippocampus.predict(DATASET, "2d", tmp_path, "-f", 0, trainer="SauronTrainer")
    assert len(predicted) == TEST_CASES
    labels = hippocampus.dataset_folder(hippocampus.raw, DATASET) / "labelsTs"
    hippocampus.run(
        "nnUNetv2_evaluate_folder", labels, tmp_path, "-djfile", tmp_path / "dataset.json",
        "-pfile", tmp_path / "plans.json", "-np", 1,
    )  # fmt: skip
    assert json.loads((tmp_path / "summary.json").read_text())["foreground_mean"]["Dice"] > 0.6


def _part_of_the_decathlon(root: Path) -> Path:
    """The first labelled cases in the Decathlon's layout, the next ones as its test cases, their labels in heldOut."""
    part = root / SOURCE.name
    for folder in ("imagesTr", "labelsTr", "imagesTs", "heldOut"):
        (part / folder).mkdir(parents=True)
    description = json.loads((SOURCE / "dataset.json").read_text())
    cases = sorted(path.name for path in (SOURCE / "labelsTr").glob("hippocampus_*.nii.gz"))
    training, test = cases[:TRAINING_CASES], cases[TRAINING_CASES : TRAINING_CASES + TEST_CASES]
    for names, images, labels in ((training, "imagesTr", "labelsTr"), (test, "imagesTs", "heldOut")):
        for name in names:
            shutil.copy(SOURCE / "imagesTr" / name, part / images)
            shutil.copy(SOURCE / "labelsTr" / name, part / labels)
    description["training"] = [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in training]
    description["test"] = [f"./imagesTs/{name}" for name in test]
    description["numTraining"], description["numTest"] = len(training), len(test)
    (part / "dataset.json").write_text(json.dumps(description))
    return part
