"""Stock nnU-Net against SauronTrainer on real hippocampus MRI, 2D, at equal length, by nnU-Net's own commands.

The validation cases of fold 0 are scored; networks are timed alternating, one patch, with a batch of one. Steps that
are done are skipped and an interrupted training goes on, so that the same command can be given again.

    python benchmarks/hippocampus.py .../Task04_Hippocampus -o FOLDER [--epochs 80] [--iterations 12] [--sauron ...]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

DATASET = "Dataset004_Hippocampus"
REFERENCES = f"preprocessed/{DATASET}/gt_segmentations"
PLANS = "nnUNetSmallBatchPlans"
TRAINERS = ("StockTrainer", "SauronTrainer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="Task04_Hippocampus of the Medical Segmentation Decathlon")
    parser.add_argument("-o", type=Path, required=True, help="folder to work in")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--iterations", type=int, default=12, help="training steps per epoch")
    parser.add_argument("--sauron", default="tau_max=0.6,kappa=4,rho=2,cut_from=0.2,max_loss_increase=0.15")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    folder = arguments.o.resolve()
    set_environment(folder)
    prepare(arguments.data, folder)
    length = f"num_epochs={arguments.epochs},num_iterations_per_epoch={arguments.iterations}"
    length += ",num_val_iterations_per_epoch=4"
    for trainer in TRAINERS:
        settings = length if trainer == "StockTrainer" else f"{length},{arguments.sauron}"
        if not (model_folder(folder, trainer) / "fold_0" / "validation" / "summary.json").is_file():
            command = ["nnUNetv2_train", "4", "2d", "0", "-tr", trainer, "-p", PLANS, "-device", "cpu", "--c"]
            run(command, nnunet_sauron=settings, nnUNet_n_proc_DA="0", OMP_WAIT_POLICY="PASSIVE")

    from nnunet_sauron.model.device import machine

    result = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "length": length,
        "sauron": arguments.sauron,
        "models": compare(folder),
    }
    print(f"{'':14s}{'Dice':>8s}{'HD95 mm':>9s}{'parameters':>12s}{'MMACs':>8s}{'channels':>9s}{'ms/patch':>10s}")
    for name, row in result["models"].items():
        print(
            f"{name:14s}{row['dice']:8.4f}{row['hd95_mm']:9.3f}{row['parameters']:12,d}{row['macs'] / 1e6:8.1f}"
            f"{row['channels']:9d}{row['seconds_per_patch'] * 1000:10.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def set_environment(folder: Path) -> None:
    from nnunet_sauron.plugin import trainer_folder

    for kind in ("raw", "preprocessed", "results"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{kind}"] = str(folder / kind)
    os.environ.update(nnUNet_extTrainer=str(trainer_folder()), nnUNet_compile="f")


def prepare(data: Path, folder: Path) -> None:
    preprocessed = folder / "preprocessed" / DATASET
    if not (folder / "raw" / DATASET / "dataset.json").is_file():
        run(["nnUNetv2_convert_MSD_dataset", "-i", str(data)])
    if not (preprocessed / f"{PLANS}.json").is_file():
        shutil.rmtree(preprocessed, ignore_errors=True)
        run(["nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "2d", "-np", "1"])
        plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
        plans["plans_name"] = PLANS
        # nnU-Net plans 281 patches a batch, for a GPU.
        plans["configurations"]["2d"]["batch_size"] = 16
        (preprocessed / f"{PLANS}.json").write_text(json.dumps(plans, indent=4))


def compare(folder: Path) -> dict[str, dict]:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_sauron.model.evaluation import Segmentations, evaluate_folder, mean_score
    from nnunet_sauron.pruning import channel_layout, count_macs, count_parameters
    from nnunet_sauron.pruning.timing import time_networks

    rows, networks = {}, {}
    labels = {"anterior": 1, "posterior": 2}
    for trainer in TRAINERS:
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model_folder(folder, trainer)), (0,))
        networks[trainer] = network = predictor.network
        patch = tuple(predictor.configuration_manager.patch_size)
        validation = model_folder(folder, trainer) / "fold_0" / "validation"
        kind = Segmentations(labels)
        cases = [path.name for path in kind.files(validation)]
        scores = evaluate_folder(validation, folder / REFERENCES, kind, cases=cases)
        rows[trainer] = {
            "cases": len(scores),
            "dice": mean_score(scores, "dice").value,
            "hd95_mm": mean_score(scores, "hd95").value,
            "parameters": count_parameters(network),
            "macs": count_macs(network, patch, 1),
            "channels": sum(channel_layout(network).widths.values()),
            "widths": channel_layout(network).widths,
        }
    for trainer, timing in time_networks(networks, (1, 1, *patch), repeats=300, warmup=30).items():
        rows[trainer]["seconds_per_patch"] = timing.median
        rows[trainer]["threads"] = timing.threads
    return rows


def model_folder(folder: Path, trainer: str) -> Path:
    return folder / "results" / DATASET / f"{trainer}__{PLANS}__2d"


def run(command: list[str], **variables: str) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True, env={**os.environ, **variables})


if __name__ == "__main__":
    main()
