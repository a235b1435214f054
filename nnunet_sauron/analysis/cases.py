"""Images in nnU-Net's naming, as nnU-Net reads and preprocesses them for a trained model."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .models import TrainedModel


@dataclass(frozen=True)
class Case:
    """One case's image files, one a modality: NAME_0000.ending, NAME_0001.ending, ..."""

    name: str
    files: tuple[str, ...]


def find_cases(folder: Path, model: TrainedModel) -> list[Case]:
    """The cases of a folder of images, sorted by name.

    Raises:
        FileNotFoundError: The folder is missing or holds no image of the model's file ending.
        ValueError: A case has another number of channels than the model takes, or cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one of images such as imagesTs.")
    ending = model.dataset_json["file_ending"]
    found: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if name := _name(path, ending):
            found.setdefault(name, []).append(str(path))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no image in nnU-Net's naming, such as CASE_0000{ending} (the model reads {ending})."
        )
    cases = [Case(name, tuple(files)) for name, files in found.items()]
    # A file may hold several channels (RGB), so one case of each number of files is read.
    for case in {len(case.files): case for case in reversed(cases)}.values():
        read_case(model, case)
    return cases


def case_of(image: Path, model: TrainedModel) -> Case:
    """The whole case, given one of its files.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is not named CASE_0000 and the model's file ending.
    """
    ending = model.dataset_json["file_ending"]
    name = _name(image, ending)
    if name is None:
        raise ValueError(
            f"{image} is not in nnU-Net's naming: CASE_0000{ending}, where 0000 is the channel "
            f"({', '.join(model.channel_names)}); rename it, and give other channels beside it as "
            f"CASE_0001{ending}, ..."
        )
    if not image.is_file():
        raise FileNotFoundError(f"There is no image {image}.")
    return Case(name, tuple(str(path) for path in sorted(image.parent.iterdir()) if _name(path, ending) == name))


def read_case(model: TrainedModel, case: Case) -> tuple[np.ndarray, dict]:
    """Image (channels, z, y, x), and the properties that nnU-Net's reader tells of it.

    Raises:
        ValueError: The files do not go together, or have another number of channels than the model takes.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            image, properties = model.manager.image_reader_writer_class().read_images(case.files)
    except Exception as error:  # each of nnU-Net's readers has its own; what does not go together they print
        raise ValueError(f"{', '.join(case.files)} cannot be read as one case: {error} {said.getvalue()}") from error
    if len(image) != model.input_channels:
        ending = model.dataset_json["file_ending"]
        raise ValueError(
            f"Case {case.name} has {len(image)} channels in {', '.join(case.files)}; the model takes "
            f"{model.input_channels} ({', '.join(model.channel_names)}). Name files as for training, beside each "
            f"other: CASE_0000{ending}, CASE_0001{ending}, ..."
        )
    return image, properties


def preprocess(
    model: TrainedModel, image: np.ndarray, properties: dict, labels: np.ndarray | None = None
) -> tuple[torch.Tensor, np.ndarray | None, dict]:
    """What nnU-Net makes of what `read_case` read before it predicts.

    Args:
        model: The model.
        image: (channels, z, y, x).
        properties: Of the image.
        labels: Its segmentation, (1, z, y, x), to be brought to the same grid.

    Returns:
        Image (channels, *voxels) in float32, segmentation (1, *voxels) or whatever nnU-Net makes of none, and the
        properties that say where this lies in the original.
    """
    manager = model.manager
    configuration = manager.get_configuration(model.configuration)
    preprocessor = configuration.preprocessor_class(verbose=False)
    image, labels, properties = preprocessor.run_case_npy(
        image, labels, dict(properties), manager, configuration, model.dataset_json
    )
    return torch.from_numpy(np.asarray(image, dtype=np.float32)), labels, properties


def _name(path: Path, ending: str) -> str | None:
    """The case's name if the file is in nnU-Net's naming."""
    named = re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", path.name)
    return named[1] if named else None
