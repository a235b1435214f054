"""Training patches of images without labels, by nnU-Net's own cropping and augmentation, and no nnUNet_preprocessed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.utils.data import Dataset

from ..files import AGAIN, write_atomically
from ..model.cases import Case, preprocess, read_case
from ..model.trained import TrainedModel


def store_images(model: TrainedModel, cases: Sequence[Case], folder: Path) -> Iterator[str]:
    """Write cases as nnU-Net preprocesses them, so that patches are read from disk and memory stays small.

    Args:
        model: The model.
        cases: The cases; one that is stored already is skipped.
        folder: Gets NAME.image.npy, (channels, *voxels), and NAME.outside.npy, (1, *voxels), -1 where nnU-Net masks.
            With endings of their own, the files of two cases such as X and X_seg never coincide.

    Yields:
        The name of each case, once it is stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        stored = folder / f"{case.name}.image.npy"
        if not stored.is_file():
            image, outside, _ = preprocess(model, *read_case(model, case))
            np.save(folder / f"{case.name}.outside.npy", outside)
            # Last, and whole: an interrupted run continues after the cases that are stored.
            write_atomically(stored, partial(_save, image.numpy()), AGAIN)
        yield case.name


class AugmentedPatches(Dataset):
    """One batch a step, which depends on the seed and the step alone, whichever process makes it.

    Args:
        model: The model, for its patch size and the augmentation that nnU-Net's trainer configures for it.
        names: Of stored cases.
        folder: Where they are stored.
        batch_size: Patches a batch.
        mirror_axes: Axes that may be mirrored, or None for none; "nnunet" for those of nnU-Net's trainer.
        seed: Another one gives other patches.
    """

    def __init__(
        self, model: TrainedModel, names: Sequence[str], folder: Path, batch_size: int,
        mirror_axes: Sequence[int] | str | None, seed: int,
    ):  # fmt: skip
        self.seed = seed
        configuration = model.manager.get_configuration(model.configuration)
        # nnU-Net's method reads nothing else of its trainer, whose constructor wants nnUNet_results.
        trainer = SimpleNamespace(configuration_manager=configuration, print_to_log_file=lambda *_, **__: None)
        rotation, dummy_2d, initial_patch_size, nnunets_axes = (
            nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(trainer)
        )
        transforms = nnUNetTrainer.get_training_transforms(
            configuration.patch_size,
            rotation,
            None,
            nnunets_axes if mirror_axes == "nnunet" else mirror_axes,
            dummy_2d,
            use_mask_for_norm=configuration.use_mask_for_norm,
        )
        for transform in transforms.transforms:
            blur = getattr(transform, "transform", transform)
            if hasattr(blur, "benchmark"):
                blur.benchmark = False  # it chooses by the clock how to compute, and a resumed run should equal another
        self._loader = nnUNetDataLoader(
            _Stored(names, folder),
            batch_size,
            initial_patch_size,
            configuration.patch_size,
            model.manager.get_label_manager(model.dataset_json),
            oversample_foreground_percent=0.0,  # it is unknown here
            transforms=transforms,
        )
        self._loader.has_ignore = False  # without labels, there is no ignore label either

    def __getitem__(self, step: int) -> torch.Tensor:
        """The batch of a step, (B, channels, *patch)."""
        with _seeded(self.seed, step):
            return self._loader.generate_train_batch()["data"]


class _Stored:
    """A data set for nnU-Net's loader."""

    def __init__(self, names: Sequence[str], folder: Path):
        self.identifiers, self.folder = list(names), folder

    def load_case(self, name: str) -> tuple:
        # Mapped anew each time, and copied where transforms write into it: the file stays as it is.
        image, outside = (np.load(self.folder / f"{name}.{part}.npy", mmap_mode="c") for part in ("image", "outside"))
        return image, outside, None, {"class_locations": None}


def _save(array: np.ndarray, path: str) -> None:
    with open(path, "wb") as file:  # np.save appends .npy to a name
        np.save(file, array)


@contextmanager
def _seeded(seed: int, step: int) -> Iterator[None]:
    """Seed all generators that nnU-Net's augmentation draws from; afterwards they are as before."""
    number = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
