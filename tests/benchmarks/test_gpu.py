"""benchmarks/gpu.py, which has a card to itself for minutes and must not fail there: its dry run on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def dry_run(folder: Path, *checks: str) -> list[dict]:
    """The rows of the checks, all successful."""
    output = folder / "gpu.json"
    command = [sys.executable, SCRIPT, "--dry-run", "--only", *checks, "--json", output]
    command += ["--trainers", "StockTrainer", "TaylorTrainer"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    rows = json.loads(output.read_text())["rows"]
    assert {row["check"] for row in rows} == set(checks)
    assert [row["result"] for row in rows] == ["ok"] * len(rows), printed
    return rows


@pytest.mark.slow
def test_the_checks_succeed_in_a_dry_run(tmp_path):
    rows = dry_run(tmp_path, "training", "steps", "network", "agreement", "compress")
    training = next(row for row in rows if row["of"].startswith("TaylorTrainer"))
    assert training["merge_cuts"] > 0
    assert "cut as decided" in training["resume"]


@pytest.mark.matrix  # as long as the other checks together, and nnU-Net compiles nothing on a CPU
def test_compiled_trainings_succeed_in_a_dry_run(tmp_path):
    for row in dry_run(tmp_path, "compile"):
        assert row["eager was_compiled"] is False


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cuda"]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "HOME": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=hidden, cwd=tmp_path)
    assert ended.returncode == 2
    assert "--dry-run" in ended.stderr
