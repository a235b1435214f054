"""StockTrainer and CompressedTrainer, continued in a shell without the variable or with another one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nnunet_sauron.pruning import channel_layout
from nnunet_sauron.trainers import CompressedTrainer, StockTrainer

from .small import OnRandomPatches, set_folders, small_trainer

GIVEN = "num_epochs=3,initial_lr=0.002,save_every=1"


@pytest.fixture(params=[StockTrainer, CompressedTrainer], ids=lambda c: c.__name__)
def begun(request, tmp_path, monkeypatch):
    """A trainer class, and a finished training of it."""
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setenv("nnUNet_compile", "f")
    small = type("Small", (OnRandomPatches, request.param), {"num_epochs": 6})
    setting = GIVEN
    if request.param is CompressedTrainer:
        network = small_trainer(tmp_path, type("Start", (OnRandomPatches, StockTrainer), {}))
        network.initialize()
        torch.save({"network_weights": network.network.state_dict()}, tmp_path / "start.pth")
        setting += f",start_from={tmp_path / 'start.pth'}"
    monkeypatch.setenv("nnunet_sauron", setting)
    trainer = small_trainer(tmp_path, small)
    trainer.run_training()
    monkeypatch.delenv("nnunet_sauron")
    return small, trainer, tmp_path


def continued(small, trainer, folder, initialize=False):
    again = small_trainer(folder, small)
    if initialize:
        again.initialize()
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    return again


@pytest.mark.parametrize("initialize", [False, True])
def test_settings_come_from_the_checkpoint(begun, initialize):
    small, trainer, folder = begun
    again = continued(small, trainer, folder, initialize)
    assert again.settings_now() == trainer.settings_now()
    assert (again.num_epochs, again.initial_lr) == (3, 0.002)
    assert again.lr_scheduler.max_steps == 3 and again.lr_scheduler.initial_lr == 0.002


def test_a_finished_training_stays_finished(begun):
    small, trainer, folder = begun
    again = continued(small, trainer, folder)
    before = {name: tensor.clone() for name, tensor in again.network.state_dict().items()}
    again.run_training()
    assert len(again.kept_settings()) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.network.state_dict().items())


def test_a_training_begun_over_a_finished_one_is_not_thrown_away(begun):
    """nnU-Net's --c takes checkpoint_final.pth, and removes checkpoint_latest.pth at its end."""
    small, trainer, folder = begun
    final, latest = (Path(trainer.output_folder) / f"checkpoint_{name}.pth" for name in ("final", "latest"))
    latest.write_bytes(final.read_bytes())
    again = continued(small, trainer, folder)
    with pytest.raises(ValueError, match="of another one that was begun later.*move checkpoint_final.pth away"):
        again.run_training()
    assert latest.is_file()
    os.utime(latest, (1, 1))  # of the finished training, which a full disk kept from being removed
    continued(small, trainer, folder).run_training()


def test_what_cannot_change_is_refused_and_what_can_is_taken(begun, monkeypatch):
    small, trainer, folder = begun
    monkeypatch.setenv("nnunet_sauron", "num_epochs=9")
    with pytest.raises(ValueError, match=r"num_epochs=3 \(now 9\)"):
        continued(small, trainer, folder)
    monkeypatch.setenv("nnunet_sauron", "save_every=5")
    assert continued(small, trainer, folder).save_every == 5


def test_a_training_of_a_time_without_kept_settings_is_continued(begun):
    small, trainer, folder = begun
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["logging"]["settings"]
    torch.save(checkpoint, path)
    again = continued(small, trainer, folder)
    again.run_training()
    assert again.kept_settings()[:3] == [{}] * 3 and len(again.kept_settings()) == 6
    assert channel_layout(again.bare_network).widths == channel_layout(trainer.bare_network).widths
