"""Whether an exported network computes what PyTorch computes, and two bundles segment alike."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nnunet_sauron_runtime import Bundle
from nnunet_sauron_runtime.engines import INSTALL as ENGINE_PACKAGES
from nnunet_sauron_runtime.images import read_case, to_array
from nnunet_sauron_runtime.manifest import Manifest
from SimpleITK import GetArrayFromImage, Image, ReadImage
from torch import nn

from ..model.cases import Case, predict_case
from ..model.trained import TrainedModel

MOST = 1e-3
ENGINES = tuple(sorted(ENGINE_PACKAGES))
PACKAGES = ("onnx", *ENGINES)
INSTALL = "pip install '.[deploy]'"


@dataclass(frozen=True)
class Agreement:
    """Two segmentations of the same images.

    Attributes:
        voxels: All of them.
        different: Voxels with another label.
        dice: Mean over images and labels that either has; nan if there is none but background.
    """

    voxels: int
    different: int
    dice: float


def check_installed() -> None:
    """Raise ValueError, with what to do, where exporting lacks a package."""
    for name in PACKAGES:
        try:
            __import__(name)
        except ImportError as error:
            raise ValueError(f"Exporting needs {name}, which cannot be imported ({error}): {INSTALL}") from error


def synthetic_patches(input_channels: int, patch_size: Sequence[int]) -> dict[str, np.ndarray]:
    """Patches (1, input_channels, *patch_size), float32, by kind: also such as masked and padded images have."""
    draw = np.random.default_rng(0)
    shape = (1, input_channels, *patch_size)
    noise = draw.standard_normal(shape).astype(np.float32)
    half = noise.copy()
    half[..., patch_size[-1] // 2 :] = 0
    constants = {f"constant {value:g}": np.full(shape, value, np.float32) for value in (0, 1, -0.7, 20)}
    return {"random": noise, "half of zeros": half, **constants}


def check_networks(
    bundle: Path, networks: Sequence[Sequence[Callable[[], nn.Module]]], patches: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, dict[str, float]]:
    """The greatest absolute difference of logits from PyTorch's, by engine and kind of patch.

    Args:
        bundle: What was exported, as float32.
        networks: For each stage and fold what makes PyTorch's network, in evaluation mode.
        patches: For each stage, (1, channels, *patch) by kind.

    Raises:
        RuntimeError: A difference is above `MOST`.
    """
    opened = {engine: Bundle(bundle, engine=engine, threads=torch.get_num_threads()) for engine in ENGINES}
    found: dict[str, dict[str, float]] = {engine: {} for engine in ENGINES}
    for stage, (folds, of_stage) in enumerate(zip(networks, patches, strict=True)):
        for fold, make in enumerate(folds):
            network = make()
            for kind, patch in of_stage.items():
                with torch.inference_mode():
                    expected = network(torch.from_numpy(patch)).numpy()
                for engine, one in opened.items():
                    # nan would pass for small in a comparison
                    apart = np.nan_to_num(np.abs(one.networks[stage][fold](patch) - expected), nan=np.inf).max()
                    name = one.manifest.stages[stage].networks[fold]
                    if apart > MOST:
                        raise RuntimeError(
                            f"The logits of {name} differ from PyTorch's by {apart:.2g} in {engine}, on a patch of "
                            f"kind '{kind}'; at most {MOST:g} is allowed. Nothing was written. Please report this, "
                            f"with plans.json and the versions of PyTorch and {engine}."
                        )
                    found[engine][kind] = max(found[engine].get(kind, 0.0), float(apart))
    return found


def check_images(cases: Sequence[Sequence[str]], manifest: Manifest) -> None:
    """Raise ValueError, which names the files, where a bundle would refuse an image that nnU-Net reads.

    Args:
        cases: The files of each image, one a channel.
        manifest: Of the bundle.
    """
    for files in cases:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                to_array(_read(files), manifest)
        except ValueError as error:
            raise ValueError(
                f"{', '.join(files)}: a bundle cannot be compared on it: {str(error).rstrip('.')}. Mend it, or leave "
                f"it out of -i."
            ) from error


def compare_bundles(one: Path, other: Path, cases: Sequence[Sequence[str]]) -> dict[str, Agreement]:
    """How the segmentations of two bundles agree, by engine, without mirroring.

    Args:
        one, other: The bundles.
        cases: The files of each image, one a channel.
    """
    found = {}
    for engine in ENGINES:
        pair = [Bundle(path, engine=engine, threads=torch.get_num_threads()) for path in (one, other)]
        found[engine] = _agreement([_segmentation(bundle, images) for bundle in pair] for images in map(_read, cases))
    return found


def compare_with_nnunet(bundle: Path, model: TrainedModel, case: Case) -> dict[str, Agreement]:
    """How a bundle's segmentation of an image agrees with nnU-Net's own prediction here, by engine, without mirroring.

    Args:
        bundle: The bundle.
        model: The model of its only stage.
        case: The image.
    """
    with tempfile.TemporaryDirectory() as place:
        file = predict_case(model.predictor(torch.device("cpu")), case, Path(place))
        expected = GetArrayFromImage(ReadImage(str(file)))
    images, found = _read(case.files), {}
    for engine in ENGINES:
        opened = Bundle(bundle, engine=engine, threads=torch.get_num_threads())
        found[engine] = _agreement([(_segmentation(opened, images), expected)])
    return found


def _read(files: Sequence[str]) -> list[Image]:
    return read_case([Path(file) for file in files])


def _segmentation(bundle: Bundle, images: Sequence[Image]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GetArrayFromImage(bundle.predict(images, mirroring=False))


def _agreement(pairs: Iterable[Sequence[np.ndarray]]) -> Agreement:
    voxels = different = 0
    dice: list[float] = []
    for a, b in pairs:
        voxels, different = voxels + a.size, different + int(np.count_nonzero(a != b))
        for label in np.union1d(a, b):
            if label:
                dice.append(2 * np.count_nonzero((a == label) & (b == label)) / np.isin([a, b], label).sum())
    return Agreement(voxels, different, float(np.mean(dice)) if dice else float("nan"))
