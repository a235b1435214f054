"""CompressedTrainer in process: it goes on from a compressed checkpoint at that checkpoint's widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnunet_sauron.pruning import channel_layout, remove_channels
from nnunet_sauron.trainers import CompressedTrainer

from .small import OnRandomPatches, set_folders, small_trainer


class SmallCompressedTrainer(OnRandomPatches, CompressedTrainer):
    num_epochs = 3


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setenv("nnUNet_compile", "f")
    return tmp_path


@pytest.fixture
def model(folder) -> Path:
    """The folder of a model whose network is narrower than its plans."""
    trainer = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    trainer.initialize()
    remove_channels(trainer.network, {name: range(1, w) for name, w in channel_layout(trainer.network).widths.items()})
    written = folder / "small" / "fold_0"
    written.mkdir(parents=True)
    torch.save({"network_weights": trainer.network.state_dict()}, written / "checkpoint_final.pth")
    return written.parent


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=False)["network_weights"]


def start(folder, monkeypatch, given, **changes):
    monkeypatch.setenv("nnunet_sauron", f"start_from={given}")
    return small_trainer(folder, type("T", (SmallCompressedTrainer,), changes))


def test_it_begins_with_the_compressed_weights_at_a_tenth_of_the_rate(folder, model, monkeypatch):
    for given in (model, model / "fold_0" / "checkpoint_final.pth"):
        trainer = start(folder, monkeypatch, given)
        trainer.initialize()
        begun = trainer.network.state_dict()
        for name, tensor in weights(model / "fold_0" / "checkpoint_final.pth").items():
            assert torch.equal(begun[name], tensor)
        assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == {
            id(p) for p in trainer.network.parameters()
        }
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_by_default_it_trains_for_50_epochs(folder, model, monkeypatch):
    monkeypatch.setenv("nnunet_sauron", f"start_from={model}")
    assert small_trainer(folder, type("T", (CompressedTrainer,), {})).num_epochs == 50


def test_it_trains_at_the_same_widths_and_continues_without_the_setting(folder, model, monkeypatch):
    compressed = weights(model / "fold_0" / "checkpoint_final.pth")
    trainer = start(folder, monkeypatch, model)
    trainer.run_training()
    final = Path(trainer.output_folder) / "checkpoint_final.pth"
    trained = weights(final)
    assert {n: t.shape for n, t in trained.items()} == {n: t.shape for n, t in compressed.items()}
    assert not torch.equal(trained["encoder.stages.0.0.convs.0.conv.weight"],
                           compressed["encoder.stages.0.0.convs.0.conv.weight"])  # fmt: skip

    monkeypatch.delenv("nnunet_sauron")
    resumed = small_trainer(folder, type("T", (SmallCompressedTrainer,), {"num_epochs": 4}))
    resumed.load_checkpoint(str(final))
    assert resumed.current_epoch == 3
    assert len(resumed.optimizer.state) > 20
    for parameter, state in resumed.optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape
    resumed.run_training()
    assert torch.load(final, weights_only=False)["current_epoch"] == 4


def test_without_a_start_it_says_what_to_name(folder, monkeypatch):
    monkeypatch.delenv("nnunet_sauron", raising=False)
    trainer = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    with pytest.raises(ValueError, match="nothing to start from.*start_from=MODEL_FOLDER"):
        trainer.run_training()


def test_another_architecture_is_refused(folder, model, monkeypatch):
    path = model / "fold_0" / "checkpoint_final.pth"
    torch.save({"network_weights": {k: v for k, v in weights(path).items() if "transpconvs" not in k}}, path)
    trainer = start(folder, monkeypatch, model)
    with pytest.raises(ValueError, match="another architecture than these plans"):
        trainer.initialize()


def test_a_missing_model_is_refused_before_a_log_is_written(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        start(folder, monkeypatch, folder / "nowhere")
    assert not list(folder.rglob("training_log*"))


def test_what_compress_wrote_can_be_validated_and_is_no_training_to_continue(folder, model):
    path = model / "fold_0" / "checkpoint_final.pth"
    torch.save({"network_weights": weights(path), "inference_allowed_mirroring_axes": (1,)}, path)
    trainer = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    trainer.load_checkpoint(str(path))
    assert all(torch.equal(tensor, weights(path)[name]) for name, tensor in trainer.network.state_dict().items())
    assert trainer.inference_allowed_mirroring_axes == (1,)
    with pytest.raises(ValueError, match="written by compress and is no training to continue"):
        trainer.run_training()


@pytest.mark.parametrize("axes", [None, (1,), (0, 1)])
def test_it_mirrors_as_the_model_that_was_compressed(folder, model, monkeypatch, axes):
    path = model / "fold_0" / "checkpoint_final.pth"
    torch.save({"network_weights": weights(path), "inference_allowed_mirroring_axes": axes}, path)
    mirror = "configure_rotation_dummyDA_mirroring_and_inital_patch_size"
    trainer = start(folder, monkeypatch, model)
    trainer.initialize()
    assert getattr(trainer, mirror)()[-1] == axes
    trainer.run_training()
    final = Path(trainer.output_folder) / "checkpoint_final.pth"
    assert torch.load(final, weights_only=False)["inference_allowed_mirroring_axes"] == axes

    monkeypatch.delenv("nnunet_sauron")
    resumed = small_trainer(folder, type("T", (SmallCompressedTrainer,), {}))
    resumed.load_checkpoint(str(final))
    assert getattr(resumed, mirror)()[-1] == axes


def test_a_checkpoint_that_says_nothing_of_mirroring_gets_nnunets(folder, model, monkeypatch):
    trainer = start(folder, monkeypatch, model)
    trainer.initialize()
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1] == (0, 1)
