"""Pooled feature maps of a few patches: how they are made, and where a training's snapshots of them lie."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..pruning import channel_layout
from ..pruning.eval_mode import eval_mode

FOLDER = "feature_maps"
MAX_PATCHES = 4
SIDE = {2: 8, 3: 4}
"""The most values per axis of a pooled map, for patches of 2 and of 3 axes."""


def pooled_maps(network: nn.Module, data: torch.Tensor) -> dict[str, np.ndarray]:
    """Each channel unit's pooled feature maps, by its name, in evaluation mode; the network is left as it was.

    Args:
        network: One that `channel_layout` knows, unwrapped.
        data: (patches, input channels, *patch), on the network's device.
    """
    maps: dict[str, np.ndarray] = {}

    def keep(name: str, module: nn.Module, inputs, output: torch.Tensor) -> None:
        maps[name] = pooled(output)

    # A unit has the name of the first module that makes its feature maps.
    hooks = {network.get_submodule(unit.name): partial(keep, unit.name) for unit in channel_layout(network).units}
    with torch.inference_mode(), eval_mode(network, hooks):
        network(data)
    return maps


def pooled(feature_maps: torch.Tensor) -> np.ndarray:
    """(B, C, *spatial) -> (B, C, *pooled), float16: adaptive average pooling to at most `SIDE` values per axis."""
    axes = feature_maps.ndim - 2
    size = [min(side, SIDE[axes]) for side in feature_maps.shape[2:]]
    pool = functional.adaptive_avg_pool3d if axes == 3 else functional.adaptive_avg_pool2d
    if feature_maps.device.type == "mps":
        feature_maps = feature_maps.cpu()  # there, PyTorch pools adaptively only where sides are multiples
    return pool(feature_maps.float(), size).half().cpu().numpy()


def snapshots(folder: Path) -> dict[int, Path]:
    """The snapshots in a `feature_maps` folder, by the number of epochs before them, in order."""
    found = {path.stem.removeprefix("epoch_"): path for path in folder.glob("epoch_*.npz")}
    return {int(epoch): found[epoch] for epoch in sorted(filter(str.isdecimal, found), key=int)}
