from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from nnunet_sauron.plugin import commands, trainer_folder
from nnunet_sauron.plugin.commands import command, continue_command, predict_command, train_command
from nnunet_sauron.plugin.installation import TRAINERS

PLACE = Path("training", "nnUNetTrainer")


@pytest.fixture
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As much of an nnU-Net as is looked at, without our shim."""
    folder = tmp_path / "nnunetv2"
    (folder / TRAINERS.place).mkdir(parents=True)
    (folder / PLACE / "nnUNetTrainer.py").write_text("class nnUNetTrainer(object):\n    pass\n")
    monkeypatch.setattr(commands, "find_nnunet", lambda: folder)
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    return folder


def test_words_survive_the_shell(nnunet):
    words = ["nnUNetv2_sauron", "demo", "-o", '/a folder/it\'s [x] $HOME  "q"/模型']
    assert shlex.split(command(*words)) == words
    assert command("nnUNetv2_train", "FOLD", "/plain/path-1.0_x") == "nnUNetv2_train FOLD /plain/path-1.0_x"
    assert shlex.split(command("x", settings="start_from=/a b,c=1")) == ["nnunet_sauron=start_from=/a b,c=1", "x"]


def test_training_commands_name_what_they_train(nnunet, monkeypatch):
    assert train_command("D004", "2d", 0, "nnUNetTrainer", "Plans", "--val") == (
        "nnUNetv2_train D004 2d 0 -tr nnUNetTrainer -p Plans --val"
    )
    monkeypatch.setenv("nnUNet_results", "/r")
    assert continue_command(Path("/r/D004/nnUNetTrainer__Plans__2d"), "all") == (
        "nnUNetv2_train D004 2d all -tr nnUNetTrainer -p Plans --c"
    )
    assert continue_command(Path("/r/small"), 0) == "nnUNetv2_train DATASET CONFIGURATION 0 -tr TRAINER -p PLANS --c"


@pytest.mark.parametrize("results", ["/other", None])
def test_a_model_outside_of_the_results_folder_is_the_one_that_is_meant(nnunet, monkeypatch, results):
    monkeypatch.delenv("nnUNet_results", raising=False)
    if results:
        monkeypatch.setenv("nnUNet_results", results)
    said = continue_command(Path("/my r/D004/nnUNetTrainer__Plans__2d"), 0)
    assert said == "nnUNet_results='/my r' nnUNetv2_train D004 2d 0 -tr nnUNetTrainer -p Plans --c"


def test_a_checkpoint_is_named_where_it_is_not_the_default(nnunet):
    assert predict_command(Path("m"), ["0", "1"], ["nnUNetTrainer"]) == (
        "nnUNetv2_predict_from_modelfolder -m m -f 0 1 -i IN -o OUT"
    )
    assert predict_command(Path("m"), ["0"], ["nnUNetTrainer"], "checkpoint_best.pth").endswith(
        "-chk checkpoint_best.pth"
    )


def external(*trainers: str) -> str | None:
    """What a command sets for trainers."""
    first, *_ = shlex.split(command("program", trainers=trainers))
    return None if first == "program" else first.removeprefix("nnUNet_extTrainer=")


def test_our_trainers_need_the_variable_until_they_are_installed(nnunet, monkeypatch):
    ours = str(trainer_folder())
    assert external("SauronTrainer") == ours
    monkeypatch.setenv("nnUNet_extTrainer", "/theirs")
    assert external("SauronTrainer") == os.pathsep.join([ours, "/theirs"])
    monkeypatch.setenv("nnUNet_extTrainer", ours)
    assert external("SauronTrainer") == ours
    (nnunet / TRAINERS.place / TRAINERS.file).write_bytes(TRAINERS.source.read_bytes())
    assert external("SauronTrainer") is None
    # A compressed network of somebody else's trainer: ours is installed, theirs is not.
    monkeypatch.setenv("nnUNet_extTrainer", "/theirs")
    assert external("CompressedTrainer", "TheirTrainer") == external("TheirTrainer") == "/theirs"


def test_a_trainer_from_outside_needs_the_variable_as_it_was_given(nnunet, monkeypatch, tmp_path):
    assert external("TheirTrainer") is None  # nobody knows it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_extTrainer", "my trainers")
    assert external("TheirTrainer") == str(tmp_path / "my trainers")
    assert external("nnUNetTrainer") is None
