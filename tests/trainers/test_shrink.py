"""ShrinkTrainer in process: to its target whatever the loss does, and from a trained model, which is its teacher."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_sauron.model.checkpoints import MIRRORING
from nnunet_sauron.pruning import channel_layout
from nnunet_sauron.trainers import L1Trainer, SauronTrainer, SFPTrainer, ShrinkTrainer
from nnunet_sauron.trainers.decision import last_cut_epoch
from nnunet_sauron.trainers.removal import remove

from .small import Gelu, OnRandomPatches, RandomPatches, dataset_json, log_of, plans, small_trainer

WIDTHS = (12, 16, 20)


class Small(OnRandomPatches, ShrinkTrainer):
    num_epochs = 5
    target_macs = 0.4
    patches = 16


@pytest.fixture
def trained(folder) -> Path:
    """The folder of a trained model, at the plans' widths."""
    trainer = small_trainer(folder, Small, widths=WIDTHS)
    trainer.initialize()
    (folder / "dense" / "fold_0").mkdir(parents=True)
    init_args = {"plans": plans(WIDTHS), "configuration": "2d", "fold": 0, "dataset_json": dataset_json()}
    model = {"network_weights": trainer.network.state_dict(), "init_args": init_args, "trainer_name": "nnUNetTrainer"}
    torch.save(model, folder / "dense" / "fold_0" / "checkpoint_final.pth")
    return folder / "dense"


@pytest.mark.parametrize(
    ("trainer_class", "target"),
    [(ShrinkTrainer, {"target_macs": 0.4}), (SauronTrainer, {"target_macs": 0.4}), (L1Trainer, {"target_macs": 0.5}),
     (SFPTrainer, {"rate": 0.5})],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)  # fmt: skip
@pytest.mark.parametrize("guard", [{"max_loss_increase": 0.1}, {"max_fraction_per_epoch": 0.05}], ids=["loss", "cap"])
def test_guards_delay_cuts_and_the_target_is_met(folder, trainer_class, target, guard):
    class Worse(OnRandomPatches, trainer_class):
        num_epochs = 10
        patches = 16

        def on_train_epoch_end(self, outputs):
            if "max_loss_increase" in guard:  # from the second epoch on worse than the first
                for output in outputs:
                    output["loss"] = np.asarray(float(self.current_epoch > 0))
            super().on_train_epoch_end(outputs)

    trainer = small_trainer(folder, type("T", (Worse,), {**target, **guard}), widths=WIDTHS)
    trainer.run_training()
    history = trainer.history()
    ((name, asked),) = target.items()
    cuts = [bool(record["keep"]) for record in history]
    if "max_loss_increase" in guard:
        held = [record["held"] is not None and "above its lowest" in record["held"] for record in history]
        assert sum(held) >= 3 and sum(cuts[1:]) == 1  # but for the first epoch's, one cut: the last there may be
    else:
        for record in history[: last_cut_epoch(trainer)]:
            for unit, keep in record["keep"].items():
                width = record["widths"][unit]
                assert 0 < width - len(keep) <= round(0.05 * width)
        assert sum(cuts) >= 3 or trainer_class is SFPTrainer  # of whose small layers 5 % is no channel
    assert history[-1]["target"]["name"] == name
    if name == "target_macs":
        assert history[-1]["target"]["left"] == history[-1]["macs"] / trainer.dense_cost[1] <= asked
    else:
        assert history[-1]["widths"] == {n: round(w / 2) for n, w in trainer.dense_widths.items()}
    assert len(re.findall(rf"Target {name}=\S+ met: ", log_of(trainer))) == 1
    assert "missed" not in log_of(trainer)


def test_a_batch_that_is_not_finite_is_left_out_of_rankings_and_merges(folder):
    class Damaged(Small):
        def get_dataloaders(self):
            clean, validation = super().get_dataloaders()

            def damaged():
                for i in range(10**6):
                    batch = next(clean)
                    if trainer_is_measuring[0] and i % 3 == 0:
                        batch["data"][0, 0, 3, 3] = float("nan")
                    yield batch

            return damaged(), validation

        def train_step(self, batch):
            trainer_is_measuring[0] = False
            result = super().train_step({**batch, "data": batch["data"].nan_to_num()})
            return result

        def on_epoch_end(self):
            trainer_is_measuring[0] = True
            super().on_epoch_end()

    trainer_is_measuring = [False]
    trainer = small_trainer(folder, type("T", (Damaged,), {"max_loss_increase": None}), widths=WIDTHS)
    trainer.run_training()
    assert all(p.isfinite().all() for p in trainer.network.parameters())
    assert "batches hold values that are not finite" in log_of(trainer)
    assert trainer.history()[-1]["target"]["left"] <= 0.4


def test_without_a_finite_batch_what_goes_is_dropped(folder):
    trainer = small_trainer(folder, Small, widths=WIDTHS)
    trainer.initialize()
    batch = next(RandomPatches(trainer, 0))
    batch["data"].fill_(float("inf"))
    trainer.dataloader_train = iter([batch] * 100)
    remove(trainer, {"encoder.stages.0.0.convs.0": [0, 1]})
    assert channel_layout(trainer.network).widths["encoder.stages.0.0.convs.0"] == 2
    assert all(p.isfinite().all() for p in trainer.network.parameters())
    assert "dropped, not merged: there is no batch to fit on" in log_of(trainer)


def test_from_a_trained_model_it_begins_with_its_weights_and_has_it_as_teacher(folder, trained, monkeypatch):
    monkeypatch.setenv("nnunet_sauron", f"start_from={trained}")
    trainer = small_trainer(folder, Small, widths=WIDTHS)
    trainer.initialize()
    weights = torch.load(trained / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.network.state_dict().items())
    trainer.run_training()
    assert f"Started from {trained}" in log_of(trainer) and f"Teacher: {trained}" in log_of(trainer)
    assert trainer.history()[-1]["target"]["left"] <= 0.4
    (teacher,) = trainer._teacher.networks
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())


def test_the_teacher_is_part_of_what_is_learnt(folder, trained, monkeypatch):
    after = {}
    for teacher in ("start", "None"):
        monkeypatch.setenv("nnunet_sauron", f"start_from={trained},teacher={teacher}")
        trainer = small_trainer(folder, Small, widths=WIDTHS)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        torch.manual_seed(0)
        batch = next(RandomPatches(trainer, 3))
        # The old model's own output is at its own distance 0; a moved student is not.
        with torch.no_grad():
            trainer.network.encoder.stages[0][0].convs[0].conv.weight.add_(0.1)
        trainer.network.train()
        after[teacher] = (
            trainer.train_step(batch),
            trainer.network.state_dict()["encoder.stages.1.0.convs.0.conv.weight"],
        )
    assert after["start"][0]["distillation"] > 1e-3 and "distillation" not in after["None"][0]
    assert after["start"][0]["loss"] == pytest.approx(after["None"][0]["loss"], abs=1e-5)
    assert not torch.equal(after["start"][1], after["None"][1])


@pytest.mark.parametrize("given", ["start_from={}", "teacher={}"])
def test_a_training_that_is_continued_finds_its_teacher_without_the_setting(folder, trained, monkeypatch, given):
    monkeypatch.setenv("nnunet_sauron", f"{given.format(trained)},save_every=1")
    first = small_trainer(folder, type("T", (Small,), {"num_epochs": 3}), widths=WIDTHS)
    first.run_training()
    monkeypatch.delenv("nnunet_sauron")
    again = small_trainer(folder, type("T", (Small,), {}), widths=WIDTHS)
    again.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    again.num_epochs = 4  # as if the training had been a longer one
    again.run_training()
    assert len(again.history()) == 4 and again.history()[-1]["teacher"] == first.history()[-1]["teacher"]
    assert str(trained) in again.history()[-1]["teacher"] and again._teacher is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [("start_from=/nowhere.pth", "no checkpoint /nowhere.pth"), ("teacher=/nowhere", "There is no teacher at")],
)
def test_what_is_missing_is_named_before_a_log_is_written(folder, monkeypatch, settings, said):
    monkeypatch.setenv("nnunet_sauron", settings)
    with pytest.raises(FileNotFoundError, match=said):
        small_trainer(folder, Small, widths=WIDTHS)
    assert not any((folder / "results").iterdir())


def test_from_a_narrow_model_cuts_are_spread_from_its_own_size_on(folder, trained, monkeypatch):
    path = trained / "fold_0" / "checkpoint_final.pth"
    model = torch.load(path, weights_only=False)
    trainer = small_trainer(folder, Small, widths=WIDTHS)
    trainer.initialize()
    trainer.take_widths({name: width // 2 for name, width in trainer.dense_widths.items()})
    torch.save({**model, "network_weights": trainer.network.state_dict()}, path)
    monkeypatch.setenv("nnunet_sauron", f"start_from={trained},teacher=None")
    begun = trainer.planned.cost.macs(channel_layout(trainer.network).widths) / trainer.dense_cost[1]
    settings = {"num_epochs": 9, "cuts": 4, "target_macs": begun / 2, "max_loss_increase": None}
    cut = small_trainer(folder, type("T", (Small,), settings), widths=WIDTHS)
    cut.run_training()
    left = [record["target"]["left"] for record in cut.history() if record["keep"]]
    assert len(left) == 4
    for part, asked in zip(left, (2**-0.25, 2**-0.5, 2**-0.75, 0.5), strict=True):
        assert asked - 0.12 < part / begun <= asked

    # Below the target already: nothing is cut, so the learning rate does not start again.
    settings = {"num_epochs": 4, "target_macs": 0.9}
    whole = small_trainer(folder, type("T", (Small,), settings), widths=WIDTHS)
    whole.run_training()
    assert not any(record["keep"] for record in whole.history())
    rates = whole.series()["lrs"]
    assert rates == sorted(rates, reverse=True)
    assert f"It has {begun:.0%} of the multiply-accumulates of these plans' own network" in log_of(whole)
    assert "WARNING: it is no larger than target_macs=0.9 asks for: nothing will be cut" in log_of(whole)


def test_from_a_wide_model_into_lean_plans_every_cut_takes_its_part(folder, trained, monkeypatch):
    monkeypatch.setenv("nnunet_sauron", f"start_from={trained},teacher=None")
    settings = {"num_epochs": 9, "cuts": 4, "target_macs": 0.5, "max_loss_increase": None}
    lean = small_trainer(folder, type("T", (Small,), settings), widths=(6, 8, 10))
    lean.run_training()
    costs = [record["macs"] for record in lean.history()]
    factor = (0.5 / (costs[0] / lean.dense_cost[1])) ** 0.25
    left = [record["target"]["left"] * lean.dense_cost[1] for record in lean.history() if record["keep"]]
    assert costs[0] > 3 * lean.dense_cost[1] and len(left) == 4
    for i, part in enumerate(left, 1):
        assert 0.8 * factor**i < part / costs[0] <= factor**i
    assert "nothing will be cut" not in log_of(lean)


def test_another_architecture_is_refused_before_a_log_is_written(folder, trained, monkeypatch):
    monkeypatch.setenv("nnunet_sauron", f"start_from={trained},teacher=None")
    with pytest.raises(ValueError, match="another architecture than these plans"):
        small_trainer(folder, type("Other", (Small,), {}), widths=(12, 16, 20, 24))
    assert not list((folder / "results").rglob("Other*"))


def test_a_start_of_other_classes_is_named_as_that(folder, trained, monkeypatch):
    path = trained / "fold_0" / "checkpoint_final.pth"
    model = torch.load(path, weights_only=False)
    model["network_weights"] = {
        name: tensor[:2] if ".seg_layers." in name else tensor for name, tensor in model["network_weights"].items()
    }
    torch.save(model, path)
    monkeypatch.setenv("nnunet_sauron", f"start_from={trained},teacher=None")
    with pytest.raises(ValueError, match="has 2 outputs, and this data set needs 3: it was trained on Dataset001"):
        small_trainer(folder, type("Other", (Small,), {}), widths=WIDTHS)


@pytest.mark.parametrize("name", ["start_from", "teacher"])
def test_the_training_own_folder_is_no_start_and_no_teacher(folder, trained, monkeypatch, name):
    first = small_trainer(folder, type("T", (Small,), {"num_epochs": 2}), widths=WIDTHS)
    first.run_training()
    final = Path(first.output_folder) / "checkpoint_final.pth"
    before = final.read_bytes()
    for given in (Path(first.output_folder).parent, final):
        monkeypatch.setenv("nnunet_sauron", f"{name}={given}")
        with pytest.raises(ValueError, match=f"{name}: {final} lies in the folder that this training writes"):
            small_trainer(folder, type("T", (Small,), {"num_epochs": 2}), widths=WIDTHS)
    assert final.read_bytes() == before


def test_from_a_compressed_model_the_larger_one_is_recommended_as_teacher(folder, trained, monkeypatch):
    path = trained / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "compression": {"source": "/models/dense"}}, path)
    monkeypatch.setenv("nnunet_sauron", f"start_from={trained}")
    trainer = small_trainer(folder, type("T", (Small,), {}), widths=WIDTHS)
    trainer.on_train_start()
    assert "was itself compressed. The better teacher is what it was made from: teacher=/models/dense" in log_of(
        trainer
    )


def test_a_start_with_a_network_that_its_plans_do_not_describe_is_refused_by_name(folder, trained, monkeypatch):
    monkeypatch.setattr("nnunet_sauron.model.networks.find_trainer", {"Gelu": Gelu}.get)
    path = trained / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "trainer_name": "Gelu"}, path)
    monkeypatch.setenv("nnunet_sauron", f"start_from={trained},teacher=None")
    with pytest.raises(ValueError, match="has the network of its trainer Gelu.*nnUNetv2_sauron compress"):
        small_trainer(folder, type("Other", (Small,), {}), widths=WIDTHS)
    assert not list((folder / "results").rglob("Other*"))
    own = {"build_network_architecture": staticmethod(Gelu.build_network_architecture)}
    small_trainer(folder, type("OfTheSameNetwork", (Small,), own), widths=WIDTHS)


def test_a_start_whose_trainer_is_not_found_is_said_to_be_assumed(folder, trained, monkeypatch):
    path = trained / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "trainer_name": "OfSomebodyElse"}, path)
    monkeypatch.setenv("nnunet_sauron", f"start_from={trained},teacher=None")
    trainer = small_trainer(folder, type("T", (Small,), {}), widths=WIDTHS)
    trainer.on_train_start()
    assert f"Started from {path} (Assumed, not known" in log_of(trainer)


@pytest.mark.parametrize("axes", [None, (1,)])
def test_it_mirrors_as_the_model_that_it_starts_from(folder, trained, monkeypatch, axes):
    path = trained / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), MIRRORING: axes}, path)
    monkeypatch.setenv("nnunet_sauron", f"start_from={trained}")
    mirror = "configure_rotation_dummyDA_mirroring_and_inital_patch_size"
    trainer = small_trainer(folder, type("T", (Small,), {"num_epochs": 3}), widths=WIDTHS)
    trainer.initialize()
    assert getattr(trainer, mirror)()[-1] == axes == trainer.inference_allowed_mirroring_axes
    trainer.run_training()
    monkeypatch.delenv("nnunet_sauron")
    again = small_trainer(folder, type("T", (Small,), {}), widths=WIDTHS)
    assert getattr(again, mirror)()[-1] == (0, 1)  # from scratch, nnU-Net's own
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    assert getattr(again, mirror)()[-1] == axes


def test_pretrained_weights_over_those_of_the_start_are_refused(folder, trained, monkeypatch):
    """nnU-Net's -pretrained_weights loads all but the segmentation layers, after `initialize`."""
    monkeypatch.setenv("nnunet_sauron", f"start_from={trained},teacher=None")
    trainer = small_trainer(folder, Small, widths=WIDTHS)
    trainer.initialize()
    with torch.no_grad():
        next(trainer.network.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="start_from=.* and -pretrained_weights are both given"):
        trainer.run_training()
    assert not (Path(trainer.output_folder) / "settings.json").exists()


@pytest.mark.parametrize(("fold", "data_set", "warned"), [(1, None, True), ("all", None, True), (0, None, False),
                                                          (1, "Dataset002_Other", False)])  # fmt: skip
def test_a_start_that_has_seen_the_validation_cases_is_told(folder, trained, monkeypatch, fold, data_set, warned):
    path = trained / "fold_0" / "checkpoint_final.pth"
    model = torch.load(path, weights_only=False)
    model["init_args"]["fold"] = fold
    if data_set:
        model["init_args"]["plans"]["dataset_name"] = data_set
    torch.save(model, path)
    monkeypatch.setenv("nnunet_sauron", f"start_from={path}" + (",teacher=None" if data_set else ""))
    trainer = small_trainer(folder, Small, widths=WIDTHS)
    trainer.on_train_start()
    seen = f"WARNING: {path} is a model of fold {fold}, which was trained on validation cases of fold 0"
    assert log_of(trainer).count(seen) == (2 if warned else 0)  # as start and as teacher


@pytest.mark.parametrize(
    ("data_set", "fold", "told"),
    [(None, 0, True), (None, 1, False), (None, 2, False), ("Dataset002_Other", 0, False)],
)
def test_a_start_that_was_compressed_with_images_of_the_validation_is_told(
    folder, trained, monkeypatch, data_set, fold, told
):
    path = trained / "fold_0" / "checkpoint_final.pth"
    model = torch.load(path, weights_only=False)
    if data_set:
        model["init_args"]["plans"]["dataset_name"] = data_set
    torch.save({**model, "compression": {"fitted_on": ["c", "b", "x"]}}, path)
    monkeypatch.setenv("nnunet_sauron", f"start_from={path},teacher=None")
    trainer = small_trainer(folder, Small, widths=WIDTHS)
    trainer.fold = fold
    preprocessed = Path(trainer.preprocessed_dataset_folder_base)
    preprocessed.mkdir(parents=True, exist_ok=True)
    folds = [{"train": ["d", "e", "f"], "val": ["a", "b", "c"]}, {"train": ["a", "b", "c"], "val": ["d", "e", "f"]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(folds))
    trainer.on_train_start()
    seen = "compress fitted that model on images of 2 of the 3 validation cases of this fold (b, c)"
    assert log_of(trainer).count("compress fitted") == log_of(trainer).count(f"WARNING: {seen}") == told
