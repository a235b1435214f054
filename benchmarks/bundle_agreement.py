"""Voxels in which a bundle's segmentations differ from nnU-Net's own, case by case, with both engines.

Each model is exported, nnU-Net's predictor and the runtime segment the same files, and what they wrote is compared:
labels, classes that one of them lacks, and geometry. It ends with 1 where more than one voxel of 100,000 differs, a
class is lost, or a geometry differs.

    python benchmarks/bundle_agreement.py -m MODEL [MODEL ...] -i imagesTr [-n 20] [--json FILE] [--md FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from nnunet_sauron_runtime import Bundle
from nnunet_sauron_runtime.prediction import Request, predict_folder
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_sauron.deploy.command import export
from nnunet_sauron.model.device import machine
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.plugin import trainer_folder

ENGINES = ("openvino", "onnxruntime")
AT_MOST = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", nargs="+", type=Path, required=True, help="folders of trained models")
    parser.add_argument("-i", type=Path, required=True, help="raw images, named as nnU-Net has them")
    parser.add_argument("-n", type=int, default=20, help="of these so many cases, the first by name")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--md", type=Path)
    arguments = parser.parse_args()
    os.environ["nnUNet_extTrainer"] = str(trainer_folder())
    result = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "models": {}}
    with tempfile.TemporaryDirectory() as place:
        for number, folder in enumerate(arguments.m):
            model = TrainedModel.read(folder)
            title = f"{folder.parent.parent.name}: {folder.name}, folds {' '.join(model.checkpoints)}"
            result["models"][title] = compare(model, arguments.i, arguments.n, Path(place) / str(number))
    table = as_markdown(result)
    print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.md:
        arguments.md.write_text(table)
    rows = [row for rows in result["models"].values() for row in rows]
    return 0 if all(good(rows, engine) for engine in ENGINES) else 1


def compare(model: TrainedModel, images: Path, count: int, place: Path) -> list[dict]:
    """A row for each case: its voxels, and of each engine the voxels that differ, lost classes, and geometry."""
    cases = sorted({file.name[: -len("_0000.nii.gz")] for file in images.glob("*_0000.nii.gz")})[:count]
    chosen = place / "images"
    chosen.mkdir(parents=True)
    for case in cases:
        for file in images.glob(f"{case}_????.nii.gz"):
            shutil.copy(file, chosen)
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model.folder), tuple(model.checkpoints))
    (place / "nnunet").mkdir()
    predictor.predict_from_files_sequential(str(chosen), str(place / "nnunet"))
    export(model.folder, place / "bundle.zip", folds=list(model.checkpoints))
    for engine in ENGINES:
        failed = predict_folder(Bundle(place / "bundle.zip", engine=engine), chosen, Request(place / engine))
        if failed:
            raise SystemExit(f"{engine} failed on {failed}")
    rows = []
    for case in cases:
        theirs = SimpleITK.ReadImage(str(place / "nnunet" / f"{case}.nii.gz"))
        row = {"case": case, "voxels": theirs.GetNumberOfPixels()}
        for engine in ENGINES:
            ours = SimpleITK.ReadImage(str(place / engine / f"{case}.nii.gz"))
            found, expected = map(SimpleITK.GetArrayViewFromImage, (ours, theirs))
            lost = np.setdiff1d(np.unique(expected), np.unique(found)).tolist()
            geometry = all(
                getattr(ours, what)() == getattr(theirs, what)()
                for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection")
            )
            row[engine] = {"different": int((found != expected).sum()), "lost": lost, "same_geometry": geometry}
        rows.append(row)
    return rows


def good(rows: list[dict], engine: str) -> bool:
    """Whether an engine's segmentations agree as far as they must."""
    different, voxels = (sum(row[engine]["different"] for row in rows), sum(row["voxels"] for row in rows))
    clean = all(row[engine]["same_geometry"] and not row[engine]["lost"] for row in rows)
    return clean and different <= AT_MOST * voxels


def as_markdown(result: dict) -> str:
    """The table, a row per case."""
    where = f"{result['machine']['processor']}, {result['machine']['cores']} cores, {result['date']}"
    lines = ["# Voxels in which a bundle and nnU-Net differ", "", where, ""]
    for title, rows in result["models"].items():
        lines += [f"## {title}", "", f"| case | voxels | {' | '.join(ENGINES)} |", "|---|---|" + "---|" * len(ENGINES)]
        for row in rows:
            cells = []
            for engine in ENGINES:
                found = row[engine]
                lost = f", lost {found['lost']}" if found["lost"] else ""
                cells.append(f"{found['different']}{lost}{'' if found['same_geometry'] else ', other geometry'}")
            lines.append(f"| {row['case']} | {row['voxels']} | {' | '.join(cells)} |")
        sums = [sum(row[engine]["different"] for row in rows) for engine in ENGINES]
        lines += [f"| all | {sum(row['voxels'] for row in rows)} | {' | '.join(map(str, sums))} |", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
