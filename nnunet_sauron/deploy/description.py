"""What a prediction of nnU-Net depends on besides weights, as it stands in a bundle; what no runtime has is refused."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from nnunet_sauron_runtime.manifest import FORMAT, READERS, SCHEMES, Manifest, read_manifest
from nnunet_sauron_runtime.resampling import FUNCTION as RESAMPLING
from nnunetv2.preprocessing.normalization import default_normalization_schemes as schemes
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from .. import __version__
from ..files import read_json_object
from ..model.labels import class_values
from ..model.trained import TrainedModel
from .verbs import CARD

WARNING = "Not a medical device. For research only; nobody has shown that it is safe or right on your images."
NUMBERS = ("mean", "std", "percentile_00_5", "percentile_99_5")
RESAMPLING_SETTINGS = ("is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold")
PNG = ".png"
NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet", "PrunedPlainConvUNet", "PrunedResidualEncoderUNet")


def check_exportable(model: TrainedModel, previous: TrainedModel | None) -> None:
    """Raise ValueError unless a bundle can hold the model, in a cascade after `previous`; the reason is named."""
    configuration = model.manager.get_configuration(model.configuration)
    wanted = configuration.previous_stage_name
    if wanted is None and previous is not None:
        raise ValueError(
            f"{model.folder} is a model of {model.configuration}, which has no stage before it; omit --previous-stage."
        )
    if wanted is not None and previous is None:
        raise ValueError(
            f"{model.folder} is the second stage of a cascade and reads what {wanted} segments: give that model's "
            f"folder with --previous-stage."
        )
    if previous is not None and previous.configuration != wanted:
        raise ValueError(
            f"--previous-stage {previous.folder} is a model of {previous.configuration}; {model.folder} comes after "
            f"{wanted}. Give the model of {wanted}."
        )
    for one in (model, *([previous] if previous else [])):
        _check_network(one, one.builder.build())
        _check_pipeline(one)
    if previous is not None:
        for key in ("labels", "regions_class_order", "file_ending"):
            if model.dataset_json.get(key) != previous.dataset_json.get(key):
                raise ValueError(
                    f"The two stages have different {key}: {model.dataset_json.get(key)} and "
                    f"{previous.dataset_json.get(key)}. Give two models of one data set."
                )
        if model.channel_names != previous.channel_names or _reader(model) != _reader(previous):
            raise ValueError("The two stages read different images: give two models of one data set.")
    planned_manifest([*([previous] if previous else []), model])


def planned_manifest(models: Sequence[TrainedModel]) -> Manifest:
    """What bundle.json will say, as a runtime reads it, before any network is written; of each stage its model.

    Raises:
        ValueError: A runtime would not take it.
    """
    names = [f"{number}.onnx" for number in range(len(models))]
    files = {name: {"sha256": "0" * 64, "bytes": 1} for name in names}
    place = str(models[-1].folder)
    try:
        stages = [(one, [name]) for one, name in zip(models, names, strict=True)]
        return read_manifest(describe(stages, "float32", {}, files), place)
    except (ValueError, TypeError) as error:
        reason = str(error).removeprefix(f"{place}: ").removesuffix(" Export the bundle anew.")
        raise ValueError(f"No bundle can hold {place}: {reason} Mend its plans.json and dataset.json.") from error


def describe(
    stages: Sequence[tuple[TrainedModel, Sequence[str]]], precision: str, card: Mapping, files: Mapping[str, Mapping]
) -> dict:
    """The content of bundle.json.

    Args:
        stages: Of each, the model and the names of its networks' files.
        precision: Of the networks.
        card: As `model_card` returns it.
        files: Size and checksum of each file.
    """
    model = stages[-1][0]
    labels = model.manager.get_label_manager(model.dataset_json)
    values = class_values(model.dataset_json["labels"])
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "made_with": {
            "nnunet_sauron": __version__,
            **{name: metadata.version(name) for name in ("nnunetv2", "torch", "onnx")},
        },
        "card": {**card, "warning": WARNING},
        "dataset": model.plans["dataset_name"],
        "channel_names": {str(index): name for index, name in enumerate(model.channel_names)},
        "file_ending": model.dataset_json["file_ending"],
        "image_reader": _reader(model),
        "labels": {
            name: list(several) if isinstance(model.dataset_json["labels"][name], list) else several[0]
            for name, several in values.items()
        },
        "regions_class_order": [int(v) for v in labels.regions_class_order] if labels.has_regions else None,
        "precision": precision,
        "stages": [_stage(*one) for one in stages],
        "files": dict(files),
    }


def model_card(file: Path | None, fields: Mapping[str, str], default_name: str) -> dict[str, str]:
    """The fields of a bundle's card; those given one by one take precedence.

    Raises:
        FileNotFoundError, ValueError: The file is missing, is no JSON, or has other fields.
    """
    given = {}
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"There is no card {file}; give a JSON file with {', '.join(CARD)}.")
        given = read_json_object(file, f"give a JSON object with {', '.join(CARD)}")
        unknown = [f"{key}: {value!r}" for key, value in given.items() if key not in CARD or not isinstance(value, str)]
        if unknown:
            raise ValueError(
                f"{file} has what no card has: {'; '.join(unknown)[:300]}. Its fields are texts: {', '.join(CARD)}."
            )
    return {**dict.fromkeys(CARD, ""), "name": default_name, **given, **fields}


def _stage(model: TrainedModel, networks: Sequence[str]) -> dict:
    configuration = model.manager.get_configuration(model.configuration)
    labels = model.manager.get_label_manager(model.dataset_json)
    cascade = configuration.previous_stage_name is not None
    properties = model.manager.foreground_intensity_properties_per_channel
    return {
        "configuration": model.configuration,
        "spacing": [float(length) for length in configuration.spacing],
        "transpose_forward": [int(axis) for axis in model.manager.transpose_forward],
        "transpose_backward": [int(axis) for axis in model.manager.transpose_backward],
        "patch_size": [int(side) for side in model.patch_size],
        "step": 0.5,
        "mirror_axes": [int(axis) for axis in model.mirror_axes] if model.mirror_axes else None,
        "outputs": labels.num_segmentation_heads,
        "normalization": [
            {
                "scheme": scheme,
                "use_mask_for_norm": bool(configuration.use_mask_for_norm[channel]),
                **{number: _number(properties[str(channel)].get(number)) for number in NUMBERS},
            }
            for channel, scheme in enumerate(configuration.normalization_schemes[: len(model.channel_names)])
        ],
        **{
            f"resampling_{what}": {
                "function": RESAMPLING, **configuration.configuration[f"resampling_fn_{what}_kwargs"]
            }
            for what in ("data", "seg", "probabilities")
        },
        "previous_stage_labels": [int(label) for label in labels.foreground_labels] if cascade else None,
        "networks": list(networks),
    }  # fmt: skip


def _number(value) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _reader(model: TrainedModel) -> str:
    return model.manager.image_reader_writer_class.__name__


def _check_network(model: TrainedModel, network: nn.Module) -> None:
    name = type(network).__name__
    if name not in NETWORKS or not type(network).__module__.startswith(("dynamic_network_arch", "nnunet_sauron")):
        raise ValueError(
            f"{model.folder} has a network of class {type(network).__module__}.{name}; a bundle takes nnU-Net's "
            f"convolutional U-Nets: {', '.join(NETWORKS[:3])}."
        )


def _check_pipeline(model: TrainedModel) -> None:
    """Raise ValueError where anything but the network is another one than nnU-Net ships."""
    configuration = model.manager.get_configuration(model.configuration)

    def refuse(what: str, found: object, known: Sequence[str]) -> None:
        raise ValueError(
            f"{model.folder} uses the {what} {found}, which a bundle cannot hold; known are {', '.join(known)}. "
            f"Predict with nnU-Net instead."
        )

    try:
        if configuration.preprocessor_class is not DefaultPreprocessor:
            refuse("preprocessor", configuration.preprocessor_name, ("DefaultPreprocessor",))
        if model.manager.label_manager_class is not LabelManager:
            refuse("label manager", model.plans["label_manager"], ("LabelManager",))
        if _reader(model) not in READERS:
            refuse("reader", _reader(model), READERS)
        ending = model.dataset_json["file_ending"]
        if _reader(model) == "NaturalImage2DIO" and ending != PNG:
            raise ValueError(
                f"{model.folder} takes pictures in {ending} files; a bundle reads PNG alone, since readers differ in "
                f"the colours of others. Predict with nnU-Net, or convert the pictures and set file_ending in a copy "
                f"of the model's dataset.json to {PNG}."
            )
        channels = len(model.channel_names)
        for scheme in configuration.normalization_schemes[:channels]:
            if scheme not in SCHEMES or not hasattr(schemes, scheme):
                refuse("normalisation", scheme, SCHEMES)
        for what in ("data", "seg", "probabilities"):
            function = configuration.configuration[f"resampling_fn_{what}"]
            if function != RESAMPLING:
                refuse("resampling function", function, (RESAMPLING,))
            _check_resampling(model, what, configuration.configuration[f"resampling_fn_{what}_kwargs"])
        properties = model.manager.foreground_intensity_properties_per_channel
        told = min(len(configuration.normalization_schemes), len(configuration.use_mask_for_norm))
        if told < channels:
            raise ValueError(
                f"plans.json of {model.folder} tells {told} normalisations, expected one a channel, {channels}; copy "
                f"it anew from where the model was trained."
            )
        for channel, scheme in enumerate(configuration.normalization_schemes[:channels]):
            missing = [number for number in NUMBERS if _number(properties[str(channel)].get(number)) is None]
            if missing and scheme == "CTNormalization":
                raise ValueError(
                    f"plans.json of {model.folder} lacks {', '.join(missing)} of channel {channel}, without which "
                    f"nnU-Net cannot normalise it either."
                )
        _ = configuration.spacing, model.manager.transpose_forward, model.manager.transpose_backward
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"plans.json of {model.folder} lacks what a prediction needs: {type(error).__name__}: {error}. nnU-Net "
            f"cannot predict with it either; copy it anew from where the model was trained."
        ) from error
    axes = range(len(model.patch_size))
    if model.mirror_axes and not set(model.mirror_axes) <= set(axes):
        raise ValueError(
            f"{model.folder} mirrors along the axes {tuple(model.mirror_axes)}, its patches have the axes "
            f"{tuple(axes)}: its checkpoint does not fit its plans. Copy both anew from where it was trained."
        )


def _check_resampling(model: TrainedModel, what: str, settings: Mapping) -> None:
    unknown = [name for name in settings if name not in RESAMPLING_SETTINGS]
    orders = settings.get("order", 3), settings.get("order_z", 0)
    if unknown or orders[0] not in (0, 1, 3) or orders[1] != 0:
        raise ValueError(
            f"{model.folder} resamples {what} with {dict(settings)}, which a bundle cannot hold: it takes "
            f"{', '.join(RESAMPLING_SETTINGS)}, with order 0, 1 or 3 and order_z 0."
        )
