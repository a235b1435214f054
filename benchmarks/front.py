"""The rows of the README's table: Dice, cost and network time of networks trained on 2D hippocampus at one budget.

Dice and widths are read from results/; the networks of these widths are timed here on one patch: processor time of one
thread, in alternation.
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
from study.report import draw
from torch import nn

from nnunet_sauron.pruning import channel_layout, count_macs, count_parameters, resize
from nnunet_sauron.pruning.timing import machine

RESULTS = Path(__file__).parent / "results"
PATCH, WIDTHS = (56, 40), (32, 64, 128, 256)
# Name, the run whose widths are timed, and Dice of 40 validation cases in all runs, from "Ten times smaller" and "The
# study" of results/README.md. A run is a tag in ten_times_smaller.json or a name in study/.
ROWS = (
    ("stock", "stock_a", (0.848, 0.846, 0.843)),
    ("sauron, published", "published_a", (0.851,)),
    ("shrink", "shrink_a", (0.842,)),
    ("shrink, a twentieth", "shrink05_a", (0.837,)),
    ("sauron", "sauron-10", (0.840, 0.843)),
    ("compressed, then 20 epochs with labels", "rec01", (0.844,)),
    ("compressed, then 20 epochs without labels", "rec01", (0.839,)),
    ("compressed, recovered from 30 raw images", "rec01", (0.826, 0.830)),
    ("0.31 times the widths", "scaled-31", (0.834,)),
    ("flat width of 16 (LUnet)", "lunet-16", (0.798,)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    runs = {run: network_of(run) for _, run, _ in ROWS}
    stock = runs["stock_a"]
    seconds = processor_seconds(runs, options.repeats)
    rows = [
        {
            "run": name,
            "widths_of": run,
            "dice": dice,
            "macs": count_macs(runs[run], PATCH, 1) / count_macs(stock, PATCH, 1),
            "parameters": count_parameters(runs[run]) / count_parameters(stock),
            "seconds": seconds[run],
            "time": seconds[run] / seconds["stock_a"],
        }
        for name, run, dice in ROWS
    ]
    for row in rows:
        print(f"{row['run']:40s} MACs {row['macs']:.1%}, parameters {row['parameters']:.1%}, time {row['time']:.1%}")
    about = {"date": date.today().isoformat(), "machine": machine(), "threads": torch.get_num_threads()}
    (RESULTS / "front.json").write_text(
        json.dumps({**about, "repeats": options.repeats, "rows": rows}, indent=1) + "\n"
    )
    draw(rows, RESULTS / "front.png")


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
    study = RESULTS / "study" / f"{run}_fold0.json"
    if study.is_file():
        widths = json.loads(study.read_text())["widths"]
    else:
        trainings = json.loads((RESULTS / "ten_times_smaller.json").read_text())["trainings"]
        widths = next(one["widths"] for one in trainings if one["tag"] == run)
    network = PlainConvUNet(
        1, 4, WIDTHS, nn.Conv2d, 3, (1, 2, 2, 2), 2, 3, 2, conv_bias=True, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    names = channel_layout(network).widths
    resize(network, dict(zip(names, widths, strict=True)) if isinstance(widths, list) else widths)
    return network.eval()


if __name__ == "__main__":
    main()
