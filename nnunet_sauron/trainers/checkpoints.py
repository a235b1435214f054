"""Reading and writing nnU-Net checkpoints so that none is ever left half-written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..architecture import network_of_plans
from ..pruning import accept_pruned_weights, channel_layout, densify

TEMPORARY = ".tmp"
CHECKPOINT = "checkpoint_final.pth"
COMPRESSION = "compression"  # key of a checkpoint that `compress` wrote: where its weights come from


def write_atomically(
    path: Path, write: Callable[[str], None], again: str = "continue with the same command and --c"
) -> None:
    """Let `write` make a file beside `path`, then put it in its place; a crash at any time leaves the old file.

    Args:
        path: The file.
        write: Given the temporary file's name.
        again: What to do once there is room, for the error.

    Raises:
        OSError: It could not be written; the old file, if any, is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(str(temporary))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch.save reports a full disk as a RuntimeError of its writer; any other has nothing to do with files.
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in ("StreamWriter", "iostream")):
            raise
        raise OSError(
            f"Could not write {path}: {error}. What stood there before is untouched; make room or make the folder "
            f"writable, then {again}."
        ) from error


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of nnU-Net, on the CPU.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is truncated, or no checkpoint of nnU-Net.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # torch raises a different class for every way in which a file can be damaged
        raise ValueError(
            f"{path} cannot be read: truncated, or no PyTorch checkpoint ({type(error).__name__}: {error}). Delete it "
            f"to continue from another checkpoint of that folder, or copy it anew from where it was made."
        ) from error
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of nnU-Net: it has no 'network_weights'.")
    return checkpoint


def trained_with(checkpoint: dict, path: str | Path) -> tuple[PlansManager, str, dict]:
    """The plans, the configuration's name and the dataset.json that a checkpoint was trained with.

    Raises:
        ValueError: It does not hold them; `path` names it.
    """
    if "init_args" not in checkpoint:
        raise ValueError(f"{path} does not hold the plans it was trained with (no 'init_args').")
    arguments = checkpoint["init_args"]
    return PlansManager(arguments["plans"]), arguments["configuration"], arguments["dataset_json"]


def densify_checkpoint(source: Path, target: Path) -> None:
    """Write a pruned checkpoint's weights at its plans' widths, with zeros, for `-pretrained_weights`.

    The network's output stays the same. The optimiser's state is left out: the file is to begin a training with, not
    to continue one.

    Args:
        source: A checkpoint of nnU-Net v2, pruned or not.
        target: The file to write.

    Raises:
        ValueError: `source` cannot be read, has no plans, or is of another architecture than its plans say.
        FileExistsError: `target` exists.
    """
    checkpoint = read_checkpoint(source)
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another name or remove it first.")
    network, _ = network_of_plans(*trained_with(checkpoint, source), device="cpu")
    accept_pruned_weights(network)
    widths = channel_layout(network).widths
    try:
        network.load_state_dict(checkpoint["network_weights"])
    except RuntimeError as error:
        raise ValueError(f"{source} is of another architecture than its own plans say: {error}") from error
    dense = {**checkpoint, "network_weights": densify(network, widths).state_dict(), "optimizer_state": None}
    write_atomically(target, lambda path: torch.save(dense, path))
