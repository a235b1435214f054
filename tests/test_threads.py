"""Commands on fewer threads than nnU-Net would take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nnunet_sauron import threads


def test_nnunet_cannot_take_more_threads(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)
    command = threads.on_threads(1, ["nnUNetv2_train", "4", "2d"])
    assert command[:3] == [sys.executable, "-m", "nnunet_sauron.threads"]
    monkeypatch.setattr(sys, "argv", command[2:])
    seen = []

    def entry() -> None:
        torch.set_num_threads(7)
        seen.append((torch.get_num_threads(), sys.argv))

    monkeypatch.setattr("nnunetv2.run.run_training.run_training_entry", entry)
    with pytest.raises(SystemExit):
        threads.main()
    assert seen == [(1, ["nnUNetv2_train", "4", "2d"])]


def test_a_command_that_is_not_installed_is_named():
    ended = subprocess.run(threads.on_threads(1, ["nnUNetv2_nothing"]), capture_output=True, text=True)
    assert ended.returncode == 1 and "There is no command nnUNetv2_nothing" in ended.stderr
