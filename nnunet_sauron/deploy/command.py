"""The verb `export` from its first check to its last line."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from ..console.json_output import print_json
from ..console.numbers import with_prefix
from ..console.progress import Progress
from ..files import AGAIN, write_atomically
from ..model.trained import CHECKPOINT, TrainedModel
from .checks import check_differences, check_installed, greatest_differences, synthetic_patches
from .description import check_exportable, describe, model_card
from .networks import write_network

BUNDLE = "bundle.json"


def export(
    folder: Path,
    output: Path,
    *,
    folds: list[str] | None = None,
    checkpoint: str = CHECKPOINT,
    previous_stage: Path | None = None,
    precision: str = "float32",
    images: Path | None = None,
    card_file: Path | None = None,
    card: Mapping[str, str] | None = None,
    json_output: bool = False,
) -> None:
    """Write a bundle, checked against PyTorch.

    Args:
        folder: A trained model's folder.
        output: A file NAME.zip or a folder, which must not exist.
        folds: Only these; None for 0 to 4, or all where it is alone.
        checkpoint: File name of the checkpoints to read.
        previous_stage: Of a cascade, the folder of the model before it; the same folds are read.
        precision: "float32"; "float16" for weights of half the size; "int8" for convolutions in whole numbers.
        images: Raw images in nnU-Net's naming, for checks on patches of them and for the calibration of int8.
        card_file, card: The card's fields, as JSON and one by one.
        json_output: Print JSON instead of lines.

    Raises:
        FileExistsError, FileNotFoundError, OSError: The output exists or cannot be written; the model is not there.
        ValueError: The model is one that no bundle can hold, or a package is missing; nothing is written then.
        RuntimeError: What was exported does not compute what PyTorch computes; nothing is left of it.
    """
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists; give the name of a file or folder that does not.")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent} is no folder; make it first, or give another -o.")
    check_installed()
    model = TrainedModel.read(folder, folds, checkpoint)
    previous = TrainedModel.read(previous_stage, folds, checkpoint) if previous_stage else None
    check_exportable(model, previous)
    filled = model_card(card_file, card or {}, f"{model.plans['dataset_name']} {model.configuration}")
    progress = Progress()
    for remark in [*(previous.remarks if previous else []), *model.remarks]:
        progress.say(remark)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=parent) as place:
        beside = Path(place) / "bundle"
        beside.mkdir()
        checked = {}
        stages = []
        for prefix, one in [("lowres_", previous), ("", model)] if previous else [("", model)]:
            names = {fold: f"{prefix}fold_{fold}.onnx" for fold in one.checkpoints}
            for fold, name in names.items():
                checked[name] = _write_checked(one, fold, beside / name, progress)
            stages.append((one, list(names.values())))
        files = {path.name: _checksum(path) for path in sorted(beside.iterdir())}
        described = describe(stages, precision, filled, files)
        (beside / BUNDLE).write_text(json.dumps(described, indent=2, allow_nan=False), encoding="utf-8")
        if output.suffix.lower() == ".zip":
            write_atomically(output, lambda path: _pack(beside, Path(path)), AGAIN)
        else:
            os.replace(beside, output)
    size = output.stat().st_size if output.is_file() else sum(path.stat().st_size for path in output.iterdir())
    command = f"nnUNetv2_sauron predict -b {shlex.quote(str(output))} -i IMAGES -o OUT"
    if json_output:
        print_json({"bundle": str(output), "bytes": size, "differences": checked, "predict": command})
    else:
        print(f"Wrote {output}, {with_prefix(size, 'B')}\n{command}")


def _write_checked(model: TrainedModel, fold: str, path: Path, progress: Progress) -> dict[str, dict[str, float]]:
    """Write a fold's network, and the greatest differences of its logits from PyTorch's."""
    network = model.network(fold)
    with progress.bar(f"{model.configuration}, fold {fold}: writing and checking", 1):
        write_network(network, model.input_channels, model.patch_size, path)
        patches = synthetic_patches(model.input_channels, model.patch_size)
        differences = greatest_differences(network, path, patches)
    check_differences(differences, f"Fold {fold} of {model.folder}")
    for engine, kinds in differences.items():
        worst = max(kinds, key=kinds.get)
        progress.say(f"{path.name}: logits differ from PyTorch's by at most {kinds[worst]:.1e} in {engine} ({worst})")
    return differences


def _checksum(path: Path) -> dict:
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _pack(folder: Path, file: Path) -> None:
    # Stored as they are: weights hardly get smaller, and a bundle opens faster.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.iterdir(), key=lambda path: (path.name != BUNDLE, path.name)):
            archive.write(path, path.name)
