"""What `nnUNetv2_sauron compress` costs on real hippocampus MRI, 2D: alone, trained on, and the same widths anew.

Starts from the stock model that benchmarks/hippocampus.py trained in its folder. Layers are fitted on test images
without labels; Dice and HD95 are of the validation cases of fold 0. Steps that are done are skipped.

    python benchmarks/compress.py FOLDER [--macs 0.75 0.5 0.35] [--epochs 5 20] [--anew "num_epochs=64,..."]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

from hippocampus import DATASET, PLANS, model_folder, references_of, run, set_environment

ONE_PROCESS = ["-device", "cpu", "-npp", "1", "-nps", "1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where benchmarks/hippocampus.py worked")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.75, 0.5, 0.35, 0.25, 0.15], help="targets")
    parser.add_argument("--epochs", type=int, nargs="*", default=[5, 20], help="lengths of training on")
    parser.add_argument("--iterations", type=int, default=12, help="training steps per epoch")
    parser.add_argument("--anew", help="settings to train the same widths from scratch with, such as num_epochs=64")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    folder = arguments.folder.resolve()
    set_environment(folder)
    stock = model_folder(folder, "StockTrainer")
    length = f"num_iterations_per_epoch={arguments.iterations},num_val_iterations_per_epoch=4"
    rows = {"stock": scored(stock / "fold_0" / "validation", folder)}
    for macs in arguments.macs:
        small = folder / "compressed" / f"macs_{macs:g}"
        if not small.is_dir():
            small.parent.mkdir(exist_ok=True)
            images = folder / "raw" / DATASET / "imagesTs"
            begun = time.perf_counter()
            run(["nnUNetv2_sauron", "compress", "-m", str(stock), "-i", str(images), "-o", str(small),
                 "--macs", str(macs)])  # fmt: skip
            print(f"{time.perf_counter() - begun:.0f} s")
        fold = json.loads((small / "compression.json").read_text())["folds"]["0"]
        left = {name: fold[name][1] / fold[name][0] for name in ("parameters", "macs", "seconds")}
        rows[f"{macs:g} alone"] = {**scored(predicted(small, folder), folder), **left}
        for epochs in arguments.epochs:
            settings = f"start_from={small},num_epochs={epochs},{length}"
            results = folder / "compressed" / f"macs_{macs:g}_epochs_{epochs}"
            rows[f"{macs:g} and {epochs} epochs"] = trained("CompressedTrainer", PLANS, settings, results, folder)
        if arguments.anew:
            plans = f"nnUNetCompressed{macs * 100:.0f}Plans"
            if not (folder / "preprocessed" / DATASET / f"{plans}.json").is_file():
                run(["nnUNetv2_sauron", "plan", "-d", "4", "-p", PLANS, "-c", "2d", "-o", plans,
                     "--widths-from", str(small / "fold_0" / "checkpoint_final.pth")])  # fmt: skip
            results = folder / "compressed" / f"macs_{macs:g}_anew"
            rows[f"{macs:g} anew"] = trained("StockTrainer", plans, f"{length},{arguments.anew}", results, folder)

    print(f"{'MACs left':20s}{'Dice':>8s}{'HD95 mm':>9s}")
    for name, row in rows.items():
        print(f"{name:20s}{row['dice']:8.4f}{row['hd95_mm']:9.3f}")
    if arguments.json:
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        result = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "length": length, "models": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def trained(trainer: str, plans: str, settings: str, results: Path, folder: Path) -> dict[str, float]:
    """Scores after a training with results of its own."""
    validation = results / DATASET / f"{trainer}__{plans}__2d" / "fold_0" / "validation"
    if not (validation / "summary.json").is_file():
        command = ["nnUNetv2_train", "4", "2d", "0", "-tr", trainer, "-p", plans, "-device", "cpu", "--c"]
        of_this = {"nnunet_sauron": settings, "nnUNet_results": str(results)}
        run(command, nnUNet_n_proc_DA="0", OMP_WAIT_POLICY="PASSIVE", **of_this)
    return scored(validation, folder)


def predicted(model: Path, folder: Path) -> Path:
    """Predictions of the validation cases of fold 0."""
    images, output = folder / "compressed" / "validation_images", Path(f"{model}_predictions") / "validation"
    if not images.is_dir():
        images.mkdir()
        for case in (model_folder(folder, "StockTrainer") / "fold_0" / "validation").glob("*.nii.gz"):
            name = case.name.replace(".nii.gz", "_0000.nii.gz")
            (images / name).symlink_to(folder / "raw" / DATASET / "imagesTr" / name)
    if not output.is_dir():
        run(["nnUNetv2_predict_from_modelfolder", "-m", str(model), "-i", str(images), "-o", str(output), "-f", "0",
             *ONE_PROCESS], OMP_WAIT_POLICY="PASSIVE")  # fmt: skip
    return output


def scored(predictions: Path, folder: Path) -> dict[str, float]:
    from nnunet_sauron.analysis.evaluation import evaluate_folder, mean_score

    scores = evaluate_folder(predictions, references_of(predictions, folder), {"anterior": 1, "posterior": 2})
    return {
        "dice": mean_score(scores, lambda score: score.dice).value,
        "hd95_mm": mean_score(scores, lambda score: score.hd95).value,
    }


if __name__ == "__main__":
    main()
