"""The verb `export` from its first check to its last line."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from nnunet_sauron_runtime.whole_files import check_name
from torch import nn

from ..compression.images import patches
from ..console.json_output import print_json
from ..console.numbers import with_prefix
from ..console.progress import Progress
from ..files import check_new, move_new
from ..model.cases import Case, check_cases, find_cases
from ..model.checkpoints import CHECKPOINT
from ..model.trained import TrainedModel
from ..plugin.commands import command
from .checks import (
    Agreement,
    check_images,
    check_installed,
    check_networks,
    compare_bundles,
    compare_with_nnunet,
    synthetic_patches,
)
from .description import check_exportable, describe, model_card, planned_manifest
from .networks import without_idle_biases, write_network
from .precision import to_float16, to_int8

BUNDLE = "bundle.json"
MOST_IMAGES = 5
REAL_PATCHES = 4
CALIBRATION_PATCHES = 64
MOST_DIFFERENT = 1e-3  # of the voxels, between two computations of one segmentation


@dataclass(frozen=True)
class Images:
    """Raw images, to check and to calibrate on.

    Attributes:
        cases: To calibrate on.
        compared: Those of them that patches are taken from for checks, and that two bundles are compared on.
    """

    cases: list[Case]
    compared: list[Case]


@dataclass(frozen=True)
class Stage:
    """A model, and what its files' names begin with."""

    model: TrainedModel
    prefix: str

    @property
    def files(self) -> list[str]:
        """A network's file for each fold."""
        return [f"{self.prefix}fold_{fold}.onnx" for fold in self.model.checkpoints]


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
        folds: Only these; None for the numbered ones, or all where it is alone.
        checkpoint: File name of the checkpoints to read.
        previous_stage: Of a cascade, the folder of the model before it; `folds` are its as well.
        precision: "float32"; "float16" for weights of half the size; "int8" for convolutions in whole numbers.
        images: Raw images in nnU-Net's naming. Checks take patches of them too, the smallest of a few is segmented by
            nnU-Net as well (not of a cascade), int8 is calibrated on them, and smaller numbers are compared with
            float32 on these few.
        card_file, card: The card's fields, as JSON and one by one.
        json_output: Print JSON instead of lines.

    Raises:
        FileExistsError, FileNotFoundError, OSError: The output exists or cannot be written; the model is not there.
        ValueError: No bundle can hold the model, images are missing or unusable, or a package is; nothing is written.
        RuntimeError: What was exported does not compute what PyTorch computes; nothing is left of it.
    """
    _refuse_early(output, precision, images, previous_stage)
    model = TrainedModel.read(folder, folds, checkpoint)
    previous = TrainedModel.read(previous_stage, folds, checkpoint) if previous_stage else None
    check_exportable(model, previous)
    stages = [Stage(model, "")] if previous is None else [Stage(previous, "lowres_"), Stage(model, "")]
    filled = model_card(card_file, card or {}, f"{model.plans['dataset_name']} {model.configuration}")
    progress = Progress()
    for remark in [remark for stage in stages for remark in stage.model.remarks]:
        progress.say(remark)
    most = CALIBRATION_PATCHES if precision == "int8" else MOST_IMAGES
    seen = _images(images, stages[0].model, most, progress) if images else None
    if seen:
        manifest = planned_manifest([stage.model for stage in stages])
        check_images([case.files for case in seen.compared], manifest)
    with _beside(output) as place:
        bundle = place / "float32"
        bundle.mkdir()
        _write_networks(stages, bundle, progress)
        _describe(bundle, stages, "float32", filled)
        differences = _check(bundle, stages, seen, progress)
        of_nnunet = _compare_with_nnunet(bundle, stages, seen, progress)
        agreement = {}
        if precision != "float32":
            full, bundle = bundle, place / precision
            bundle.mkdir()
            _write_smaller(full, bundle, stages, precision, seen, progress)
            _describe(bundle, stages, precision, filled)
            agreement = _compare(full, bundle, precision, seen, progress)
        if output.suffix.lower() == ".zip":
            bundle = _packed(bundle)
        move_new(bundle, output)
    _print(output, differences, of_nnunet, agreement, json_output)


def _refuse_early(output: Path, precision: str, images: Path | None, previous_stage: Path | None) -> None:
    """Raise what `export` raises for its words alone."""
    check_new(output, "a file or folder")
    check_name(output.absolute())
    if precision == "int8" and images is None:
        raise ValueError("int8 is calibrated on images: give some raw ones, such as imagesTr, with -i.")
    if precision == "int8" and previous_stage is not None:
        raise ValueError("int8 is not there for cascades; export it with --precision float32 or float16.")
    check_installed()


@contextlib.contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A folder beside the output, of which nothing is left; an OSError meanwhile is one of writing, and says so.

    Temporary files of other packages lie in it, too, so that there is one place to make room.
    """
    before = tempfile.tempdir
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as place:
            tempfile.tempdir = place
            try:
                yield Path(place)
            finally:
                tempfile.tempdir = before
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(
            f"{output} could not be written: {error}. Make room, or choose another -o, and give the command again."
        ) from error


def _images(folder: Path, model: TrainedModel, most: int, progress: Progress) -> Images:
    """At most so many cases of a folder, all of them readable.

    Raises:
        FileNotFoundError, ValueError: As `find_cases` and `check_cases`.
    """
    cases = _spread(find_cases(folder, model), most)
    check_cases(model, cases, progress)
    return Images(cases, _spread(cases, MOST_IMAGES))


def _spread(cases: list[Case], most: int) -> list[Case]:
    """Evenly over the list, so that a few stand for all."""
    return [cases[i * len(cases) // most] for i in range(most)] if len(cases) > most else cases


def _write_networks(stages: list[Stage], folder: Path, progress: Progress) -> None:
    """Every stage's and fold's network as ONNX."""
    with progress.bar("writing ONNX", sum(len(stage.files) for stage in stages)) as step:
        for stage in stages:
            for fold, name in zip(stage.model.checkpoints, stage.files, strict=True):
                model = stage.model
                write_network(model.network(fold), model.input_channels, model.patch_size, folder / name)
                step(name)


def _write_smaller(
    full: Path, folder: Path, stages: list[Stage], precision: str, seen: Images | None, progress: Progress
) -> None:
    """The same networks with smaller numbers."""
    names = [name for stage in stages for name in stage.files]
    with progress.bar(f"turning to {precision}", len(names)) as step:
        calibration = _calibration(stages[-1].model, seen) if precision == "int8" else []
        for name in names:
            if precision == "int8":
                to_int8(full / name, folder / name, calibration)
            else:
                to_float16(full / name, folder / name)
            step(name)


def _describe(folder: Path, stages: list[Stage], precision: str, card: Mapping[str, str]) -> None:
    """Write bundle.json beside a folder's networks."""
    files = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        files[path.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    described = describe([(stage.model, stage.files) for stage in stages], precision, card, files)
    (folder / BUNDLE).write_text(json.dumps(described, indent=2, allow_nan=False), encoding="utf-8")


def _check(bundle: Path, stages: list[Stage], seen: Images | None, progress: Progress) -> dict:
    models = [stage.model for stage in stages]
    with progress.bar("checking against PyTorch", 1) as step:
        on = [synthetic_patches(one.input_channels, one.patch_size) for one in models]
        if seen:  # of the first stage: the second one reads segmentations as well
            real = patches(models[0], seen.compared, REAL_PATCHES, more=False)
            on[0] |= {f"real {number}": patch.numpy() for number, patch in enumerate(real)}
        networks = [[functools.partial(_reference, one, fold) for fold in one.checkpoints] for one in models]
        differences = check_networks(bundle, networks, on)
        step(bundle.name)
    for engine, kinds in differences.items():
        worst = max(kinds, key=kinds.get)
        progress.say(f"logits differ from PyTorch's by at most {kinds[worst]:.1e} in {engine} ({worst})")
    return differences


def _reference(model: TrainedModel, fold: str) -> nn.Module:
    return without_idle_biases(model.network(fold))


def _compare_with_nnunet(bundle: Path, stages: list[Stage], seen: Images | None, progress: Progress) -> dict:
    """Of a single stage: the smallest image, segmented by the bundle and by nnU-Net as it is installed here."""
    if seen is None or len(stages) > 1:
        return {}
    case = min(seen.compared, key=lambda case: sum(Path(file).stat().st_size for file in case.files))
    with progress.bar(f"segmenting {case.name} with nnU-Net and with the bundle", 1) as step:
        agreement = compare_with_nnunet(bundle, stages[0].model, case)
        step(case.name)
    for engine, one in agreement.items():
        doubt = ""
        if one.different > MOST_DIFFERENT * one.voxels:
            doubt = ". That is more than rounding does: look at both before you trust the bundle"
        progress.say(f"nnU-Net's prediction of {case.name} and that of {engine}: {_in_words(one)}{doubt}")
    return {"case": case.name, **{engine: asdict(one) for engine, one in agreement.items()}}


def _in_words(one: Agreement) -> str:
    dice = "no class found" if math.isnan(one.dice) else f"Dice {one.dice:.4f}"
    return f"{dice}, {one.different} of {one.voxels} voxels differ ({one.different / one.voxels:.2%})"


def _calibration(model: TrainedModel, seen: Images) -> list[np.ndarray]:
    return [patch.numpy() for patch in patches(model, seen.cases, CALIBRATION_PATCHES)]


def _compare(full: Path, smaller: Path, precision: str, seen: Images | None, progress: Progress) -> dict:
    if seen is None:
        progress.say(f"How {precision} agrees with float32 is not known: give images with -i to see it.")
        return {}
    with progress.bar(f"comparing {precision} with float32 on {len(seen.compared)} images", 1) as step:
        agreement = compare_bundles(full, smaller, [case.files for case in seen.compared])
        step(precision)
    for engine, one in agreement.items():
        progress.say(f"{precision} against float32 in {engine}: {_in_words(one)}")
    return {engine: asdict(one) for engine, one in agreement.items()}


def _packed(folder: Path) -> Path:
    """The folder as one file beside it."""
    file = folder.with_name("bundle.zip")
    # Stored as they are: weights hardly get smaller, and a bundle opens faster.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.iterdir(), key=lambda path: (path.name != BUNDLE, path.name)):
            archive.write(path, path.name)
    return file


def _print(output: Path, differences: dict, of_nnunet: dict, agreement: dict, json_output: bool) -> None:
    size = output.stat().st_size if output.is_file() else sum(path.stat().st_size for path in output.iterdir())
    predict = command("nnUNetv2_sauron", "predict", "-b", output, "-i", "IMAGES", "-o", "OUT")
    if json_output:
        document = {"bundle": output, "bytes": size, "differences": differences, "nnunet": of_nnunet}
        print_json({**document, "agreement": agreement, "predict": predict})
    else:
        print(f"Wrote {output}, {with_prefix(size, 'B')}\n{predict}")
