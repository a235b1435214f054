"""Whether a cut while training should merge or drop, on real hippocampus MRI: trainers both ways, from one start.

A stock nnU-Net is trained as benchmarks/compress.py does, in its folder; each trainer then prunes it from those
weights (-pretrained_weights: nnU-Net gives it new heads), with `merge=True` and without in turn: to the same target,
but Sauron, which has none, by the same thresholds. Dice and HD95 are of the validation cases of fold 0; `lowest` is
the lowest pseudo Dice after the first cut. Trainings that are done are skipped and an interrupted one goes on, so that
the same command can be given again, also at the same time for other trainers; other settings need another folder.

    python benchmarks/merge_or_drop.py .../Task04_Hippocampus -o FOLDER [--trainers L1Trainer ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

from compress import MODELS, Study, prepare
from hippocampus import set_environment

TO_TARGET = ("L1Trainer", "TaylorTrainer", "STAMPTrainer", "RandomLargestLayerTrainer", "FPGMTrainer")
PHASE = {"cut_from": 0.2, "cut_until": 0.7}
# Sauron has no target; these thresholds climb as fast as so few epochs allow.
SAURON = {"tau_max": 0.6, "kappa": 1, "rho": 2, "max_loss_increase": 0.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="Task04_Hippocampus of the Medical Segmentation Decathlon")
    parser.add_argument("-o", type=Path, required=True, help="folder to work in, that of compress.py")
    parser.add_argument("--model", choices=MODELS, default="2d")
    parser.add_argument("--trainers", nargs="+", default=[*TO_TARGET, "SauronTrainer"])
    parser.add_argument("--macs", type=float, default=0.25, help="target")
    parser.add_argument("--train", type=int, default=48, help="epochs of the stock model")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of pruning and healing")
    parser.add_argument("--iterations", type=int, default=25, help="training steps per epoch")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    from nnunet_sauron.model.device import machine

    folder = arguments.o.resolve()
    set_environment(folder)
    model = MODELS[arguments.model]
    prepare(arguments.data, folder, model)
    study = Study(folder, model, arguments.iterations, arguments.train)
    stock = study.trained("StockTrainer", model.plans, arguments.train, folder / "results")
    rows = [study.row("stock", stock / "validation", stock, {"macs": 1.0, "parameters": 1.0})]
    print(f"stock, {arguments.train} epochs: Dice {rows[0]['dice']:.4f}, HD95 {rows[0]['hd95_mm']:.2f} mm", flush=True)
    for repeat in range(arguments.repeats):
        for trainer in arguments.trainers:
            for merge in (False, True):
                how_far = SAURON if trainer == "SauronTrainer" else {"target_macs": arguments.macs}
                settings = {**PHASE, **how_far, "merge": merge}
                results = folder / "merge_or_drop" / f"{arguments.macs:g}_{'merge' if merge else 'drop'}_{repeat}"
                start = stock / "checkpoint_final.pth"
                fold = study.trained(trainer, model.plans, arguments.epochs, results, start, **settings)
                row = {"trainer": trainer, "merge": merge, "repeat": repeat, **of_training(fold)}
                rows.append(study.row(f"{trainer} {'merge' if merge else 'drop'}", fold / "validation", stock, row))
                print(f"{rows[-1]['what']:32s} MACs {row['macs']:.2f}  parameters {row['parameters']:.2f}  lowest "
                      f"{row['lowest']:.3f}  Dice {rows[-1]['dice']:.4f}  HD95 {rows[-1]['hd95_mm']:6.2f} mm",
                      flush=True)  # fmt: skip
    print(f"\n{'medians':28s}{'MACs':>6s}{'params':>8s}{'lowest':>8s}{'Dice':>8s}{'HD95 mm':>9s}")
    for what in dict.fromkeys(row["what"] for row in rows[1:]):
        runs = [row for row in rows if row["what"] == what]
        keys = ("macs", "parameters", "lowest", "dice", "hd95_mm")
        of = {key: statistics.median(row[key] for row in runs) for key in keys}
        print(f"{what:28s}{of['macs']:6.2f}{of['parameters']:8.2f}{of['lowest']:8.3f}{of['dice']:8.4f}"
              f"{of['hd95_mm']:9.2f}")  # fmt: skip
    if arguments.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()
                    if key not in ("data", "o", "json")}  # fmt: skip
        settings |= {"phase": PHASE, "sauron": SAURON}
        result = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), **settings, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def of_training(fold: Path) -> dict:
    """What a pruning training's checkpoint tells of it."""
    from nnunet_sauron.model.checkpoints import read_checkpoint

    logging = read_checkpoint(fold / "checkpoint_final.pth")["logging"]
    history = logging["pruning"]
    first_cut = next((epoch for epoch, record in enumerate(history) if record["keep"]), len(history) - 1)
    return {
        "macs": history[-1]["macs"] / history[0]["macs"],
        "parameters": history[-1]["parameters"] / history[0]["parameters"],
        "lowest": float(min(logging["mean_fg_dice"][first_cut + 1 :], default=math.nan)),
        "pseudo_dice": [round(float(dice), 4) for dice in logging["mean_fg_dice"]],
    }


if __name__ == "__main__":
    main()
