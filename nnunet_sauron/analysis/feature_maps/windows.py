"""A layer's feature maps of a whole image, gathered from nnU-Net's sliding window."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import nn
from torch.nn import functional

from ...pruning.eval_mode import eval_mode

Bar = Callable[[str, int], AbstractContextManager[Callable[[str], None]]]
"""Shows progress: bar(text, steps) is a context that yields a function to call with each step's name, or ""."""


class Layer(NamedTuple):
    """A block of the network, or a transposed convolution, whose outputs can be shown.

    Attributes:
        name: The module's name in the network, for example `decoder.stages.2.convs.0`.
        channels: Its feature maps.
        voxels: Of one map of one patch, per axis.
        strides: Voxels of the patch for one of the map, per axis; 1 is full resolution.
        transposed: Whether it is a transposed convolution.
    """

    name: str
    channels: int
    voxels: tuple[int, ...]
    strides: tuple[int, ...]
    transposed: bool


class Windows:
    """A layer's maps of a whole image, from nnU-Net's sliding window.

    Args:
        image: (input channels, *voxels), preprocessed.
        layer: The layer.
        network: The network.
        predictor: nnU-Net's prediction with it, for its device, its windows and their weights.
    """

    def __init__(self, image: torch.Tensor, layer: Layer, network: nn.Module, predictor: nnUNetPredictor):
        self.layer, self.network, self.device = layer, network, predictor.device
        self.patch_size = tuple(predictor.configuration_manager.patch_size)
        self.image, self.unpad = pad_nd_image(image, self.patch_size, "constant", {"value": 0}, True)
        self.slicers = predictor._internal_get_sliding_window_slicers(self.image.shape[1:])
        # In nnU-Net's own precision, half, so that the weights are the same.
        self.weights = compute_gaussian(self.patch_size, 1 / 8, 10, device=torch.device("cpu")).float()

    def slice(self, index: int, bar: Bar) -> np.ndarray:
        """One slice of every map: (channels, rows, columns), float32."""
        totals = torch.zeros((self.layer.channels, *self.image.shape[2:]))
        weights = self._add(totals, index + self.unpad[1].start, bar)
        return (totals / weights)[(slice(None), *self.unpad[2:])].numpy()

    def volumes(self, folder: Path, bar: Bar) -> np.ndarray:
        """Whole maps: (channels, *voxels), float32, in a file of a folder, of which nothing is left afterwards.

        Raises:
            OSError: There is no room for them.
        """
        shape = (self.layer.channels, *self.image.shape[1:])
        size = math.prod(shape) * np.dtype(np.float32).itemsize
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # else a disk that fills up ends the process without a word
                    os.posix_fallocate(file.fileno(), 0, size)
                gathered = np.memmap(file, np.float32, "w+", shape=shape)
        except OSError as error:
            raise OSError(
                f"there is no room for {size / 1e9:.3g} GB of maps while they are gathered: {error}"
            ) from error
        weights = self._add(torch.from_numpy(gathered), None, bar).numpy()
        for volume in gathered:
            volume /= weights
        return gathered[(slice(None), *self.unpad[1:])]

    @torch.inference_mode()
    def _add(self, totals: torch.Tensor, plane: int | None, bar: Bar) -> torch.Tensor:
        """Add every window's weighted maps to `totals`, of all planes or of one; returns the sum of their weights."""
        sums = torch.zeros(totals.shape[1:])
        slicers = [one for one in self.slicers if plane is None or _holds(one[1], plane)]
        outputs: list[torch.Tensor] = []
        self.network.to(self.device)
        hooks = {self.network.get_submodule(self.layer.name): lambda module, inputs, output: outputs.append(output[0])}
        with eval_mode(self.network, hooks), bar(f"gathering {self.layer.channels} maps", len(slicers)) as step:
            for slicer in slicers:
                self.network(self.image[slicer][None].to(self.device))
                maps, where, weights = outputs.pop(), slicer[1:], self.weights
                if plane is not None:
                    where = slicer[2:]
                    if isinstance(slicer[1], slice):  # of a 3D window
                        inside = plane - slicer[1].start
                        maps = maps[:, int((inside + 0.5) * maps.shape[1] / self.patch_size[0])]
                        weights = weights[inside]
                for total, one in zip(totals, maps.float().cpu(), strict=True):
                    total[where] += weights * _repeat_voxels(one, weights.shape)
                sums[where] += weights
                step("")
        return sums


def _repeat_voxels(one: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if one.shape == shape:
        return one
    return functional.interpolate(one[None, None], tuple(shape), mode="nearest-exact")[0, 0]


def _holds(first: int | slice, plane: int) -> bool:
    """Whether a window has that plane; a window of 2D plans has a single one."""
    return first.start <= plane < first.stop if isinstance(first, slice) else first == plane


@contextlib.contextmanager
def silent(text: str, steps: int):
    """A progress bar that shows nothing."""
    yield lambda name: None
