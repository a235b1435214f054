"""Whether a pruned network is faster with channels of zeros that make every width a multiple of 4, 8 or 16.

    python benchmarks/padded_widths.py -m MODEL_FOLDER [-f 0] [--threads 1 2] [--repeats 30] [--batch 4] [--json FILE]

The networks compute the same; they take turns in one process, in both engines. On a machine that does other work, the
processor's time of one thread is what to look at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from nnunet_sauron_runtime.engines import load_network

from nnunet_sauron.deploy.checks import ENGINES
from nnunet_sauron.deploy.networks import write_network
from nnunet_sauron.model.device import machine
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning import channel_layout, densify

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
    shape = (options.batch, model.input_channels, *model.patch_size)
    patches = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = []
    for threads in options.threads:
        networks = {
            (engine, multiple): load_network(engine, content, f"multiples of {multiple}", threads)
            for engine in ENGINES
            for multiple, content in files.items()
        }
        for (engine, multiple), times in measure(networks, patches, options.repeats).items():
            wall, processor = (1000 * statistics.median(values) / options.batch for values in zip(*times, strict=True))
            found.append({"threads": threads, "engine": engine, "multiple": multiple, "milliseconds_a_patch": wall,
                          "processor_milliseconds_a_patch": processor})  # fmt: skip
            print(f"{threads} threads, {engine:12s} multiples of {multiple:2d}: {wall:6.2f} ms a patch, "
                  f"{processor:6.2f} ms of the processor", flush=True)  # fmt: skip
    if options.json:
        result = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "batch": options.batch, "times": found}
        options.json.write_text(json.dumps(result, indent=1))


def measure(networks: dict, patches: np.ndarray, repeats: int) -> dict[tuple, list[tuple[float, float]]]:
    """Seconds of the clock and of the processor, taking turns; the first turn is not counted."""
    times = {key: [] for key in networks}
    for turn in range(repeats + 1):
        for key, run in networks.items():
            clock, processor = time.perf_counter(), time.process_time()
            run(patches)
            if turn:
                times[key].append((time.perf_counter() - clock, time.process_time() - processor))
    return times


if __name__ == "__main__":
    main()
