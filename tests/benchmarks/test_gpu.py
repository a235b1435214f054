"""benchmarks/gpu.py, which has a card to itself for minutes and must not fail there: its dry run on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_check_of_the_dry_run_succeeds(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, SCRIPT, "--dry-run", "--trainers", "StockTrainer", "TaylorTrainer", "--json", output]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    rows = json.loads(output.read_text())["rows"]
    assert {row["check"] for row in rows} == {"training", "steps", "network", "agreement", "compress", "compile"}
    assert [row["result"] for row in rows] == ["ok"] * len(rows), printed
    training = next(row for row in rows if row["of"].startswith("TaylorTrainer"))
    assert training["merge_cuts"] > 0
    assert "cut as decided" in training["resume"]


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cuda"]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "HOME": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=hidden, cwd=tmp_path)
    assert ended.returncode == 2
    assert "--dry-run" in ended.stderr
