"""Guards delay cuts and cancel none, in every trainer; what a target came to stands in log and checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_sauron import trainers
from nnunet_sauron.methods.measuring import NOTHING_MEASURED
from nnunet_sauron.methods.sauron import PublishedSauron
from nnunet_sauron.pruning import channel_layout
from nnunet_sauron.trainers import L1Trainer, SauronTrainer, SFPTrainer, decision
from nnunet_sauron.trainers.decision import last_cut_epoch

from .small import OnRandomPatches, log_of, small_trainer

WIDTHS = (12, 16, 20)
MEASURES_ON_BATCHES = ["ShrinkTrainer", "SauronTrainer", "STAMPTrainer", "TaylorTrainer", "AutoPrunerTrainer"]
OF_A_TARGET = [name for name in trainers.__all__ if name not in ("PruningTrainer", "StockTrainer", "CompressedTrainer")]


class Worse(OnRandomPatches):
    """From the second epoch on the loss is worse than in the first."""

    num_epochs = 7
    num_iterations_per_epoch = 1
    patches = 16

    def on_train_epoch_end(self, outputs):
        for output in outputs:
            output["loss"] = np.asarray(float(self.current_epoch > 0))
        super().on_train_epoch_end(outputs)


def trained(folder, base: type, **settings):
    trainer = small_trainer(folder, type(base.__name__, (Worse, base), settings), widths=WIDTHS)
    trainer.run_training()
    return trainer


@pytest.mark.parametrize("name", OF_A_TARGET)
def test_both_guards_and_the_target_is_met(folder, name):
    trainer = trained(
        folder, getattr(trainers, name), target_macs=0.5, max_loss_increase=0.1, max_fraction_per_epoch=0.1
    )
    history = trainer.history()
    last = last_cut_epoch(trainer)
    assert [epoch for epoch, record in enumerate(history) if record["keep"] and epoch > 0] == [last]
    assert any("above its lowest" in (record["held"] or "") for record in history[1:last])
    checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
    target = checkpoint["logging"]["pruning"][-1]["target"]
    assert (target["name"], target["value"], target["reached"], target["why"]) == ("target_macs", 0.5, True, None)
    assert target["left"] == pytest.approx(history[-1]["macs"] / trainer.dense_cost[1]) and target["left"] <= 0.5
    assert history[1]["target"]["reached"] is None
    assert history[1]["target"]["why"] == f"cuts go on until epoch {last}"
    assert len(re.findall(r"Target target_macs=0.5 met: \S+ of the multiply-accumulates is left", log_of(trainer))) == 1


def test_k_without_a_target_is_caught_up(folder):
    trainer = trained(folder, L1Trainer, k=3, max_loss_increase=0.1, cut_until=0.5)
    widths = channel_layout(trainer.network).widths
    assert sum(trainer.dense_widths.values()) - sum(widths.values()) == 3 * 3  # after epochs 0, 1 and 2
    assert "Target k=3 met" in log_of(trainer)


@pytest.mark.parametrize(
    ("base", "settings", "why"),
    [
        (L1Trainer, {"k": 2, "target_macs": 0.3}, "k=2 in 5 steps is too little"),
        (SFPTrainer, {"rate": 0.9, "min_channels": 6}, "min_channels=6, round_to=1 leave more"),
        (SFPTrainer, {"min_channels": 8}, "allow no less than"),  # its default target
    ],
    ids=str,
)
def test_a_target_that_is_missed_is_said_with_its_reason(folder, base, settings, why):
    trainer = trained(folder, base, **settings)
    for record in trainer.history()[last_cut_epoch(trainer) :]:
        assert record["target"]["reached"] is False and why in record["target"]["why"]
    (line,) = re.findall(r"WARNING: target .* missed: .*", log_of(trainer))
    assert why in line


@pytest.mark.parametrize("name", MEASURES_ON_BATCHES)
def test_where_nothing_can_be_measured_it_is_said(folder, monkeypatch, name):
    monkeypatch.setattr(decision, "training_batches", lambda trainer, count: [])
    monkeypatch.setattr(decision, "training_losses", lambda trainer, count: iter(()))
    settings = {"target_macs": 0.5, "max_loss_increase": None}
    trainer = small_trainer(folder, type("Blind", (Worse, getattr(trainers, name)), settings), widths=WIDTHS)
    trainer.run_training()
    assert channel_layout(trainer.network).widths == trainer.dense_widths
    last = trainer.history()[last_cut_epoch(trainer)]
    assert last["held"] == trainer.history()[-1]["target"]["why"] == NOTHING_MEASURED
    assert len(re.findall(r"WARNING: target target_macs=0.5 missed", log_of(trainer))) == 1


def test_sauron_without_a_target_makes_its_last_cut(folder):
    trainer = trained(folder, SauronTrainer, target_macs=None, tau_max=1.0, cuts=2, max_loss_increase=0.1)
    cuts = [epoch for epoch, record in enumerate(trainer.history()) if record["keep"]]
    assert cuts[-1] == last_cut_epoch(trainer)
    assert "target" not in trainer.history()[-1]


def test_a_setting_without_effect_is_said(folder):
    assert "WARNING: kappa=3 has no effect without published=True." in log_of(trained(folder, SauronTrainer, kappa=3))


def test_as_published_nothing_is_held_or_capped_and_cuts_go_on_to_the_end(folder):
    class FromScratch(PublishedSauron):
        def redundant(self, training):  # all but a channel, whatever the thresholds
            super().redundant(training)
            return {name: list(range(1, width)) for name, width in training.widths_now.items()}

    trainer = small_trainer(folder, type("T", (Worse, SauronTrainer), {"published": True, "Method": FromScratch}))
    trainer.run_training()
    assert set(channel_layout(trainer.network).widths.values()) == {1}
    history = trainer.history()
    assert [record["held"] for record in history] == [None] * 6 + ["outside of the cutting phase"]
    assert history[0]["keep"].keys() == trainer.dense_widths.keys()
    settings = trainer.settings_now()
    assert not settings["merge"] and (settings["prune_batches"], settings["rho"], settings["delta_opt_every"]) == (
        1,
        5,
        1,
    )
