from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_sauron.model.checkpoints import densify_checkpoint, read_checkpoint
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning import channel_layout

from ..compression.small_model import write_model
from ..trainers.small import BATCH, SIDE, set_folders, small_trainer


def test_checkpoints_nearby_are_named_where_there_is_none_of_that_name(tmp_path):
    model = tmp_path / "model"
    for name in ("fold_0/checkpoint_best.pth", "fold_2/checkpoint_final.pth"):
        (model / name).parent.mkdir(parents=True)
        (model / name).touch()
    both = f"{model}/fold_0/checkpoint_best.pth, {model}/fold_2/checkpoint_final.pth"
    for fold in ("fold_0", "fold_1"):
        missing = model / fold / "checkpoint_final.pth"
        with pytest.raises(FileNotFoundError, match=f"no checkpoint {missing}. Found: {both}; name one of these"):
            read_checkpoint(missing)
    for folder in (model, model / "fold_1"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=f"{folder} is a folder, .* name one of its .pth files: {both}"):
            read_checkpoint(folder)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*gone.pth. Name the .pth file of a trained model"):
        read_checkpoint(tmp_path / "gone.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_that_were_saved_with_a_wrapper_are_read(tmp_path, prefix):
    model = write_model(tmp_path / "model")
    path = model / "fold_0/checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    wrapped = {prefix + name: tensor for name, tensor in checkpoint["network_weights"].items()}
    torch.save({**checkpoint, "network_weights": wrapped}, path)
    network = TrainedModel.read(model).network("0")
    assert all(torch.equal(network.state_dict()[name], one) for name, one in checkpoint["network_weights"].items())


def test_a_densified_checkpoint_has_its_plans_widths_and_the_same_output(tmp_path, monkeypatch):
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setenv("nnUNet_compile", "f")
    trainer = small_trainer(tmp_path)
    trainer.run_training()
    assert channel_layout(trainer.network).widths != trainer.dense_widths
    pruned, dense = Path(trainer.output_folder) / "checkpoint_final.pth", tmp_path / "dense.pth"
    densify_checkpoint(pruned, dense)

    checkpoint = torch.load(dense, weights_only=False)
    assert checkpoint["optimizer_state"] is None
    # Stock nnU-Net's network, which takes nothing but its own widths.
    stock = nnUNetTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, trainer.label_manager.num_segmentation_heads, True
    )
    stock.load_state_dict(checkpoint["network_weights"])
    assert channel_layout(stock).widths == trainer.dense_widths
    x = torch.randn((BATCH, 1, SIDE, SIDE))
    stock.eval()
    trainer.network.eval()
    with torch.no_grad():
        for a, b in zip(stock(x), trainer.network(x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)

    before = dense.read_bytes()
    with pytest.raises(FileExistsError, match=r"dense\.pth exists; give the name of a file that does not"):
        densify_checkpoint(pruned, dense)
    assert dense.read_bytes() == before


def test_a_full_disk_is_told_with_an_option_that_the_command_has(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    pruned = write_model(tmp_path / "model") / "fold_0/checkpoint_final.pth"
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"dense\.pth: No space left.* then give the same command again"):
        densify_checkpoint(pruned, tmp_path / "dense.pth")
