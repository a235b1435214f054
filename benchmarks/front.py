"""The rows of the README's table: Dice, cost and network time of networks trained on 2D hippocampus at one budget.

Dice and widths are read from results/; networks of the widths of fold 0 are timed here on one patch: processor time of
one thread, in alternation.
Writes results/front.json and results/front.png.

    OMP_NUM_THREADS=1 python benchmarks/front.py [--repeats 300]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from study import report
from torch import nn

from nnunet_sauron.model.device import machine
from nnunet_sauron.pruning import resize

RESULTS = Path(__file__).parent / "results"
PATCH, WIDTHS = (56, 40), (32, 64, 128, 256)
# Runs of study/ and what they are called here.
SHOWN = {
    "stock": "stock",
    "stock-100": "stock, 100 epochs",
    "shrink-10": "Shrink",
    "shrink-10-100-epochs": "Shrink, 100 epochs",
    "shrink-5": "Shrink, to 5 %",
    "shrink-5-start": "Shrink from stock",
    "sauron-10": "Sauron",
    "compressed-10": "compressed, then 20 epochs with labels",
    "compressed-10-50-epochs": "compressed, then 50 epochs with labels",
    "compressed-10-no-labels": "compressed, then 20 epochs without labels",
    "compressed-10-no-labels-50-epochs": "compressed, then 50 epochs without labels",
    "sauron-published": "Sauron, published",
    "recovered-10": "compressed, recovered from 40 raw images",
    "autopruner-10": "AutoPruner",
    "taylor-10": "Taylor",
    "l1-10": "L1",
    "tucker-10": "low rank (Tucker-2), then 20 epochs with labels",
    "scaled-31": "0.31 times the widths",
    "shrink-10-scratch": "Shrink's widths from scratch",
    "lunet-16": "flat width of 16 (LUnet)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    study = {row["run"]: row for row in report.rows(report.read(RESULTS / "study"))}
    networks = {name: network_of(name) for name in SHOWN if name in study and study[name]["widths"]}
    seconds = processor_seconds(networks, options.repeats)
    keys = (
        "folds", "macs", "parameters", "dice", "dice_difference", "dice_differences", "hd95_mm", "hd95_mm_differences",
    )  # fmt: skip
    rows = [
        {"run": SHOWN[name], **{key: study[name][key] for key in keys}, "seconds": seconds.get(name)}
        for name in SHOWN
        if name in study
    ]
    for row in rows:
        row["time"] = row["seconds"] and row["seconds"] / seconds["stock"]
        time_left = "-" if row["time"] is None else f"{row['time']:.0%}"
        print(
            f"{row['run']:48s} MACs {row['macs']:.1%}, parameters {row['parameters']:.1%}, time {time_left}, "
            f"Dice {row['dice_difference']:+.4f}, folds {row['folds']}"
        )
    about = {"date": date.today().isoformat(), "machine": machine(), "threads": torch.get_num_threads()}
    (RESULTS / "front.json").write_text(
        json.dumps({**about, "repeats": options.repeats, "rows": rows}, indent=1) + "\n"
    )
    report.draw(rows, RESULTS / "front.png")


@torch.inference_mode()
def processor_seconds(networks: dict[str, nn.Module], repeats: int) -> dict[str, float]:
    """Median processor time of a forward pass, in alternation: other processes change it less than the clock's time."""
    patch, measured = torch.randn(1, 1, *PATCH), {name: [] for name in networks}
    for _ in range(repeats):
        for name, network in networks.items():
            start = time.process_time()
            network(patch)
            measured[name].append(time.process_time() - start)
    return {name: statistics.median(values[5:]) for name, values in measured.items()}


def network_of(run: str) -> nn.Module:
    """nnU-Net's network for 2D hippocampus at the widths of a run; its weights make no difference to the time."""
    widths = json.loads((RESULTS / "study" / f"{run}_fold0.json").read_text())["widths"]
    network = PlainConvUNet(
        1, 4, WIDTHS, nn.Conv2d, 3, (1, 2, 2, 2), 2, 3, 2, conv_bias=True, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    resize(network, widths)
    return network.eval()


if __name__ == "__main__":
    main()
