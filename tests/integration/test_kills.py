from __future__ import annotations

import json
import random
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

from nnunet_sauron.methods.sauron_settings import SauronSettings

from .conftest import TINY
from .nnunet import NnUNet, settings

pytestmark = pytest.mark.slow

NUM_EPOCHS = 60
CUT_CHANCE = 0.05
# Losses that only fluctuate, so that thresholds go up and wait, and cuts are held now and then.
SETTINGS = settings(
    num_epochs=NUM_EPOCHS, initial_lr=1e-6, cut_chance=CUT_CHANCE, save_every=2, rho=4, mu=1, max_loss_increase=0.3
)
TRAINER = "CertainCutsAnyBestTrainer"


@pytest.fixture(scope="module")
def killed(nnunet, tmp_path_factory) -> dict:
    """The driver's report of one training, killed over and over."""
    own: NnUNet = nnunet.with_results(tmp_path_factory.mktemp("killed"))
    folder = own.model_folder(TINY, "2d", TRAINER) / "fold_2"
    report, log = own.results / "report.json", own.results / "driver.log"
    own.run(
        sys.executable, Path(__file__).with_name("kill_driver.py"), TINY, "2d", 2, TRAINER, folder, report,
        nnunet_sauron=SETTINGS,
        nnUNet_n_proc_DA="0",
        KILL_DRIVER_LOG=str(log),
    )  # fmt: skip
    told = json.loads(report.read_text())
    assert told["exit_status"] == 0, "\n".join(log.read_text().splitlines()[-40:])
    return told


@pytest.fixture(scope="module")
def final(killed) -> dict:
    """What checkpoint_final.pth has logged."""
    return killed["end"]["checkpoints"]["checkpoint_final.pth"]


def test_it_was_killed_often_and_in_the_middle_of_writing(killed):
    assert len(killed["kills"]) >= 10
    assert sum(bool(kill["half_written"]) for kill in killed["kills"]) >= 5
    reached = [len(kill["checkpoints"].get("checkpoint_latest.pth", {}).get("pruning", ())) for kill in killed["kills"]]
    assert len(set(reached)) >= 6 and max(reached) >= 15


def test_no_kill_leaves_a_checkpoint_unreadable(killed):
    for kill in killed["kills"]:
        for name, checkpoint in kill["checkpoints"].items():
            assert "error" not in checkpoint, f"{name}: {checkpoint['error']}"


def test_nothing_half_written_is_left_in_the_end(killed):
    assert killed["end"]["half_written"] == []
    assert sorted(killed["end"]["checkpoints"]) == ["checkpoint_best.pth", "checkpoint_final.pth"]


def test_every_cut_that_was_decided_was_made_once(final):
    history = final["pruning"]
    assert len(history) == NUM_EPOCHS
    for epoch, (record, after) in enumerate(pairwise(history)):
        expected = {name: len(record["keep"].get(name, range(width))) for name, width in record["widths"].items()}
        assert after["widths"] == expected, f"after epoch {epoch}"
    assert sum(bool(record["keep"]) for record in history) >= 5


def test_what_was_decided_is_what_an_uninterrupted_run_would_have_decided(final):
    for epoch, record in enumerate(final["pruning"]):
        for name, kept in record["keep"].items():
            rng = random.Random(f"2:{epoch}:{name}")
            assert rng.random() < CUT_CHANCE
            width = record["widths"][name]
            drawn = rng.sample(range(width), k=max(1, width // 4))
            gone = set(range(width)) - set(kept)
            assert gone == set(drawn[: len(gone)]), f"{name} after epoch {epoch}"


def test_thresholds_and_waiting_epochs_are_those_of_the_recorded_losses(final):
    history = final["pruning"]
    used = SauronSettings(**{field.name: final["settings"][0][field.name] for field in fields(SauronSettings)})
    thresholds = {name: used.threshold(NUM_EPOCHS) for name in history[0]["widths"]}
    losses = [loss + record["regulariser"] for loss, record in zip(final["train_losses"], history, strict=True)]
    for epoch, record in enumerate(history):
        if record["held"] is None:
            for name, threshold in thresholds.items():
                widths = [past["widths"][name] for past in history[: epoch + 1]]
                threshold.update(losses[: epoch + 1], final["val_losses"][: epoch + 1], widths)
        assert record["state"] == {
            "tau": {name: threshold.value for name, threshold in thresholds.items()},
            "tau_steps": {name: threshold.steps for name, threshold in thresholds.items()},
            "waiting": {name: threshold.waiting for name, threshold in thresholds.items()},
        }, f"epoch {epoch}"
    assert max(history[-1]["state"]["tau_steps"].values()) >= 2


def test_every_checkpoint_agrees_with_what_came_of_it(killed, final):
    """The one that is continued from, with the whole of the final history; checkpoint_best as far as that one goes.

    Beyond it, checkpoint_best may hold an epoch that was lost in the kill and trained again.
    """
    best_before = None
    for kill in killed["kills"]:
        checkpoints = kill["checkpoints"]
        continued = next(
            (
                checkpoints[name]
                for name in ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
                if name in checkpoints
            ),
            None,
        )
        if continued is None:
            continue
        settled = len(continued["pruning"])
        assert continued["pruning"] == final["pruning"][:settled]
        assert continued["train_losses"][:settled] == final["train_losses"][:settled]
        best = checkpoints.get("checkpoint_best.pth")
        if best is not None and best != best_before:
            assert best["pruning"][:settled] == final["pruning"][: min(settled, len(best["pruning"]))]
        best_before = best
