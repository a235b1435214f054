"""The verb `feature_maps`: find the case, show its maps fold by fold, write."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nnunet_sauron_runtime.whole_files import check_name

from ...console.progress import Progress
from ...model.cases import case_of, check_cases
from ...model.trained import TrainedModel
from .maps import feature_maps, layer_names
from .plots import check_output, write


def print_layers(folder: Path, folds: Sequence[str] | None, checkpoint: str) -> None:
    """Print the name, the number of maps and the size of every layer, of the first fold.

    Raises:
        FileNotFoundError, ValueError: As `TrainedModel.read`.
    """
    model = _read(folder, folds, checkpoint)
    for layer in layer_names(model, next(iter(model.checkpoints))):
        size = " x ".join(str(length) for length in layer.voxels)
        print(f"{layer.name:40s}{layer.channels:5d} maps of {size}")


def write_feature_maps(
    folder: Path,
    image: Path | None,
    output: Path,
    *,
    folds: Sequence[str] | None,
    layer: str | None,
    slice_index: int | None,
    labels: Path | None,
    nifti: bool,
    checkpoint: str,
    device: str | None,
) -> None:
    """Write pictures of a layer's maps, and print where they are.

    Args:
        folder: The model's.
        image: A file of the case.
        output: The folder to make; of several folds it gets a folder for each.
        folds: Only these; None for the first that is there.
        layer, slice_index, labels, device: As `feature_maps` takes them.
        nifti: Write whole volumes as well.
        checkpoint: File name of the checkpoints to read.

    Raises:
        FileExistsError: The output folder holds something.
        FileNotFoundError, ValueError: As `feature_maps`; or there is no image, or volumes cannot have such a name.
    """
    if image is None:
        raise ValueError("-i IMAGE is missing: a file of the case to show, such as imagesTs/CASE_0000.nii.gz.")
    check_output(output)
    if nifti:
        check_name(output.resolve())
    model = _read(folder, folds, checkpoint)
    model.check_reads_images_alone()
    progress = Progress()
    case = case_of(image, model)
    check_cases(model, [case], progress)
    if labels and not labels.name.startswith(case.name):
        progress.say(f"{labels.name} is not named after the case {case.name}: is it the reference of that image?")
    for fold in model.checkpoints:
        found = feature_maps(model, fold, case, layer, slice_index, labels, device, progress.bar)
        if found.note:
            print(found.note)
        fold_output = output / f"fold_{fold}" if len(model.checkpoints) > 1 else output
        for path in write(found, fold_output, nifti, progress.bar):
            print(f"Wrote {path}")


def _read(folder: Path, folds: Sequence[str] | None, checkpoint: str) -> TrainedModel:
    model = TrainedModel.read(folder, folds, checkpoint, first_only=not folds)
    for line in model.remarks:
        print(line, file=sys.stderr)
    return model
