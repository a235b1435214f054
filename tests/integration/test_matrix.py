"""Every trainer through nnU-Net's own commands, in every configuration; long: `pytest -m matrix`.

In process and small, `tests/trainers/test_every_trainer.py` shows the same in every plain test run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_sauron.plugin import trainer_names

from .conftest import TINY
from .nnunet import NnUNet, channels_by_epoch, network_weights, pruning_history, settings, voxels

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

# Of so narrow a network hardly a tenth can be left; the others go to their default targets.
EPOCHS = {"SauronTrainer": 8, "ShrinkTrainer": 8}
OWN = {name: settings(num_epochs=8, save_every=1, target_macs=0.5) for name in ("SauronTrainer", "ShrinkTrainer")}
SHORT = "num_epochs=4,num_iterations_per_epoch=2,num_val_iterations_per_epoch=1,save_every=1"
TRAINERS = [name for name in trainer_names() if name not in ("StockTrainer", "CompressedTrainer")]


def setting(trainer: str) -> str:
    return OWN.get(trainer, SHORT)


def kill_in_the_middle(nnunet: NnUNet, trainer: str, configuration: str, plans: str, folder: Path) -> None:
    """Train until there is a checkpoint to continue from, and kill -9."""
    program = shutil.which("nnUNetv2_train", path=str(Path(sys.executable).parent)) or "nnUNetv2_train"
    command = [program, str(TINY), configuration, "0", "-tr", trainer, "-p", plans, "-device", "cpu"]
    environment = nnunet.environment(nnUNet_n_proc_DA="0", nnunet_sauron=setting(trainer))
    latest = folder / "checkpoint_latest.pth"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as training:
        deadline = time.monotonic() + 300
        while not latest.is_file():
            assert training.poll() is None and time.monotonic() < deadline, "no checkpoint to continue from was written"
            time.sleep(0.02)
        os.killpg(training.pid, signal.SIGKILL)


@pytest.mark.parametrize("trainer", TRAINERS)
class TestEveryTrainer:
    @pytest.mark.parametrize(
        ("configuration", "plans"),
        [("2d", "nnUNetPlans"), ("3d_fullres", "nnUNetPlans"), ("3d_fullres", "nnUNetResEncUNetMPlans")],
    )
    def test_it_trains_is_killed_continues_and_predicts(self, nnunet, tmp_path, trainer, configuration, plans):
        own = nnunet.with_results(tmp_path / "results")
        folder = own.model_folder(TINY, configuration, trainer, plans) / "fold_0"
        kill_in_the_middle(own, trainer, configuration, plans, folder)
        before = pruning_history(folder / "checkpoint_latest.pth")
        own.train(TINY, configuration, 0, "--c", trainer=trainer, plans=plans, setting=setting(trainer))

        final = folder / "checkpoint_final.pth"
        channels = channels_by_epoch(final)
        assert len(channels) == EPOCHS.get(trainer, 4) and channels[-1] < channels[0]
        assert [r["widths"] for r in pruning_history(final)[: len(before)]] == [r["widths"] for r in before]
        predicted = own.predict(TINY, configuration, tmp_path / "out", "-f", 0, trainer=trainer, plans=plans)
        assert [voxels(path).shape for path in predicted.values()] == [(16, 32, 32)] * 2

    def test_its_five_folds_predict_together(self, nnunet, tmp_path, trainer):
        own = nnunet.with_results(tmp_path / "results")
        for fold in range(5):
            own.train(TINY, "2d", fold, trainer=trainer, setting=setting(trainer))
        assert len(own.predict(TINY, "2d", tmp_path / "out", trainer=trainer)) == 2


def test_a_trainer_of_nnunets_own_trains_the_widths_of_a_pruned_checkpoint(nnunet, tmp_path):
    own = nnunet.with_results(tmp_path / "results")
    own.train(TINY, "2d", 0)
    pruned = own.model_folder(TINY, "2d") / "fold_0/checkpoint_final.pth"
    own.run("nnUNetv2_sauron", "plan", "-d", TINY, "--widths-from", pruned)
    of_nnunet = {"trainer": "nnUNetTrainer_1epoch", "plans": "nnUNetPrunedPlans"}
    own.train(TINY, "2d", 0, **of_nnunet)
    anew = own.model_folder(TINY, "2d", **of_nnunet) / "fold_0/checkpoint_final.pth"
    shapes = [{name: w.shape for name, w in network_weights(path).items()} for path in (pruned, anew)]
    assert shapes[0] == shapes[1]
    assert len(own.predict(TINY, "2d", tmp_path / "out", "-f", 0, **of_nnunet)) == 2
