"""All feature maps of one layer for one slice of an image, beside the image, the reference and the prediction.

After Figure 2 of Valverde, Shatillo, Tohka, "Sauron U-Net" (arXiv 2209.13590), which shows the maps of the
second-to-last block. Everything here is on the preprocessed image's grid, the one that the network sees: axes in the
plans' order (`transpose_forward`), cropped to what is not zero, resampled to the plans' spacing.
"""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from ...model.cases import Case, preprocess, read_case
from ...model.device import chosen_device
from ...model.evaluation import check_same_voxels, check_values
from ...model.reading import read_segmentation
from ...model.trained import TrainedModel
from ...pruning.channels import channel_layout, feature_map_modules
from ...pruning.cost import forward_on_meta
from .grid import Grid
from .windows import Bar, Layer, Windows, silent


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """One layer's maps of one slice, with the image and segmentations; all on the same grid.

    Attributes:
        model: Dataset, trainer, plans, configuration and fold.
        case: The case's name.
        layer: The layer.
        maps: (channels, rows, columns), float32: the slice of each map. A map of a lower resolution than the image has
            its voxels repeated.
        image: (input channels, slices, rows, columns), float32, as the network sees it.
        prediction: (slices, rows, columns), int16: nnU-Net's own, of this fold, without mirroring.
        reference: Likewise; None if there is none.
        slice_index: Of the maps, from 0; along the axis that nnU-Net's 2D slices run.
        grid: Spacing, and where all this lies in the original image.
        classes: Values in prediction and reference, and their names.
        input_channels: Names of the image's channels.
        note: What to know about the choice of the slice, if anything.
        windows: Where whole maps can be had from.
    """

    model: str
    case: str
    layer: Layer
    maps: np.ndarray
    image: np.ndarray
    prediction: np.ndarray
    reference: np.ndarray | None
    slice_index: int
    grid: Grid
    classes: dict[int, str]
    input_channels: tuple[str, ...]
    note: str | None
    windows: Windows = field(repr=False)


def layer_names(model: TrainedModel, fold: str) -> list[Layer]:
    """The layers that can be shown, in the order in which the network runs them.

    Besides the names of the channel units, these are the later blocks of a residual stage, which share their channels
    with its first one.

    Raises:
        ValueError: The network is of a class that cannot be pruned, or the fold was not read.
    """
    return _layers(model, _network(model, fold))


def default_layer(layers: Sequence[Layer]) -> Layer:
    """The second-to-last block of all `layer_names`, as in the paper; transposed convolutions are no blocks.

    In a decoder of two convolutions a stage this is the first one at full resolution; with a single one, as in
    nnU-Net's residual networks, it is the one of the stage before, at a lower resolution.
    """
    return [layer for layer in layers if not layer.transposed][-2]


def feature_maps(
    model: TrainedModel,
    fold: str,
    case: Case,
    layer: str | None = None,
    slice_index: int | None = None,
    reference: Path | None = None,
    device: str | None = None,
    bar: Bar = silent,
) -> FeatureMaps:
    """Segment an image, choose a slice, and gather a layer's maps of it from nnU-Net's sliding window.

    Overlapping windows are blended with nnU-Net's own weights; a map of a lower resolution is first brought to the
    patch's by repeating voxels, so that no value is shown that the layer did not have. Only the chosen slice is kept,
    which bounds memory; `write_nifti` gathers whole volumes.

    Args:
        model: A trained model.
        fold: One of its folds.
        case: The case to show.
        layer: One of `layer_names`; None for `default_layer`.
        slice_index: On the preprocessed image's first axis; None for the slice with most foreground in the reference,
            or else in the prediction, or else the middle one.
        reference: The case's segmentation, if there is one.
        device: As `chosen_device` takes it.
        bar: Shows progress.

    Raises:
        ValueError: The model, the layer, the slice, the images or the reference do not do; the message says why.
        FileNotFoundError: An image or the reference is missing.
    """
    on = chosen_device(device)
    network = _network(model, fold)
    chosen = _choose_layer(layer, _layers(model, network))
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints hints that are of no use here
        image, labels, grid = _preprocessed(model, case, reference)
        _check_slice(slice_index, image.shape[1])
        one_fold = replace(model, checkpoints={fold: model.checkpoints[fold]})
        predictor = one_fold.predictor(on)
    windows = Windows(image, chosen, network, predictor)
    with bar("segmenting", len(windows.slicers)) as step:
        predictor.network.register_forward_pre_hook(lambda *_: step(""))
        logits = predictor.predict_logits_from_preprocessed_data(image)
    prediction = np.asarray(predictor.label_manager.convert_logits_to_segmentation(logits)).astype(np.int16)
    note = None
    if slice_index is None:
        slice_index, note = _choose_slice(labels, prediction, model.ignore_label)
    return FeatureMaps(
        model=f"{model.plans.get('dataset_name', '')} {model.folder.resolve().name}, fold {fold}".strip(),
        case=case.name,
        layer=chosen,
        maps=windows.slice(slice_index, bar),
        image=image.numpy(),
        prediction=prediction,
        reference=labels,
        slice_index=slice_index,
        grid=grid,
        classes=_class_names(model),
        input_channels=model.channel_names,
        note=note,
        windows=windows,
    )


def _network(model: TrainedModel, fold: str) -> nn.Module:
    if fold not in model.checkpoints:
        raise ValueError(f"Fold {fold} of {model.folder} was not read; folds are {', '.join(model.checkpoints)}.")
    model.check_reads_images_alone()
    return model.network(fold)


def _layers(model: TrainedModel, network: nn.Module) -> list[Layer]:
    found: list[Layer] = []

    def note(name: str, module: nn.Module, inputs, output: torch.Tensor) -> None:
        voxels = tuple(output.shape[2:])
        strides = tuple(side // length for side, length in zip(model.patch_size, voxels, strict=True))
        found.append(Layer(name, output.shape[1], voxels, strides, isinstance(module, _ConvTransposeNd)))

    maps = feature_map_modules(network, channel_layout(network))
    hooks = {module: partial(note, name) for _, name, module in maps}
    forward_on_meta(network, model.patch_size, model.input_channels, hooks)
    return found


def _choose_layer(wanted: str | None, layers: Sequence[Layer]) -> Layer:
    if wanted is None:
        return default_layer(layers)
    by_name = {layer.name: layer for layer in layers}
    if wanted not in by_name:
        close = difflib.get_close_matches(wanted, by_name, n=3) or list(by_name)[-3:]
        raise ValueError(f"The network has no layer {wanted}; close to it: {', '.join(close)}. --list shows all.")
    return by_name[wanted]


def _preprocessed(
    model: TrainedModel, case: Case, reference: Path | None
) -> tuple[torch.Tensor, np.ndarray | None, Grid]:
    """Image, reference and their grid as nnU-Net preprocesses them."""
    original, properties = read_case(model, case)
    image, _, of_image = preprocess(model, original, properties)
    labels = None
    if reference:
        if not reference.exists():
            raise FileNotFoundError(f"There is no file {reference}.")
        labels, spacing = read_segmentation(model.segmentations.reader, reference)
        if labels.shape != original.shape[1:]:
            raise ValueError(
                f"The reference {reference} has {labels.shape} voxels, the image {case.files[0]} {original.shape[1:]} "
                f"(z, y, x); give the segmentation that belongs to the image."
            )
        check_values(reference, labels, model.segmentations)
        read = (case.files[0], original.shape[1:], tuple(map(float, properties["spacing"])))
        check_same_voxels(read, (reference, labels.shape, spacing))
        labels = labels[None]
        # By itself: a reference may change the mask that an image is normalised in, but must not change the maps.
        labels = preprocess(model, original, properties, labels)[1][0].astype(np.int16)
        labels[labels < 0] = 0  # nnU-Net marks voxels outside the image's mask
    return image, labels, Grid.of(of_image, model.manager.transpose_forward, image.shape[1:])


def _check_slice(wanted: int | None, slices: int) -> None:
    if wanted is not None and not 0 <= wanted < slices:
        raise ValueError(f"--slice is {wanted}; the preprocessed image has {slices} slices, 0 to {slices - 1}.")


def _choose_slice(
    reference: np.ndarray | None, prediction: np.ndarray, ignore_label: int | None
) -> tuple[int, str | None]:
    """The slice with most foreground, and a remark about the choice."""
    empty: list[str] = []
    for name, labels in (("reference", reference), ("prediction", prediction)):
        if labels is None:
            continue
        foreground = ((labels > 0) & (labels != ignore_label)).sum(axis=(1, 2))
        if foreground.any():
            note = f"There is no foreground in the reference: this is the slice with most of it in the {name}."
            return int(foreground.argmax()), note if empty else None
        empty.append(name)
    return len(prediction) // 2, f"There is no foreground in {' and '.join(empty)}: this is the middle slice."


def _class_names(model: TrainedModel) -> dict[int, str]:
    names = {} if model.ignore_label is None else {model.ignore_label: "ignore"}
    # Of regions within each other the innermost gives a value its name.
    for name, values in sorted(model.classes.items(), key=lambda item: -len(item[1])):
        names.update(dict.fromkeys(values, name))
    return names
