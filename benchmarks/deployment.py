"""What a bundle gains on a CPU: nnU-Net's own prediction against bundles, the same images in one call each.

    python benchmarks/deployment.py --dense MODEL --pruned MODEL --images FOLDER [--cases 20] [--rounds 3] [--json FILE]

Every way runs in a process of its own, one after the other in each round: nnU-Net's command with the dense and with the
pruned model, and `predict` with bundles of the pruned model in both engines, in int8, and of the dense model. Seconds
are counted from the start of the process. Start-up ends when the first patch reaches the network; network time is what
is spent in the network, mirrored copies included. Memory is the greatest sum over the process and those that it starts,
memory that they share counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

WAYS = {
    "nnU-Net, dense": ("nnunet", "dense"),
    "nnU-Net, pruned": ("nnunet", "pruned"),
    "bundle, pruned, ONNX Runtime": ("onnxruntime", "pruned.zip"),
    "bundle, pruned, OpenVINO": ("openvino", "pruned.zip"),
    "bundle, pruned, int8, OpenVINO": ("openvino", "int8.zip"),
    "bundle, dense, OpenVINO": ("openvino", "dense.zip"),
}
MIRRORING = {"on": "mirrored", "off": "not mirrored"}
NUMBERS = ("total", "start", "network", "memory")
SAMPLE_SECONDS = 0.2  # what watching costs comes off the time that is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for model in ("dense", "pruned"):
        parser.add_argument(f"--{model}", type=Path, metavar="MODEL_FOLDER", required=True)
        parser.add_argument(f"--{model}-checkpoint", default="checkpoint_final.pth", metavar="NAME")
    parser.add_argument("--images", type=Path, metavar="FOLDER", required=True, help="raw images, such as imagesTs")
    parser.add_argument("--cases", type=int, default=20, metavar="N", help="the first N; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default %(default)s")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--mirroring", nargs="+", choices=MIRRORING, default=list(MIRRORING), help="default both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cases = gather(options.images, options.cases, place / "images")
        export_bundles(options, place)
        measured: dict[str, dict[str, list[dict]]] = {MIRRORING[word]: {} for word in options.mirroring}
        for turn in range(options.rounds):
            for mirroring, ways in measured.items():
                for name, (engine, what) in WAYS.items():
                    output = place / f"out_{mirroring}_{name}"
                    words = command(options, place, engine, what, output, mirroring == "mirrored")
                    ways.setdefault(name, []).append(run(words, engine))
                    print(f"round {turn + 1}, {mirroring}, {name}: {shown(ways[name][-1], cases)}", flush=True)
        result = {
            "machine": machine(), "date": time.strftime("%Y-%m-%d"), "cases": cases, "rounds": options.rounds,
            "bytes": {file.name: file.stat().st_size for file in sorted(place.glob("*.zip"))},
            "different_voxels_of_the_pruned_model": different_voxels(place, measured),
            "medians": {mirroring: {name: medians(runs) for name, runs in ways.items()}
                        for mirroring, ways in measured.items()},
        }  # fmt: skip
    for mirroring, ways in result["medians"].items():
        print_table(mirroring, ways, cases)
    print(f"Voxels that differ from nnU-Net's, pruned model: {result['different_voxels_of_the_pruned_model']}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def gather(images: Path, count: int, into: Path) -> int:
    """Link the first cases' files, named as nnU-Net has them; their number."""
    into.mkdir()
    files = sorted(path for path in images.iterdir() if path.is_file() and path.name[0] != ".")
    # The Decathlon has no channel in its names.
    names = {path: path.name if "_0000." in path.name else path.name.replace(".", "_0000.", 1) for path in files}
    for path in files[:count]:
        (into / names[path]).symlink_to(path.resolve())
    return min(count, len(files))


def export_bundles(options: argparse.Namespace, place: Path) -> None:
    from nnunet_sauron.deploy.command import export

    chosen = {"dense": (options.dense, options.dense_checkpoint), "pruned": (options.pruned, options.pruned_checkpoint)}
    for name, what, precision in (("dense", "dense", "float32"), ("pruned", "pruned", "float32"),
                                  ("int8", "pruned", "int8")):  # fmt: skip
        folder, checkpoint = chosen[what]
        export(
            folder, place / f"{name}.zip", folds=[options.fold], checkpoint=checkpoint, precision=precision,
            images=place / "images" if precision == "int8" else None,
        )  # fmt: skip


def command(options, place: Path, engine: str, what: str, output: Path, mirroring: bool) -> list[str]:
    images = ["-i", str(place / "images"), "-o", str(output)]
    if engine == "nnunet":
        folder, checkpoint = getattr(options, what), getattr(options, f"{what}_checkpoint")
        words = ["-m", str(folder), "-f", options.fold, "-chk", checkpoint, "-device", "cpu", *images]
        return words + ([] if mirroring else ["--disable_tta"])
    words = ["predict", "-b", str(place / what), "--engine", engine, *images]
    return words + ([] if mirroring else ["--no-mirroring"])


def run(words: Sequence[str], engine: str) -> dict[str, float]:
    """One prediction in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "times.json"
        started = time.time()
        child = subprocess.Popen(
            [sys.executable, __file__, "--child", engine, str(told), *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
        )  # fmt: skip
        peak = [0]
        watch = threading.Thread(target=watch_memory, args=(child, peak), daemon=True)
        watch.start()
        said, _ = child.communicate()
        total = time.time() - started
        watch.join()
        if child.returncode:
            sys.exit(f"{' '.join(words)} ended with {child.returncode}:\n{said[-3000:]}")
        times = json.loads(told.read_text())
    return {"total": total, "start": times["first"] - started, "network": times["network"], "memory": peak[0]}


def environment() -> dict[str, str]:
    from nnunet_sauron.plugin import trainer_folder

    return {**os.environ, "nnUNet_extTrainer": str(trainer_folder()), "nnUNet_compile": "f"}


def watch_memory(child: subprocess.Popen, peak: list[int]) -> None:
    """The greatest sum of proportional set sizes of a process and all below it, in bytes; Linux."""
    while child.poll() is None:
        peak[0] = max(peak[0], sum(map(proportional_set_size, family(child.pid))))
        time.sleep(SAMPLE_SECONDS)


def family(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(status.parent.name))
    found = [root]
    for process in found:  # it grows meanwhile
        found += children.get(process, [])
    return found


def proportional_set_size(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def child(engine: str, told: Path, words: list[str]) -> int:
    """What a run's process does: the command itself, with a clock around the network."""
    clock = {"first": 0.0, "network": 0.0}

    def timed(network):
        def forward(*arguments):
            begun = time.time()
            clock["first"] = clock["first"] or begun
            try:
                return network(*arguments)
            finally:
                clock["network"] += time.time() - begun

        return forward

    if engine == "nnunet":
        from nnunetv2.inference import predict_from_raw_data as nnunet

        predictor = nnunet.nnUNetPredictor
        predictor._internal_maybe_mirror_and_predict = timed(predictor._internal_maybe_mirror_and_predict)
        sys.argv = ["nnUNetv2_predict_from_modelfolder", *words]
        code = nnunet.predict_entry_point_modelfolder() or 0
    else:
        from nnunet_sauron_runtime import cli, engines

        cli.WHOLE = "not_installed_beside_it"
        load = engines.load_network
        engines.load_network = lambda *arguments, **options: timed(load(*arguments, **options))
        code = cli.main(words)
    told.write_text(json.dumps(clock))
    return code


def different_voxels(place: Path, measured: Iterable[str]) -> dict[str, str]:
    """Of all bundles of the pruned model, mirrored or not: voxels that differ, and all voxels."""
    import numpy as np
    import SimpleITK

    counts = {}
    for mirroring in measured:
        reference = place / f"out_{mirroring}_nnU-Net, pruned"
        for name in [name for name in WAYS if name.startswith("bundle, pruned")]:
            different = voxels = 0
            for file in sorted(reference.glob("*.nii.gz")):
                pair = [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(one)))
                        for one in (file, place / f"out_{mirroring}_{name}" / file.name)]  # fmt: skip
                different, voxels = different + int(np.count_nonzero(pair[0] != pair[1])), voxels + pair[0].size
            counts[f"{name}, {mirroring}"] = f"{different} of {voxels}"
    return counts


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {number: statistics.median(run[number] for run in runs) for number in NUMBERS}


def shown(numbers: dict[str, float], cases: int) -> str:
    return (
        f"{numbers['total']:.1f} s, start {numbers['start']:.1f} s, network {numbers['network'] / cases:.3f} s a case, "
        f"{numbers['memory'] / 1e6:.0f} MB"
    )


def print_table(mirroring: str, ways: dict[str, dict[str, float]], cases: int) -> None:
    stock = ways["nnU-Net, dense"]
    print(f"\n{mirroring}, {cases} cases; in brackets: how many times less than nnU-Net with the dense model")
    print(f"{'':32s}{'s a case':>16s}{'network, s a case':>20s}{'start, s':>16s}{'memory, MB':>18s}")
    for name, numbers in ways.items():
        cells = [
            f"{numbers[key] / scale:.{digits}f} ({stock[key] / max(numbers[key], 1e-9):.1f})"
            for key, scale, digits in (("total", cases, 2), ("network", cases, 3), ("start", 1, 1), ("memory", 1e6, 0))
        ]
        print(f"{name:32s}{cells[0]:>16s}{cells[1]:>20s}{cells[2]:>16s}{cells[3]:>18s}")


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip() if names else platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(sys.argv[2], Path(sys.argv[3]), sys.argv[4:]))
    main()
