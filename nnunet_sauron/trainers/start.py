"""The model that a training starts or learns from: whether its weights are still those, and what its fold has seen."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn


def fingerprint(network: nn.Module) -> dict[str, str]:
    """A digest of each tensor that -pretrained_weights loads: all but the segmentation heads'."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in network.state_dict().items()
        if ".seg_layers." not in name
    }


def check_unchanged(network: nn.Module, loaded: dict[str, str] | None, start: str | Path) -> None:
    """Raise ValueError if a network's weights are not those any more that were loaded from the start.

    Args:
        network: As its first step will find it. Where a subclass has given it other layers since, nothing is compared.
        loaded: Its `fingerprint` after that load; None where none was loaded.
        start: The checkpoint, for the error.
    """
    if loaded is None:
        return
    now = fingerprint(network)
    if now.keys() == loaded.keys() and now != loaded:
        raise ValueError(
            f"start_from={start} and -pretrained_weights are both given, and nnU-Net has put the weights of the second "
            f"over most of the first's. Leave one of them out."
        )


def seen_cases(checkpoint: dict, path: str | Path, fold: int | str, dataset: str) -> str | None:
    """A warning if a model was trained on cases that validate the fold; None where it was not, or where it is unknown.

    Args:
        checkpoint: The model's.
        path: Its file, for the warning.
        fold: That is trained now.
        dataset: Name of the data set that is trained on now.
    """
    arguments = checkpoint.get("init_args", {})
    of_model, plans = arguments.get("fold"), arguments.get("plans", {})
    if of_model is None or fold == "all" or str(of_model) == str(fold) or plans.get("dataset_name") != dataset:
        return None
    return (
        f"WARNING: {path} is a model of fold {of_model}, which was trained on validation cases of fold {fold}: the "
        f"validation Dice of this training is no cross-validation"
    )
