"""nnU-Net's checkpoints: read with errors that explain a bad file, and written without pruning."""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..console.errors import first_of
from ..files import AGAIN, check_new, write_atomically
from ..pruning import accept_pruned_weights, channel_layout, densify
from .architecture import network_of_plans

CHECKPOINT, LATEST, BEST = CHECKPOINTS = tuple(f"checkpoint_{name}.pth" for name in ("final", "latest", "best"))
"""nnU-Net's; its `--c` takes the first of them that is there."""
WRAPPERS = ("module.", "_orig_mod.")
MIRRORING = "inference_allowed_mirroring_axes"  # nnU-Net's key of a checkpoint
# PyTorch has an OSError with EINVAL for a file that was cut short, too.
NOT_OPENED = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)
# As PyTorch and the C++ library say it.
NO_MEMORY = ("not enough memory", "can't allocate memory", "bad_alloc", "Cannot allocate memory")
COMPRESSION = "compression"  # key of a checkpoint that `compress` wrote: where its weights come from
# Series of nnU-Net's logger, and so of every checkpoint, with a record an epoch: what was cut, or where nothing is.
PRUNING = "pruning"
SETTINGS = "settings"


class DamagedFileError(ValueError):
    """A file of PyTorch that was cut short or changed, or that is something else."""


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of nnU-Net, on the CPU.

    Raises:
        FileNotFoundError: There is none, or a folder; the checkpoints nearby are named.
        DamagedFileError, ValueError, OSError, MemoryError: As `load`; or it is no checkpoint of nnU-Net.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(_not_there(path))
    checkpoint = load(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("network_weights"), Mapping):
        raise DamagedFileError(
            f"{path} is no checkpoint of nnU-Net: it has no 'network_weights'. Give a .pth file that nnU-Net wrote."
        )
    checkpoint["network_weights"] = _unwrapped(checkpoint["network_weights"])
    return checkpoint


def _unwrapped(weights: Mapping) -> Mapping:
    """Weights by their names in the network itself, where they were saved with the wrapper of DDP or torch.compile."""
    for prefix in WRAPPERS * len(WRAPPERS):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def checkpoints_in(folder: Path) -> list[Path]:
    """Its .pth files, sorted, without hidden ones, which a Mac adds to what it copies."""
    return sorted(path for path in folder.glob("*.pth") if not path.name.startswith("."))


def _not_there(path: Path) -> str:
    """What is wrong with a checkpoint's name, and which checkpoints its model has."""
    folder = path if path.is_dir() else path.parent
    model = folder.parent if folder.name.startswith("fold_") else folder
    found = [str(file) for place in (model, *sorted(model.glob("fold_*"))) for file in checkpoints_in(place)]
    named = first_of(found, 6)
    if path.is_dir():
        return f"{path} is a folder, expected a checkpoint; name one of its .pth files: {named or 'it has none'}."
    there = f"Found: {named}; name one of these .pth files" if found else "Name the .pth file of a trained model"
    return f"There is no checkpoint {path}. {there}."


def load(path: Path):
    """What `torch.save` wrote, on the CPU.

    Raises:
        DamagedFileError: The file was cut short or changed, or PyTorch did not write it.
        ValueError: It is whole, but needs a module that is not installed, or cannot be unpickled here.
        OSError: It must not be read.
        MemoryError: There is too little memory for it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # torch raises a different class for every way in which a file can be damaged
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in NOT_OPENED:
            raise OSError(
                f"{path} cannot be opened: {error.strerror}. Mend that; the file may well be whole."
            ) from error
        if isinstance(error, MemoryError) or any(words in reason for words in NO_MEMORY):
            size = path.stat().st_size / 1e6
            raise MemoryError(
                f"There is too little memory to read {path} ({size:.0f} MB): {reason[:200]}. End other programs, or "
                f"use a machine with more; the file is not damaged."
            ) from error
        kind = _kind(path)
        if kind == "bundle":
            raise ValueError(
                f"{path} is a bundle for machines without PyTorch; name the model that it was exported from."
            ) from error
        if isinstance(error, (ImportError, AttributeError)) and kind in ("whole zip", "pickle"):
            raise ValueError(f"{path} is whole, but needs what is not installed here. {_missing(error)}") from error
        if kind != "whole zip":
            remove = "Delete it" if kind == "broken zip" else "Move it away"
            raise DamagedFileError(
                f"{path} cannot be read: truncated, or no PyTorch checkpoint ({reason}). {remove} to continue from "
                f"another checkpoint of that folder, or copy it anew from where it was made."
            ) from error
        raise ValueError(
            f"{path} is whole, but cannot be unpickled here ({reason}): it was made with other versions of Python, "
            f"PyTorch or a package. Keep it, and read it with the versions that it was made with."
        ) from error


def _kind(path: Path) -> str:
    """Whether a file is a "whole zip" as PyTorch writes them, with right checksums, a "broken zip" (or nothing at all),
    a "pickle" of PyTorch's old form, a "bundle" that `export` wrote, or "another" one."""
    with path.open("rb") as file:
        begins = file.read(4)
    if begins[:1] == b"\x80":
        return "pickle"
    if begins not in (b"PK\x03\x04", b""):
        return "another"
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                return "bundle" if "bundle.json" in archive.namelist() else "another"
            return "broken zip" if archive.testzip() else "whole zip"
    except Exception:  # as many classes as there are kinds of damage
        return "broken zip"


def _missing(error: ImportError | AttributeError) -> str:
    """What is missing and what to do."""
    name = getattr(error, "name", None) or ""
    if name.split(".")[0] == "numpy" or "numpy._core" in str(error):
        made, needed = ("2 or later", ">=2") if "_core" in f"{name} {error}" else ("another version", "")
        return (
            f"It was made with NumPy {made} ({error}), here is NumPy {np.__version__}: pip install 'numpy{needed}', "
            f"or use the environment that it was made in."
        )
    if isinstance(error, ModuleNotFoundError) and name:
        return (
            f"The module {name} is missing: install the package that has it, or put its folder into PYTHONPATH. (Its "
            f"trainer stored an object of that module.)"
        )
    return f"{error}: install the version of that module with which it was made, or put its folder into PYTHONPATH."


def trained_with(checkpoint: dict, path: str | Path) -> tuple[PlansManager, str, dict]:
    """The plans, the configuration's name and the dataset.json that a checkpoint was trained with.

    Raises:
        ValueError: It does not hold them; `path` names it.
    """
    arguments = checkpoint.get("init_args", {})
    missing = [name for name in ("plans", "configuration", "dataset_json") if name not in arguments]
    if missing:
        where = f"'init_args' without {', '.join(missing)}" if "init_args" in checkpoint else "no 'init_args'"
        raise ValueError(
            f"{path} does not hold the plans it was trained with ({where}). Give one as nnU-Net v2 writes it."
        )
    return PlansManager(arguments["plans"]), arguments["configuration"], arguments["dataset_json"]


def plain(value):
    """Lists for tuples, through and through: plans read from JSON have no tuples, those in checkpoints may."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def logged(checkpoint: Mapping) -> Mapping[str, list]:
    """The series that a checkpoint's training logged; none where others wrote something else there, such as None."""
    series = checkpoint.get("logging")
    return series if isinstance(series, Mapping) else {}


def fitted_on(checkpoint: Mapping) -> set[str]:
    """The cases whose images `compress` fitted a model on; none of a model that it did not write."""
    return set(checkpoint.get(COMPRESSION, {}).get("fitted_on", ()))


def logged_settings(checkpoint: Mapping) -> Mapping:
    """The settings that one of our trainings had in its last epoch, by name; none of another training."""
    series = logged(checkpoint)
    if series.get(SETTINGS) and series[SETTINGS][-1]:
        return series[SETTINGS][-1]
    return series[PRUNING][-1].get(SETTINGS, {}) if series.get(PRUNING) else {}  # where they stood at first


def densify_checkpoint(source: Path, target: Path) -> dict:
    """Write a pruned checkpoint's weights at its plans' widths, with zeros, for `-pretrained_weights`.

    The network's output stays the same. The optimiser's state is left out: the file is to begin a training with, not
    to continue one.

    Args:
        source: A checkpoint of nnU-Net v2, pruned or not.
        target: The file to write.

    Returns:
        What was written.

    Raises:
        ValueError: `source` cannot be read, has no plans, or is of another architecture than its plans say.
        FileExistsError, FileNotFoundError: `target` exists, or its folder does not.
        OSError: `target` could not be written.
    """
    check_new(target, "a file")
    checkpoint = read_checkpoint(source)
    described = trained_with(checkpoint, source)
    try:
        network = network_of_plans(*described, device="cpu")
    except Exception as error:  # the class that the plans name may raise anything
        raise ValueError(f"{source}: its plans' network cannot be built: {type(error).__name__}: {error}") from error
    accept_pruned_weights(network)
    widths = channel_layout(network).widths
    try:
        network.load_state_dict(checkpoint["network_weights"])
    except RuntimeError as error:
        raise ValueError(f"{source} is of another architecture than its own plans say: {error}") from error
    dense = {**checkpoint, "network_weights": densify(network, widths).state_dict(), "optimizer_state": None}
    write_atomically(target, lambda path: torch.save(dense, path), AGAIN)
    return dense
