"""A training is what it was: every trainer, continued or validated in a shell without the variable or with another."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from nnunet_sauron import trainers
from nnunet_sauron.pruning import channel_layout
from nnunet_sauron.trainers import CompressedTrainer, ShrinkTrainer, StockTrainer

from .small import OnRandomPatches, log_of, set_folders, small_trainer

NAMES = [name for name in trainers.__all__ if name != "PruningTrainer"]
TRAINING = "num_epochs=2,num_iterations_per_epoch=2,initial_lr=0.002,save_every=1"
GIVEN = {
    "StockTrainer": "",
    "CompressedTrainer": ",start_from={start},teacher=None",
    "SauronTrainer": ",target_macs=0.4,lambda_=0.2,cuts=1",
    "ShrinkTrainer": ",target_macs=0.4,cuts=1,start_from={start},teacher=None",
}
TARGET = ",target_macs=0.6,cut_until=0.7"


@pytest.fixture(params=NAMES)
def begun(request, tmp_path, monkeypatch):
    """A trainer class under its own name, and a finished training of it with settings from the variable."""
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.delenv("nnunet_sauron", raising=False)
    start = tmp_path / "start, here" / "start.pth"
    if "start_from" in GIVEN.get(request.param, TARGET):
        network = small_trainer(tmp_path, type("Start", (OnRandomPatches, StockTrainer), {}))
        network.initialize()
        start.parent.mkdir()
        torch.save({"network_weights": network.network.state_dict()}, start)
    values = GIVEN.get(request.param, TARGET)
    if "{start}" in values:  # a path with a comma, by a file
        file = tmp_path / "given, too.json"
        file.write_text(json.dumps({"start_from": str(start)}))
        values = values.replace(",start_from={start}", "") + f",@{file}"
    monkeypatch.setenv("nnunet_sauron", TRAINING + values)
    small = type(request.param, (OnRandomPatches, getattr(trainers, request.param)), {})
    trainer = small_trainer(tmp_path, small)
    trainer.run_training()
    monkeypatch.delenv("nnunet_sauron")
    return small, trainer, tmp_path


@pytest.mark.parametrize("name", ["StockTrainer", "ShrinkTrainer"])
def test_it_is_not_continued_as_another_one_before_its_first_checkpoint(tmp_path, monkeypatch, name):
    """nnU-Net begins a new training then, which in a shell without the variable has the default settings."""
    tmp_path = tmp_path / "it's"  # which a shell must get quoted
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setenv("nnUNet_compile", "f")
    target = {"target_macs": 0.4} if name == "ShrinkTrainer" else {}
    small = type(name, (OnRandomPatches, getattr(trainers, name)), {"num_epochs": 3, **target})
    monkeypatch.setenv("nnunet_sauron", "num_epochs=2,initial_lr=0.002")
    first = small_trainer(tmp_path, small)
    first.on_train_start()  # and it is ended here
    fold = Path(first.output_folder)
    written = (fold / "settings.json").read_text()

    monkeypatch.delenv("nnunet_sauron")
    again = small_trainer(tmp_path, small)
    again.logger.resume = True  # as --c sets it
    refused = r"no checkpoint to continue .*initial_lr=0.002 \(now 0.01\).*without --c"
    with pytest.raises(ValueError, match=refused) as error:
        again.run_training()
    words = shlex.split(str(error.value).partition("without --c, or give them again: ")[2])
    assert f"nnunet_sauron=@{fold / 'settings.json'}" in words and words[-1] == "--c"
    assert (fold / "settings.json").read_text() == written
    monkeypatch.setenv("nnunet_sauron", f"@{fold / 'settings.json'}")
    again = small_trainer(tmp_path, small)
    again.logger.resume = True  # as --c sets it
    again.on_train_start()

    monkeypatch.delenv("nnunet_sauron")
    small_trainer(tmp_path, small).on_train_start()  # anew, without --c
    log = log_of(again)
    assert "WARNING: an earlier training in this folder had other settings: num_epochs=2 (now 3)" in log


def settings_of(trainer) -> dict:
    return trainer.settings_now()


def test_it_keeps_its_settings_in_every_shell(begun, monkeypatch):
    small, trainer, folder = begun
    fold = Path(trainer.output_folder)
    settings = settings_of(trainer)

    # They stand in its folder, and a new training with that file has the same ones.
    written = json.loads((fold / "settings.json").read_text())
    assert written == settings and written["num_epochs"] == 2 and written["initial_lr"] == 0.002
    monkeypatch.setenv("nnunet_sauron", f"@{fold / 'settings.json'}")
    assert settings_of(small_trainer(folder, small)) == settings

    # --c, --val and --val_best without the variable; where the model that it started from is gone.
    monkeypatch.delenv("nnunet_sauron")
    shutil.rmtree(folder / "start, here", ignore_errors=True)
    for checkpoint in ("checkpoint_final.pth", "checkpoint_best.pth"):
        again = small_trainer(folder, small)
        again.load_checkpoint(str(fold / checkpoint))
        assert settings_of(again) == settings
        weights = torch.load(fold / checkpoint, weights_only=False)["network_weights"]
        assert {name: tensor.shape for name, tensor in again.network.state_dict().items()} == {
            name: tensor.shape for name, tensor in weights.items()
        }

    # A finished training does nothing more.
    again = small_trainer(folder, small)
    again.load_checkpoint(str(fold / "checkpoint_final.pth"))
    before = {name: tensor.clone() for name, tensor in again.network.state_dict().items()}
    again.train_step = None
    again.run_training()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.network.state_dict().items())
    assert json.loads((fold / "settings.json").read_text()) == written

    # The file of the training changes nothing, even though it names what is gone.
    monkeypatch.setenv("nnunet_sauron", f"@{fold / 'settings.json'},save_every=3")
    again = small_trainer(folder, small)
    again.load_checkpoint(str(fold / "checkpoint_final.pth"))
    assert settings_of(again) == {**settings, "save_every": 3}
    again.run_training()
    log = log_of(again)
    assert "Changed from here on: save_every=3 (before: 1)" in log
    assert json.loads((fold / "settings.json").read_text())["save_every"] == 3

    # Another start would be no start at all.
    if "start_from" in settings:
        monkeypatch.setenv("nnunet_sauron", "start_from=/elsewhere")
        with pytest.raises(ValueError, match=r"begun with start_from=.*start.pth \(now /elsewhere\)"):
            small_trainer(folder, small).load_checkpoint(str(fold / "checkpoint_final.pth"))

    # Another length is refused with both.
    monkeypatch.setenv("nnunet_sauron", "num_epochs=9,initial_lr=0.5")
    with pytest.raises(ValueError, match=r"initial_lr=0.002 \(now 0.5\), num_epochs=2 \(now 9\)"):
        small_trainer(folder, small).load_checkpoint(str(fold / "checkpoint_final.pth"))


@pytest.mark.parametrize("name", ["SFPTrainer", "STAMPTrainer"])
def test_widths_from_a_file_that_is_gone_are_known_to_the_checkpoint(folder, monkeypatch, name):
    other = small_trainer(folder, type("Other", (OnRandomPatches, trainers.L1Trainer), {"num_epochs": 2, "rate": 0.5}))
    other.run_training()
    source = Path(other.output_folder) / "checkpoint_final.pth"
    small = type(name, (OnRandomPatches, getattr(trainers, name)), {"num_epochs": 5})
    monkeypatch.setenv("nnunet_sauron", f"widths_from={source},save_every=1")
    trainer = small_trainer(folder, small)
    end, copied = trainer.on_epoch_end, folder / "interrupted.pth"

    def end_epoch():
        end()
        if trainer.current_epoch == 2:
            shutil.copy(Path(trainer.output_folder) / "checkpoint_latest.pth", copied)

    trainer.on_epoch_end = end_epoch
    trainer.run_training()
    source.unlink()
    for variable in (None, f"widths_from={source}"):  # with the variable, too: nnU-Net continues what it finds
        monkeypatch.delenv("nnunet_sauron") if variable is None else monkeypatch.setenv("nnunet_sauron", variable)
        again = small_trainer(folder, small)
        again.load_checkpoint(str(copied))
        again.run_training()
        assert channel_layout(again.network).widths == channel_layout(other.network).widths
    # A training that begins needs it, also where an older one lies.
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        small_trainer(folder, small).initialize()
    shutil.rmtree(again.output_folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        small_trainer(folder, small)
    assert not Path(again.output_folder).exists()


@pytest.mark.parametrize("base", [CompressedTrainer, ShrinkTrainer], ids=lambda c: c.__name__)
def test_a_start_that_is_gone_is_missed_where_a_training_begins(folder, monkeypatch, base):
    small = type("Small", (OnRandomPatches, base), {"num_epochs": 3})
    (folder / "results/Dataset001_Random/Small__nnUNetPlans__2d/fold_0").mkdir(parents=True)
    (folder / "results/Dataset001_Random/Small__nnUNetPlans__2d/fold_0/checkpoint_best.pth").touch()
    monkeypatch.setenv("nnunet_sauron", f"start_from={folder / 'gone.pth'}" + (
        ",target_macs=0.4" if base is ShrinkTrainer else ""
    ))  # fmt: skip
    trainer = small_trainer(folder, small)
    with pytest.raises(FileNotFoundError, match="no checkpoint .*gone.pth"):
        trainer.run_training()


@pytest.mark.parametrize("name", ["ShrinkTrainer", "STAMPTrainer", "CompressedTrainer", "StockTrainer"])
def test_other_plans_of_the_same_name_are_refused(tmp_path, monkeypatch, name):
    """A network that takes a checkpoint's widths would go on as if nothing had changed."""
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setenv("nnUNet_compile", "f")
    target = {"target_macs": 0.4} if name == "ShrinkTrainer" else {}
    small = type(name, (OnRandomPatches, getattr(trainers, name)), {"num_epochs": 2, **target})
    first = small_trainer(tmp_path, type("StockTrainer", (OnRandomPatches, StockTrainer), {"num_epochs": 1}))
    first.initialize()
    torch.save({"network_weights": first.network.state_dict()}, tmp_path / "start.pth")
    settings = f"start_from={tmp_path / 'start.pth'},teacher=None" if name == "CompressedTrainer" else "save_every=1"
    monkeypatch.setenv("nnunet_sauron", settings)
    trainer = small_trainer(tmp_path, small)
    trainer.run_training()
    monkeypatch.delenv("nnunet_sauron")
    again = small_trainer(tmp_path, small, widths=(8, 10, 12))
    refused = (ValueError, RuntimeError)  # nnU-Net's own of a network that does not fit
    with pytest.raises(refused, match=r"features_per_stage=\[6, 8, 10\] \(now \[8, 10, 12\]\)|size mismatch"):
        again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    small_trainer(tmp_path, small).load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
