"""What delta_opt costs: a training step of SauronTrainer over one of the stock nnUNetTrainer, before any cut.

Both are built on nnU-Net's default widths and run in one process, alternating, on random patches: nnU-Net's own
`train_step` in full (forward, loss with deep supervision, backward, clipping, SGD). Peak memory is measured in a
process of its own per trainer, as the peak resident set above the one before the first step.

    python benchmarks/train_step.py [--cases 2d 3d_fullres 2d_small] [--repeats 9] [--textbook] [--json FILE]

`2d_small` is what nnU-Net plans for the hippocampus (patch 56 x 40): many small maps. OMP_NUM_THREADS sets the threads.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {"2d": ((256, 256), 4), "3d_fullres": ((64, 64, 64), 2), "2d_small": ((56, 40), 16)}
WIDTHS = {
    "2d": [32, 64, 128, 256, 512, 512, 512],
    "3d_fullres": [32, 64, 128, 256, 320],
    "2d_small": [32, 64, 128, 256],
}
STEPS = 3  # timed together: delta_opt is in every third one
TRAINERS = ("stock", "sauron", "textbook")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps per trainer (default: 9)")
    parser.add_argument("--textbook", action="store_true", help="also time delta_opt as autograd would do it")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--memory-of", nargs=2, metavar=("TRAINER", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    trainers = TRAINERS if arguments.textbook else TRAINERS[:2]
    if arguments.memory_of:
        print(peak_memory(*arguments.memory_of))
        return

    import torch

    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "cases": {},
    }
    for case in arguments.cases:
        patch, batch = CASES[case]
        print(f"{case}: patch {patch}, batch {batch}, widths {WIDTHS[case]}", flush=True)
        times = step_times(case, trainers, arguments.repeats)
        medians = {name: statistics.median(values) for name, values in times.items()}
        # Memory of a fresh process each: in one process the second would reuse what the first had allocated.
        memory = {name: memory_in_new_process(name, case) for name in trainers}
        ratios = {
            name: statistics.median(a / b for a, b in zip(times[name], times["stock"], strict=True))
            for name in trainers
        }
        for name in trainers:
            print(
                f"  {name:9s} {medians[name]:7.3f} s a step, {ratios[name]:.3f} x stock;   "
                f"peak {memory[name] / 2**20:6.0f} MiB, {memory[name] / memory['stock']:.3f} x stock",
                flush=True,
            )
        results["cases"][case] = {
            "seconds": medians, "time_ratio": ratios, "peak_bytes": memory,
            "memory_ratio": {name: memory[name] / memory["stock"] for name in trainers},
        }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def step_times(case: str, trainers: tuple[str, ...], repeats: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: make_step(name, case, folder) for name in trainers}
        for step in steps.values():
            step()
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for repeat in range(repeats):
            # The order changes, so that none always runs after the same other one.
            for name in trainers if repeat % 2 == 0 else reversed(trainers):
                start = time.perf_counter()
                for _ in range(STEPS):
                    steps[name]()
                times[name].append((time.perf_counter() - start) / STEPS)
        return times


def memory_in_new_process(trainer: str, case: str) -> int:
    command = [sys.executable, __file__, "--memory-of", trainer, case]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_memory(trainer: str, case: str) -> int:
    """Bytes by which three steps raise the process's peak resident set."""
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(trainer, case, folder)
        before = peak_resident()
        for _ in range(3):
            step()
        return peak_resident() - before


def peak_resident() -> int:
    """This process's peak resident set in bytes (Linux). getrusage would count the parent's as well."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def make_step(name: str, case: str, folder: str):
    """A function without arguments that runs one training step."""
    os.environ.update({f"nnUNet_{kind}": folder for kind in ("raw", "preprocessed", "results")})
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_sauron.methods import sauron
    from nnunet_sauron.pruning import channel_layout
    from nnunet_sauron.trainers import SauronTrainer

    class TextbookTrainer(SauronTrainer):
        pass

    trainer_class = {"stock": nnUNetTrainer, "sauron": SauronTrainer, "textbook": TextbookTrainer}[name]
    patch, batch = CASES[case]
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer_class(plans(case), case, 0, dataset_json(), torch.device("cpu"))
        trainer.plans_manager.plans["dataset_name"] = "Dataset999_Random"
        # The look at the preprocessed data that initialize takes is the only thing that needs a data set.
        Path(trainer.preprocessed_dataset_folder).mkdir(parents=True, exist_ok=True)
        (Path(trainer.preprocessed_dataset_folder) / "case.b2nd").touch()
        trainer.initialize()
        trainer.set_deep_supervision_enabled(True)
        trainer.network.train()
    if name != "stock":
        trainer.method.attach(trainer.bare_network, channel_layout(trainer.bare_network))
        trainer.method.start_epoch(0, trainer.dense_widths)
    data = torch.randn((batch, 1, *patch))
    scales = trainer._get_deep_supervision_scales()
    target = [
        torch.randint(0, 3, (batch, 1, *[round(side * s) for side, s in zip(patch, scale, strict=True)])).float()
        for scale in scales
    ]

    def step():
        if name == "textbook":
            original, sauron.with_delta_opt = sauron.with_delta_opt, textbook_delta_opt
            try:
                trainer.train_step({"data": data, "target": target})
            finally:
                sauron.with_delta_opt = original
        else:
            trainer.train_step({"data": data, "target": target})

    return step


def textbook_delta_opt(h, normalisation: str):
    """The formula as it stands: normalise, pool, subtract, with autograd's backward."""
    import torch
    from torch.nn import functional

    space = tuple(range(2, h.ndim))
    low, high = h.amin(space, keepdim=True), h.amax(space, keepdim=True)
    pool = functional.avg_pool3d if h.ndim == 5 else functional.avg_pool2d
    maps = pool((h - low) / (high - low + 1e-8), [min(2, side) for side in h.shape[2:]])
    return h, torch.sqrt(((maps[:, :1] - maps[:, 1:]) ** 2).mean(space) + 1e-12).mean()


def plans(case: str) -> dict:
    patch, batch = CASES[case]
    widths, dim = WIDTHS[case], len(patch)
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": len(widths),
            "features_per_stage": widths,
            "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": [[3] * dim] * len(widths),
            "strides": [[1] * dim] + [[2] * dim] * (len(widths) - 1),
            "n_conv_per_stage": [2] * len(widths),
            "n_conv_per_stage_decoder": [2] * (len(widths) - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    return {
        "dataset_name": "Dataset999_Random",
        "plans_name": "nnUNetPlans",
        "continue_training": False,
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "configurations": {
            case: {
                "data_identifier": f"nnUNetPlans_{case}",
                "batch_size": batch,
                "patch_size": list(patch),
                "batch_dice": True,
                "spacing": [1.0] * dim,
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "architecture": architecture,
            }
        },
    }


def dataset_json() -> dict:
    return {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }


if __name__ == "__main__":
    main()
