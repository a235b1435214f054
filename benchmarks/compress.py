"""What `nnUNetv2_sauron compress` costs on real hippocampus MRI: alone, trained on, and the same widths anew.

For each model: stock nnU-Net is trained on fold 0, compressed to each target with layers fitted on test images without
labels, trained on with CompressedTrainer, and the compressed widths are trained from scratch for as long as the stock
model. Dice and HD95 are of the 40 validation cases. Steps that are done are skipped and an interrupted training goes
on, so that the same command can be given again, also at the same time for other models.

    python benchmarks/compress.py .../Task04_Hippocampus -o FOLDER [--models 2d 3d resenc] [--json FILE] [--png FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from hippocampus import DATASET, REFERENCES, run, set_environment

ONE_PROCESS = ["-device", "cpu", "-npp", "1", "-nps", "1"]


@dataclass(frozen=True)
class Model:
    """What is trained, small enough for two cores: nnU-Net plans batches for a GPU, such as 281 patches in 2D."""

    title: str
    configuration: str
    source_plans: str
    plans: str
    scale: float
    batch_size: int


MODELS = {
    "2d": Model("2D, 32 to 256 channels", "2d", "nnUNetPlans", "nnUNetStudyPlans", 1, 16),
    "3d": Model("3D, 16 to 128 channels", "3d_fullres", "nnUNetPlans", "nnUNetStudyHalfPlans", 0.5, 2),
    "resenc": Model("2D ResEncM, 16 to 128 channels", "2d", "nnUNetResEncUNetMPlans", "nnUNetStudyResEncPlans", 0.5, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="Task04_Hippocampus of the Medical Segmentation Decathlon")
    parser.add_argument("-o", type=Path, required=True, help="folder to work in")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--macs", type=float, nargs="+", default=[0.75, 0.5, 0.35, 0.25, 0.15], help="targets")
    parser.add_argument("--train", type=int, default=48, help="epochs of the stock model and of the widths anew")
    parser.add_argument("--epochs", type=int, nargs="*", default=[5, 20], help="lengths of training on")
    parser.add_argument("--iterations", type=int, default=25, help="training steps per epoch")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()

    from nnunet_sauron.model.device import machine

    folder = arguments.o.resolve()
    set_environment(folder)
    result = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "train": arguments.train,
        "iterations": arguments.iterations,
        "models": {},
    }
    for name in arguments.models:
        prepare(arguments.data, folder, MODELS[name])
        study = Study(folder, MODELS[name], arguments.iterations, arguments.train)
        result["models"][name] = rows = study.rows(arguments.macs, arguments.epochs)
        print(f"\n{MODELS[name].title:30s}{'MACs':>6s}{'params':>8s}{'time':>6s}{'Dice':>8s}{'HD95 mm':>9s}")
        for row in rows:
            left = "".join(f"{row[key]:{width}.2f}" for key, width in (("macs", 6), ("parameters", 8), ("seconds", 6)))
            print(f"{row['what']:30s}{left}{row['dice']:8.4f}{row['hd95_mm']:9.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.png:
        plot(result, arguments.png)


def prepare(data: Path, folder: Path, model: Model) -> None:
    preprocessed = folder / "preprocessed" / DATASET
    if not (folder / "raw" / DATASET / "dataset.json").is_file():
        run(["nnUNetv2_convert_MSD_dataset", "-i", str(data)])
    if not (preprocessed / "nnUNetPlans_3d_fullres").is_dir():
        run(["nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "2d", "3d_fullres", "-np", "1"])
    if not (preprocessed / f"{model.source_plans}.json").is_file():
        run(["nnUNetv2_plan_experiment", "-d", "4", "-pl", "nnUNetPlannerResEncM"])
    if not (preprocessed / f"{model.plans}.json").is_file():
        run(["nnUNetv2_sauron", "plan", "-d", "4", "-p", model.source_plans, "-c", model.configuration,
             "--scale", str(model.scale), "--batch-size", str(model.batch_size), "-o", model.plans])  # fmt: skip


class Study:
    """One model's rows of the table, each made by nnU-Net's and our own commands."""

    def __init__(self, folder: Path, model: Model, iterations: int, epochs: int) -> None:
        self.folder = folder
        self.model = model
        self.length = f"num_iterations_per_epoch={iterations},num_val_iterations_per_epoch=4,num_epochs="
        self.epochs = epochs

    def rows(self, targets: list[float], lengths: list[int]) -> list[dict]:
        stock = self.trained("StockTrainer", self.model.plans, self.epochs, self.folder / "results")
        rows = [self.row("stock", stock / "validation", stock, {"macs": 1.0, "parameters": 1.0, "seconds": 1.0})]
        folder = self.folder / "compressed" / self.model.plans
        models = {macs: folder / f"macs_{macs:g}" for macs in targets}
        for macs, small in models.items():
            if not small.is_dir():
                self.compress(stock.parent, small, macs)
        seconds = network_times([stock.parent, *models.values()])
        for macs, small in models.items():
            fold = json.loads((small / "compression.json").read_text())["folds"]["0"]
            left = {name: fold[name][1] / fold[name][0] for name in ("macs", "parameters")}
            left["seconds"] = seconds[small] / seconds[stock.parent]
            left["compress"] = json.loads(Path(f"{small}_cost.json").read_text())
            rows.append(self.row(f"{macs:g} alone", self.predicted(small, stock), stock, left))
            for epochs in lengths:
                results = Path(f"{small}_epochs_{epochs}")
                start = {"start_from": small}
                after = self.trained("CompressedTrainer", self.model.plans, epochs, results, **start)
                rows.append(self.row(f"{macs:g} and {epochs} epochs", after / "validation", stock, left))
            plans = self.model.plans.replace("Plans", f"Macs{macs * 100:.0f}Plans")
            if not (self.folder / "preprocessed" / DATASET / f"{plans}.json").is_file():
                run(["nnUNetv2_sauron", "plan", "-d", "4", "-p", self.model.plans, "-c", self.model.configuration,
                     "-o", plans, "--widths-from", str(small / "fold_0" / "checkpoint_final.pth")])  # fmt: skip
            anew = self.trained("StockTrainer", plans, self.epochs, self.folder / "results")
            rows.append(self.row(f"{macs:g} anew", anew / "validation", stock, left))
        return rows

    def compress(self, model: Path, small: Path, macs: float) -> None:
        """Compress, and keep the wall-clock seconds and the process's peak memory beside what was written."""
        small.parent.mkdir(parents=True, exist_ok=True)
        images = self.folder / "raw" / DATASET / "imagesTs"
        command = ["nnUNetv2_sauron", "compress", "-m", str(model), "-i", str(images), "-o", str(small)]
        command += ["--macs", str(macs)]
        print("$", *command, flush=True)
        begun = time.perf_counter()
        _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
        if status != 0:
            raise RuntimeError(f"{command[0]} ended with status {status}")
        cost = {"seconds": round(time.perf_counter() - begun, 1), "peak_gb": round(usage.ru_maxrss / 1e6, 2)}
        Path(f"{small}_cost.json").write_text(json.dumps(cost))

    def trained(
        self, trainer: str, plans: str, epochs: int, results: Path, weights: Path | None = None, **settings: object
    ) -> Path:
        """The fold's folder after a training, begun with these weights, and its validation."""
        fold = results / DATASET / f"{trainer}__{plans}__{self.model.configuration}" / "fold_0"
        if not (fold / "validation" / "summary.json").is_file():
            command = ["nnUNetv2_train", "4", self.model.configuration, "0", "-tr", trainer, "-p", plans]
            words = [f"{self.length}{epochs}", *(f"{name}={value}" for name, value in settings.items())]
            environment = {"nnunet_sauron": ",".join(words), "nnUNet_results": str(results)}
            begun = any(fold.glob("checkpoint_*.pth"))
            start = ["-pretrained_weights", str(weights)] if weights and not begun else ["--c"]
            run(
                [*command, "-device", "cpu", *start],
                nnUNet_n_proc_DA="0",
                nnUNet_def_n_proc="1",
                OMP_WAIT_POLICY="PASSIVE",
                **environment,
            )
        return fold

    def predicted(self, model: Path, stock: Path) -> Path:
        """Predictions of the validation cases."""
        images, output = self.folder / "validation_images", Path(f"{model}_predictions") / "validation"
        images.mkdir(exist_ok=True)
        for name in self.cases(stock):
            image = images / name.replace(".nii.gz", "_0000.nii.gz")
            if not image.exists():
                image.symlink_to(self.folder / "raw" / DATASET / "imagesTr" / image.name)
        if not output.is_dir():
            beside = output.with_name("validation.tmp")
            run(["nnUNetv2_predict_from_modelfolder", "-m", str(model), "-i", str(images), "-o", str(beside), "-f", "0",
                 *ONE_PROCESS], OMP_WAIT_POLICY="PASSIVE")  # fmt: skip
            beside.rename(output)
        return output

    def cases(self, stock: Path) -> list[str]:
        return sorted(path.name for path in (stock / "validation").glob("*.nii.gz"))

    def row(self, what: str, predictions: Path, stock: Path, left: dict) -> dict:
        from nnunet_sauron.model.evaluation import Segmentations, evaluate_folder, mean_score

        kind = Segmentations({"anterior": 1, "posterior": 2})
        scores = evaluate_folder(predictions, self.folder / REFERENCES, kind, cases=self.cases(stock))
        dice = mean_score(scores, "dice").value
        hd95 = mean_score(scores, "hd95")
        return {"what": what, **left, "dice": dice, "hd95_mm": hd95.value, "hd95_undefined": hd95.undefined}


def network_times(models: list[Path]) -> dict[Path, float]:
    """Median seconds of one patch, all models taking turns."""
    from nnunet_sauron.model.trained import TrainedModel
    from nnunet_sauron.pruning.timing import time_networks

    read = {folder: TrainedModel.read(folder, ["0"]) for folder in models}
    shape = (1, read[models[0]].input_channels, *read[models[0]].patch_size)
    timed = time_networks({str(folder): model.network("0") for folder, model in read.items()}, shape, repeats=100)
    return {folder: timed[str(folder)].median for folder in models}


def plot(result: dict, png: Path) -> None:
    """Dice against the part of the MACs that is left, a panel a model; spaced by the logarithm of 1 - Dice."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(result["models"]), figsize=(4.2 * len(result["models"]), 3.8), sharey=True, squeeze=False
    )
    for axis, (name, rows) in zip(axes[0], result["models"].items(), strict=True):
        stock, *others = rows
        axis.axhline(stock["dice"], color="black", linewidth=1)
        axis.annotate("stock", (104, stock["dice"]), (0, 3), textcoords="offset points", ha="right", fontsize=8)
        kinds = list(dict.fromkeys(row["what"].split(" ", 1)[1] for row in others))
        styles = zip(kinds, ("o-", "s--", "D-.", "^:"), ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=False)
        for kind, marker, colour in styles:
            chosen = [row for row in others if row["what"].split(" ", 1)[1] == kind]
            label = {"alone": "compress alone", "anew": "same widths from scratch"}.get(kind, f"{kind} of training on")
            axis.plot([100 * row["macs"] for row in chosen], [row["dice"] for row in chosen], marker, color=colour,
                      label=label.replace("and ", ""))  # fmt: skip
        axis.set(title=MODELS[name].title, xlabel="multiply-accumulates left, %", xlim=(0, 105))
        axis.grid(alpha=0.3)
    left = axes[0][0]
    to_scale, from_scale = (lambda dice: -np.log(np.maximum(1 - dice, 1e-3)), lambda y: 1 - np.exp(-y))
    left.set_yscale("function", functions=(to_scale, from_scale))
    ticks = [0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98]
    low, high = left.get_ylim()
    left.set_yticks([tick for tick in ticks if low <= tick <= high])
    left.set_ylabel("mean Dice, 40 validation cases")
    left.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(png, dpi=130)


if __name__ == "__main__":
    main()
