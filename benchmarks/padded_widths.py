"""Whether a pruned network is faster with channels of zeros that make every width a multiple of 4, 8 or 16.

    python benchmarks/padded_widths.py -m MODEL_FOLDER [-f 0] [--threads 1 2] [--repeats 30] [--batch 4] [--json FILE]

The networks compute the same; they take turns in one process, in both engines.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from nnunet_sauron_runtime.engines import load_network

from nnunet_sauron.analysis.report.bundles import InEngine
from nnunet_sauron.deploy.checks import ENGINES
from nnunet_sauron.deploy.networks import write_network
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning import channel_layout, densify
from nnunet_sauron.pruning.timing import machine, time_networks

MULTIPLES = (1, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", dest="model", type=Path, required=True, metavar="MODEL_FOLDER")
    parser.add_argument("-f", dest="fold", default="0")
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4, help="patches at once")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = TrainedModel.read(options.model, [options.fold], options.checkpoint)
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for multiple in MULTIPLES:
            network = model.network(options.fold)
            widths = channel_layout(network).widths
            densify(network, {name: -(-width // multiple) * multiple for name, width in widths.items()})
            write_network(network, model.input_channels, model.patch_size, Path(folder) / "n.onnx")
            files[multiple] = (Path(folder) / "n.onnx").read_bytes()
    found = []
    shape = (options.batch, model.input_channels, *model.patch_size)
    for threads in options.threads:
        networks = {
            f"{engine}, multiples of {multiple}": InEngine(
                load_network(engine, content, str(multiple), threads), f"{multiple}", model.input_channels
            )
            for engine in ENGINES
            for multiple, content in files.items()
        }
        for name, timing in time_networks(networks, shape, repeats=options.repeats).items():
            milliseconds = 1000 * timing.median / options.batch
            found.append({"threads": threads, "network": name, "milliseconds_per_patch": milliseconds,
                          "interquartile_range": 1000 * timing.interquartile_range / options.batch})  # fmt: skip
            print(f"{threads} threads, {name}: {milliseconds:.2f} ms a patch", flush=True)
    if options.json:
        result = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "batch": options.batch, "times": found}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
