"""What every pruning trainer promises, each in process on nnU-Net's own training loop with random patches."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from nnunet_sauron import trainers
from nnunet_sauron.pruning import CostModel, channel_layout
from nnunet_sauron.trainers import PruningTrainer

from .small import BATCH, SIDE, OnRandomPatches, RandomPatches, SmallTrainer, set_folders, small_trainer

TO_A_TARGET = [
    getattr(trainers, name)
    for name in trainers.__all__
    if name not in ("PruningTrainer", "SauronTrainer", "ShrinkTrainer", "StockTrainer", "CompressedTrainer")
]
TO_A_PART = [trainers.SauronTrainer, trainers.ShrinkTrainer]
EVERY = [SmallTrainer, *TO_A_PART, *TO_A_TARGET]
NETWORKS = [("plain", 2), ("resenc", 2), ("plain", 3), ("resenc", 3)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setenv("nnUNet_compile", "f")
    return tmp_path


def make(
    folder, trainer_class, architecture="plain", dim=2, widths=(6, 8, 10), norm="instance", **settings
) -> PruningTrainer:
    bases = (trainer_class,) if issubclass(trainer_class, OnRandomPatches) else (OnRandomPatches, trainer_class)
    if trainer_class in TO_A_PART:  # of so narrow a network hardly a tenth can be left
        settings = {"target_macs": 0.4, **settings}
    # Under its own name, which nnU-Net writes into the checkpoint.
    small = type(trainer_class.__name__, bases, settings)
    return small_trainer(folder, small, widths=widths, architecture=architecture, dim=dim, norm=norm)


def uninterrupted(folder, trainer_class, after: int, **options) -> tuple[PruningTrainer, Path]:
    """A whole training, and its checkpoint after an epoch: from there on with new random numbers and patches, as a
    resumed run has them."""
    trainer = make(folder, trainer_class, save_every=1, **options)
    end, copied = trainer.on_epoch_end, folder / "interrupted.pth"

    def end_epoch():
        end()
        if trainer.current_epoch == after + 1:
            shutil.copy(Path(trainer.output_folder) / "checkpoint_latest.pth", copied)
            trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
            torch.manual_seed(1)

    trainer.on_epoch_end = end_epoch
    trainer.run_training()
    return trainer, copied


@pytest.mark.parametrize("trainer_class", EVERY, ids=lambda c: c.__name__)
class TestEveryTrainer:
    @pytest.mark.parametrize(("architecture", "dim"), NETWORKS, ids=lambda v: str(v))
    def test_it_prunes_trains_and_its_checkpoint_is_plain_nnunets(self, folder, trainer_class, architecture, dim):
        trainer = make(folder, trainer_class, architecture, dim, num_epochs=5, num_iterations_per_epoch=2)
        trainer.initialize()
        keys = list(trainer.network.state_dict())
        trainer.run_training()
        widths = channel_layout(trainer.network).widths
        assert sum(widths.values()) < sum(trainer.dense_widths.values())
        assert trainer.history()[-1]["widths"] == widths
        assert not any(record["keep"] for record in trainer.history()[-1:])
        assert list(trainer.network.state_dict()) == keys
        for parameter, state in trainer.optimizer.state.items():
            assert state["momentum_buffer"].shape == parameter.shape

        checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
        fresh = type(trainer).build_network_architecture(*self.architecture(trainer))
        fresh.load_state_dict(checkpoint["network_weights"])
        x = torch.randn((BATCH, 1, *[SIDE] * dim))
        trainer.network.eval()
        fresh.eval()
        with torch.no_grad():
            torch.testing.assert_close(fresh(x)[0], trainer.network(x)[0])

    def architecture(self, trainer) -> tuple:
        heads = trainer.label_manager.num_segmentation_heads
        return trainer.plans_manager, trainer.configuration_manager, trainer.num_input_channels, heads, True

    def test_every_tensor_learns_after_the_last_cut(self, folder, trainer_class):
        trainer = make(folder, trainer_class)
        trainer.run_training()
        before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
        trainer.network.train()
        trainer.optimizer.param_groups[0]["lr"] = 0.01
        for _ in range(2):
            trainer.train_step(next(RandomPatches(trainer, 7)))
        # A convolution's bias before an instance norm has no effect, and moves by its weight decay alone.
        # nnU-Net gives the output of the lowest resolution no weight in the loss.
        learns = {n: p for n, p in trainer.network.named_parameters() if p.ndim > 1 and "seg_layers.0" not in n}
        still = [name for name, parameter in learns.items() if torch.equal(parameter, before[name])]
        assert not still

    def test_a_resumed_run_goes_on_as_if_nothing_had_happened(self, folder, trainer_class):
        whole, checkpoint = uninterrupted(folder, trainer_class, after=2)
        resumed = make(folder, trainer_class)
        resumed.load_checkpoint(str(checkpoint))
        torch.manual_seed(1)
        resumed.run_training()
        for a, b in zip(whole.history(), resumed.history(), strict=True):
            assert {k: v for k, v in a.items() if k not in ("state", "settings")} == {
                k: v for k, v in b.items() if k not in ("state", "settings")
            }
        for (name, a), b in zip(whole.network.named_parameters(), resumed.network.parameters(), strict=True):
            assert torch.equal(a, b), name

    def test_folds_of_different_widths_load_into_one_network(self, folder, trainer_class):
        weights = []
        for epochs in (3, 6):
            trainer = make(folder, trainer_class, num_epochs=epochs)
            trainer.run_training()
            weights.append(copy.deepcopy(trainer.network.state_dict()))
        network = type(trainer).build_network_architecture(*self.architecture(trainer))
        for state in [*weights, weights[0]]:
            network.load_state_dict(state)
            assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("trainer_class", TO_A_TARGET, ids=lambda c: c.__name__)
class TestTargets:
    @pytest.mark.parametrize(
        "target", [{"rate": 0.5}, {"target_channels": 0.6}, {"target_parameters": 0.5}, {"target_macs": 0.6}],
        ids=lambda t: next(iter(t)),
    )  # fmt: skip
    def test_it_is_met_and_hardly_overshot(self, folder, trainer_class, target):
        trainer = make(folder, trainer_class, widths=(12, 16, 20), transposed_convolutions=True, **target)
        trainer.run_training()
        dense, last = trainer.dense_widths, trainer.history()[-1]
        cost = CostModel(trainer.network, [SIDE] * 2, 1)
        if "rate" in target:
            assert last["widths"] == {name: round(width / 2) for name, width in dense.items()}
            return
        measures = {
            "target_channels": (sum(last["widths"].values()), sum(dense.values())),
            "target_parameters": (last["parameters"], trainer.dense_cost[0]),
            "target_macs": (last["macs"], trainer.dense_cost[1]),
        }
        assert cost.macs(last["widths"]) == last["macs"]
        ((name, wanted),) = target.items()
        left = measures[name][0] / measures[name][1]
        assert wanted - 0.08 < left <= wanted

    def test_widths_are_taken_from_another_model(self, folder, trainer_class):
        other = make(folder, SmallTrainer, num_epochs=4)
        other.run_training()
        checkpoint = str(Path(other.output_folder) / "checkpoint_final.pth")
        trainer = make(folder, trainer_class, widths_from=checkpoint, num_epochs=4)
        trainer.run_training()
        assert channel_layout(trainer.network).widths == channel_layout(other.network).widths

    def test_widths_stay_at_multiples(self, folder, trainer_class):
        trainer = make(folder, trainer_class, widths=(16, 24, 32), round_to=8, target_channels=0.7, num_epochs=4)
        trainer.run_training()
        assert all(width % 8 == 0 for width in trainer.history()[-1]["widths"].values())
        assert trainer.history()[-1]["widths"] != trainer.dense_widths

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"target_channels": 0.001}, "target_channels=0.001 cannot be met"),
            ({"target_macs": 1.5}, "target_macs is the part that stays"),
            ({"rate": 1.0}, "rate is the part"),
            ({"rate": 0.5, "target_macs": 0.5}, "choose one"),
            ({"num_epochs": 1}, "no epoch after which to cut"),
            ({"widths_from": "nowhere.pth"}, "no checkpoint nowhere.pth"),
        ],
        ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
    )
    def test_what_cannot_be_met_is_refused_before_anything_is_written(self, folder, trainer_class, settings, words):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            make(folder, trainer_class, **settings)
        assert not any((folder / "results").iterdir())

    def test_widths_of_another_topology_are_refused(self, folder, trainer_class):
        other = make(folder, SmallTrainer, widths=(4, 6), num_epochs=1)
        other.run_training()
        checkpoint = str(Path(other.output_folder) / "checkpoint_final.pth")
        with pytest.raises(ValueError, match="another topology"):
            make(folder, trainer_class, widths_from=checkpoint)


def test_csgd_moves_the_filters_of_a_cluster_alike(folder):
    trainer = make(folder, trainers.CSGDTrainer, eps=1e-9, weight_decay=0.0)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    clusters = trainer.method.state()["clusters"]
    name, labels = next(iter(clusters.items()))
    weight = trainer.network.get_submodule(name).conv.weight
    before = weight.detach().clone()
    trainer.network.train()
    trainer.train_step(next(RandomPatches(trainer, 7)))
    moved = (weight.detach() - before).flatten(1)
    assert len(set(labels)) < len(labels)
    for one, label in enumerate(labels):
        for other in range(one):
            if labels[other] == label:
                torch.testing.assert_close(moved[one], moved[other], rtol=1e-3, atol=1e-7)
    assert moved.abs().max() > 1e-5


def test_the_contract_covers_every_trainer_of_the_shim():
    from nnunet_sauron.plugin import trainer_names

    assert set(trainer_names()) == {c.__name__ for c in TO_A_TARGET} | {
        "SauronTrainer",
        "ShrinkTrainer",
        "StockTrainer",
        "CompressedTrainer",
    }
