"""The demo, several times: what each small model keeps of stock's MACs, time and Dice, run by run.

Trainings draw their own random numbers, so that no two runs are alike. A folder that holds a finished demo is read and
not run again.

    python benchmarks/demo_runs.py -o FOLDER [--runs 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

SMALL = ("SauronTrainer", "ShrinkTrainer", "CompressedTrainer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, required=True, help="folder for the runs' folders, run_1, run_2, ...")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    runs = []
    for number in range(1, arguments.runs + 1):
        folder = arguments.o / f"run_{number}"
        if not (folder / "demo.json").is_file():
            command = [sys.executable, "-m", "nnunet_sauron.cli", "demo", "-o", str(folder)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        runs.append(described(folder))
        print_run(number, runs[-1])
        if arguments.json:
            arguments.json.write_text(json.dumps(runs, indent=1) + "\n")


def described(folder: Path) -> dict:
    """A run in numbers: minutes of its steps added up, stock's Dice, each small model's difference and ratios to it."""
    report = json.loads((folder / "demo.json").read_text())
    state = json.loads((folder / "nnunet_sauron_demo.json").read_text())
    models = {model["trainer"]: model["mean"] for model in report["models"]}
    stock = models["StockTrainer"]
    run = {
        "date": report["date"],
        "machine": report["machine"],
        "minutes": sum(state["seconds"].values()) / 60,
        "stock_dice": stock["dice"],
    }
    for name in SMALL:
        run[name] = {
            "dice_minus_stock": models[name]["dice"] - stock["dice"],
            **{key: models[name][key] / stock[key] for key in ("macs", "parameters", "seconds_cpu")},
        }
    return run


def print_run(number: int, run: dict) -> None:
    print(f"run {number}: steps of {run['minutes']:.1f} minutes, two at a time; stock's Dice {run['stock_dice']:.3f}")
    for name in SMALL:
        small = run[name]
        print(
            f"  {name:18s} Dice {small['dice_minus_stock']:+.3f}, MACs {small['macs']:.0%}, parameters "
            f"{small['parameters']:.0%}, network time {small['seconds_cpu']:.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
