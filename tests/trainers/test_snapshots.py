"""Snapshots of feature maps, taken by trainers in process on random patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from nnunet_sauron.model.snapshots import snapshots
from nnunet_sauron.pruning import channel_layout, remove_channels
from nnunet_sauron.trainers import CompressedTrainer, SauronTrainer, StockTrainer

from .small import BATCH, SIDE, OnRandomPatches, RandomPatches, SmallTrainer, log_of, small_trainer


def make(folder, trainer_class=SmallTrainer, dim=2, architecture="plain", **changes):
    class Seeded(trainer_class):
        def initialize(self):
            torch.manual_seed(0)
            super().initialize()

    return small_trainer(folder, type("T", (Seeded,), changes), dim=dim, architecture=architecture)


def trained(folder, trainer_class=SmallTrainer, **changes):
    trainer = make(folder, trainer_class, **changes)
    trainer.run_training()
    return trainer


def maps_folder(trainer) -> Path:
    return Path(trainer.output_folder) / "feature_maps"


def taken(trainer) -> list[int]:
    return list(snapshots(maps_folder(trainer)))


def read(trainer, name: str) -> dict[str, np.ndarray]:
    with np.load(maps_folder(trainer) / name) as file:
        return dict(file)


class SmallStock(OnRandomPatches, StockTrainer):
    pass


class SmallCompressed(OnRandomPatches, CompressedTrainer):
    pass


@pytest.mark.parametrize(
    ("every", "epochs", "expected"), [(2, 5, [0, 2, 4, 5]), (2, 4, [0, 2, 4]), (1, 2, [0, 1, 2]), (9, 2, [0, 2])]
)
def test_before_the_first_epoch_every_few_and_after_the_last(folder, every, epochs, expected):
    trainer = trained(folder, snapshot_every=every, num_epochs=epochs)
    assert taken(trainer) == expected
    assert (maps_folder(trainer) / "epoch_0000.npz").exists()


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("architecture", ["plain", "resenc"])
def test_a_snapshot_holds_every_units_maps_of_the_network_of_that_epoch(folder, dim, architecture):
    trainer = trained(folder, snapshot_every=1, num_epochs=3, dim=dim, architecture=architecture)
    most = {2: 8, 3: 4}[dim]
    sides = {"encoder.stages.0.0.convs.0": 16, "encoder.stages.1.0.convs.0": 8, "encoder.stages.2.0.convs.0": 4}
    for epoch, widths in enumerate([trainer.dense_widths, *(record["widths"] for record in trainer.history())]):
        maps = read(trainer, f"epoch_{epoch:04d}.npz")
        assert {name: array.shape[1] for name, array in maps.items()} == widths
        assert all(array.dtype == np.float16 and len(array) == BATCH for array in maps.values())
        for name, side in sides.items():
            if name in maps:
                assert maps[name].shape[2:] == (min(side, most),) * dim
    assert sum(widths.values()) < sum(trainer.dense_widths.values())


def test_a_stored_map_is_the_pooled_output_of_the_layer_in_evaluation(folder):
    trainer = trained(folder, snapshot_every=6)
    seen = {}
    for unit in channel_layout(trainer.network).units:
        trainer.network.get_submodule(unit.feature_maps[0]).register_forward_hook(
            lambda m, i, out, name=unit.name: seen.update({name: out})
        )
    patches = torch.from_numpy(read(trainer, "patches.npz")["data"])
    assert patches.shape == (BATCH, 1, SIDE, SIDE)
    with torch.no_grad():
        trainer.network.eval()(patches)
    stored = read(trainer, "epoch_0006.npz")
    assert list(stored) == list(seen)
    for name, maps in stored.items():
        size = min(8, seen[name].shape[-1])
        expected = functional.adaptive_avg_pool2d(seen[name], size)
        np.testing.assert_allclose(maps, expected.numpy(), rtol=1e-3, atol=1e-4)
    # The first snapshot is of the untrained network.
    torch.manual_seed(0)
    fresh = make(folder)
    fresh.initialize()
    block = fresh.network.encoder.stages[0][0].convs[0]
    with torch.no_grad():
        expected = functional.adaptive_avg_pool2d(block(patches), 8)
    first = read(trainer, "epoch_0000.npz")["encoder.stages.0.0.convs.0"]
    np.testing.assert_allclose(first, expected.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("trainer_class", [SmallTrainer, SmallStock])
def test_the_training_is_the_same_with_and_without(folder, trainer_class):
    # The one batch that is drawn shifts the validation's own patches; what the network learns from is the same.
    without = trained(folder, trainer_class, num_epochs=4)
    assert not maps_folder(without).exists()
    random_state = torch.get_rng_state()
    with_snapshots = trained(folder, trainer_class, num_epochs=4, snapshot_every=1)
    assert taken(with_snapshots) == [0, 1, 2, 3, 4]
    assert torch.equal(torch.get_rng_state(), random_state)
    for (name, a), b in zip(without.network.named_parameters(), with_snapshots.network.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_network_is_left_as_it_was(folder):
    trainer = make(folder, SmallStock, snapshot_every=1)
    trainer.on_train_start()
    trainer.network.train()
    (maps_folder(trainer) / "epoch_0000.npz").unlink()
    during = []
    block = trainer.network.encoder.stages[0]
    watch = block.register_forward_hook(lambda module, i, out: during.append((module.training, out.is_inference())))
    random_state = torch.get_rng_state()
    trainer._snapshots.after_epoch()
    watch.remove()
    assert taken(trainer) == [0] and during == [(False, True)]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in trainer.network.modules())
    assert trainer.network.decoder.deep_supervision
    assert not any(module._forward_hooks for module in trainer.network.modules())
    trainer.network.eval()
    trainer._snapshots.after_epoch()
    assert not trainer.network.training


def other_patches(trainer):
    return RandomPatches(trainer, 0), RandomPatches(trainer, 200)


class Interrupted(SmallTrainer):
    """Stops after so many epochs, as a crash would."""

    def on_epoch_end(self):
        super().on_epoch_end()
        if self.current_epoch == 3:
            raise KeyboardInterrupt


def test_patches_stay_the_same_when_a_training_is_continued(folder):
    with pytest.raises(KeyboardInterrupt):
        trained(folder, Interrupted, snapshot_every=1, save_every=2)
    # Drawn again, the patches would be others.
    resumed = make(folder, type("Elsewhere", (SmallTrainer,), {"get_dataloaders": other_patches}), snapshot_every=1)
    patches, early = read(resumed, "patches.npz"), read(resumed, "epoch_0002.npz")
    assert taken(resumed) == [0, 1, 2, 3]
    # After epoch 2, but a cut's checkpoint was written after epoch 3, before its snapshot was.
    (maps_folder(resumed) / "epoch_0003.npz").unlink()
    (maps_folder(resumed) / "epoch_0099.npz").write_bytes(b"of a longer training")
    (maps_folder(resumed) / "patches.npz.tmp").write_bytes(b"half")
    resumed.load_checkpoint(str(Path(resumed.output_folder) / "checkpoint_latest.pth"))
    resumed.run_training()
    assert taken(resumed) == [0, 1, 2, 3, 4, 5, 6]
    assert np.array_equal(read(resumed, "patches.npz")["data"], patches["data"])
    assert not list(maps_folder(resumed).glob("*.tmp"))
    assert all(np.array_equal(early[name], again) for name, again in read(resumed, "epoch_0002.npz").items())
    assert {name: len(a[0]) for name, a in read(resumed, "epoch_0003.npz").items()} == resumed.history()[2]["widths"]


def test_a_new_training_removes_the_snapshots_of_the_old_one(folder):
    old = trained(folder, snapshot_every=1, num_epochs=3)
    (maps_folder(old) / "patches.npz").write_bytes(b"to be drawn anew")
    new = trained(folder, snapshot_every=2, num_epochs=2)
    assert taken(new) == [0, 2]
    assert read(new, "patches.npz")["data"].shape == (BATCH, 1, SIDE, SIDE)
    without = trained(folder, num_epochs=1)
    assert not list(maps_folder(without).iterdir())


def test_a_finished_training_that_is_continued_gets_its_last_snapshot(folder, monkeypatch):
    trainer = trained(folder, num_epochs=2)
    monkeypatch.setenv("nnunet_sauron", "snapshot_every=10")
    again = make(folder, num_epochs=2)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    again.run_training()
    assert taken(again) == [2]


def test_a_compressed_model_that_is_trained_on_keeps_its_maps(folder, monkeypatch):
    narrow = make(folder)
    narrow.initialize()
    remove_channels(narrow.network, {n: range(1, w) for n, w in channel_layout(narrow.network).widths.items()})
    torch.save({"network_weights": narrow.network.state_dict()}, folder / "narrow.pth")
    monkeypatch.setenv("nnunet_sauron", f"start_from={folder / 'narrow.pth'},snapshot_every=2")
    trainer = trained(folder, SmallCompressed, num_epochs=3)
    assert taken(trainer) == [0, 2, 3]
    widths = channel_layout(narrow.network).widths
    assert {name: array.shape[1] for name, array in read(trainer, "epoch_0000.npz").items()} == widths


def test_a_snapshot_that_cannot_be_written_is_a_warning(folder, monkeypatch):
    calls = []

    def full_disk(file, **arrays):
        calls.append(file)
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(file, **arrays)

    real = np.savez
    monkeypatch.setattr(np, "savez", full_disk)
    trainer = trained(folder, snapshot_every=1, num_epochs=3)
    assert taken(trainer) == [0, 2, 3]
    assert "WARNING: Could not write" in log_of(trainer) and "epoch_0001.npz" in log_of(trainer)
    assert not list(maps_folder(trainer).glob("*.tmp"))


def test_where_no_folder_can_be_made_the_training_goes_on(folder):
    trainer = make(folder, snapshot_every=1, num_epochs=1)
    maps_folder(trainer).write_text("a file in the way")
    trainer.run_training()
    assert len(trainer.history()) == 1
    assert "WARNING: no feature maps are kept" in log_of(trainer)


def test_a_network_that_cannot_be_followed_keeps_none_and_says_so(folder):
    class OtherNetwork(SmallStock):
        def initialize(self):
            super().initialize()
            self.network.__class__ = type("NewUNet", (type(self.network),), {})

    trainer = trained(folder, OtherNetwork, snapshot_every=1, num_epochs=1)
    assert not maps_folder(trainer).exists()
    assert log_of(trainer).count("snapshot_every=1 has no effect") == 1
    assert "NewUNet" in log_of(trainer)


@pytest.mark.parametrize("trainer_class", [SauronTrainer, StockTrainer, CompressedTrainer])
def test_a_bad_setting_lists_the_valid_ones(folder, monkeypatch, trainer_class):
    for text, said in (("snapshot_every=0", "at least 1; got 0"), ("snapshot_every=x", "a whole number")):
        monkeypatch.setenv("nnunet_sauron", text)
        with pytest.raises(ValueError, match="(?s)" + f"{said}.*num_epochs=None.*snapshot_every=None"):
            small_trainer(folder, type("T", (trainer_class,), {}))


def test_only_the_first_rank_writes(folder):
    trainer = make(folder, SmallStock, snapshot_every=1)
    trainer.initialize()
    trainer.local_rank = 1
    trainer._snapshots.start()
    trainer._snapshots.after_epoch()
    assert not maps_folder(trainer).exists()


def test_wrappers_of_ddp_and_compile_are_looked_through(folder):
    trainer = make(folder, SmallStock)
    trainer.initialize()
    bare = trainer.network
    trainer.network = torch.compile(bare)
    assert trainer.bare_network is bare
    assert isinstance(trainer.bare_network, nn.Module)
