"""How long ranking and merging take: half of every layer of nnU-Net's 3D default (31.2 M), five patches of 64^3.

python benchmarks/merge_time.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_sauron.pruning import count_macs, count_parameters, merge_channels, rank_units

WIDTHS = (32, 64, 128, 256, 320, 320)
PATCH = (64, 64, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patches", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    network = PlainConvUNet(
        1, 6, WIDTHS, nn.Conv3d, [[3] * 3] * 6, [[1] * 3] + [[2] * 3] * 5, [2] * 6, 3, [2] * 5, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    ).eval()  # fmt: skip
    before = count_parameters(network), count_macs(network, PATCH, 1)
    inputs = [torch.randn(1, 1, *PATCH) for _ in range(options.patches)]
    start = time.perf_counter()
    keep = {name: ranking.keep(len(ranking.order) // 2) for name, ranking in rank_units(network, inputs).items()}
    merge_channels(network, keep, inputs)
    measured = {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "patches": options.patches,
        "parameters": [before[0], count_parameters(network)],
        "macs": [before[1], count_macs(network, PATCH, 1)],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(measured, indent=2))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
