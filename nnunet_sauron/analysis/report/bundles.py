"""Bundles as columns of a report, beside the models that they were exported from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from nnunet_sauron_runtime import Bundle
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from torch import nn

from ...console.progress import Progress
from ...model.evaluation import CaseScore, Segmentations
from ...model.labels import class_values, foreground_values
from ...plugin.commands import command
from ..cost import NetworkCost
from .scores import PREDICTIONS, score_folder, without_quality


class InEngine(nn.Module):
    """An engine's network behind PyTorch's forward, so that both are timed taking turns; on the CPU.

    Args:
        run: (N, channels, *patch) to logits.
        file: Which network it is.
    """

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], file: str):
        super().__init__()
        self.run, self.file = run, file

    def forward(self, patch: torch.Tensor) -> np.ndarray:
        return self.run(patch.numpy())


def open_bundle(path: Path) -> Bundle:
    """A bundle in the default engine, with PyTorch's number of threads.

    Raises:
        ValueError, ImportError: As `Bundle`; or it is a checkpoint.
    """
    if path.suffix == ".pth":
        raise ValueError(f"{path} is a checkpoint; expected a model's folder or a bundle. Give {path.parent.parent}.")
    return Bundle(path, threads=torch.get_num_threads())


def engine_networks(bundle: Bundle, folds: Sequence[str] | None) -> dict[str, tuple[InEngine, NetworkCost]]:
    """The networks of its last stage by fold, and what is known of their cost: the size of a file; the rest is nan.

    Args:
        bundle: The bundle.
        folds: Only these; None for all.

    Raises:
        ValueError: It does not hold one of them.
    """
    stage, found = bundle.manifest.stages[-1], {}
    for file, run in zip(stage.networks, bundle.networks[-1], strict=True):
        _, size = bundle.manifest.files[file]
        cost = NetworkCost(parameters=math.nan, macs=math.nan, weights_bytes=size, peak_memory_bytes=math.nan)
        fold = file.removesuffix(".onnx").removeprefix("fold_")
        found[fold] = InEngine(run, f"{bundle.path}: {file}"), cost
    if folds and (missing := [fold for fold in folds if fold not in found]):
        raise ValueError(f"it holds folds {', '.join(found)} and not {', '.join(missing)}. Leave them out of -f.")
    return {fold: one for fold, one in found.items() if not folds or fold in folds}


def classes_of(bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """Foreground classes or regions with their values."""
    return foreground_values(bundle.manifest.labels)


def score_bundle(
    name: str,
    bundle: Bundle,
    predictions: Path | None,
    labels: Path | None,
    tolerance_mm: float,
    problems: list[str],
    progress: Progress,
) -> dict[str, list[CaseScore]]:
    """Score a folder that `predict` wrote; as `score_model`."""
    what = f"{name}, {PREDICTIONS}"
    manifest = bundle.manifest
    try:
        if predictions is None:
            predict = command("nnUNetv2_sauron", "predict", "-b", bundle.path, "-i", "IMAGES", "-o", "OUT")
            raise FileNotFoundError(
                f"a bundle holds no segmentations. Make some: {predict} and give --predictions OUT --labels LABELS."
            )
        values = {value for several in class_values(manifest.labels).values() for value in several}
        values.update(manifest.regions_class_order or ())
        reader = recursive_find_reader_writer_by_name(manifest.image_reader)()
        ignored = manifest.said["labels"].get("ignore")  # which references may have, and no segmentation
        kind = Segmentations(classes_of(bundle), ignored, manifest.file_ending, reader, frozenset(values))
        found = score_folder(what, predictions, labels, kind, tolerance_mm, problems, progress, every_reference=True)
        return {PREDICTIONS: found} if found else {}
    except Exception as error:  # whatever is in that folder, the other models are scored
        problems.append(without_quality(what, error))
        return {}
