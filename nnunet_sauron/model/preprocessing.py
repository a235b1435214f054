"""Whether plans.json tells all that nnU-Net looks up there between a raw image and its segmentation."""

from __future__ import annotations

from .trained import TrainedModel

OF_PLANS = ("transpose_forward", "transpose_backward", "foreground_intensity_properties_per_channel")
OF_CONFIGURATION = (
    "spacing", "normalization_schemes", "use_mask_for_norm", "batch_size", "resampling_fn_data", "resampling_fn_seg",
    "resampling_fn_probabilities", "preprocessor_class",
)  # fmt: skip
OF_EACH_CHANNEL = ("normalization_schemes", "use_mask_for_norm", "foreground_intensity_properties_per_channel")


def check_preprocessing(model: TrainedModel) -> None:
    """Raise ValueError, which names what is missing or wrong, unless a model's images can be preprocessed.

    Not part of `TrainedModel.read`: a report needs none of it.
    """
    configuration = model.manager.get_configuration(model.configuration)
    found = {
        name: _looked_up(described, name, model)
        for described, names in ((model.manager, OF_PLANS), (configuration, OF_CONFIGURATION))
        for name in names
    }
    if found["preprocessor_class"] is None:
        raise _wrong(model, "preprocessor_name", configuration.preprocessor_name, "one that the installed nnU-Net has")
    for name in ("transpose_forward", "transpose_backward"):
        if not isinstance(found[name], list) or sorted(map(str, found[name])) != ["0", "1", "2"]:
            raise _wrong(model, name, found[name], "0, 1 and 2 in some order")
    spacing, axes = found["spacing"], len(model.patch_size)
    if not isinstance(spacing, list) or len(spacing) not in (axes, 3) or not all(map(_is_length, spacing)):
        raise _wrong(model, "spacing", spacing, f"{axes} lengths above 0, in mm")
    channels = model.channel_names
    for name in OF_EACH_CHANNEL:
        if not isinstance(found[name], (list, dict)) or len(found[name]) < len(channels):
            raise _wrong(model, name, found[name], f"one for each of {len(channels)} channels ({', '.join(channels)})")


def _looked_up(described, name: str, model: TrainedModel):
    try:
        return getattr(described, name)
    except KeyError as error:
        raise ValueError(
            f"{model.folder}/plans.json lacks {error} (configuration {model.configuration}), without which nnU-Net "
            f"preprocesses no image; copy it anew from where the model was trained."
        ) from error
    except Exception as error:  # what nnU-Net makes of a value of another kind
        raise _wrong(model, name, f"what nnU-Net cannot use ({error})", "what nnU-Net's planner writes") from error


def _wrong(model: TrainedModel, name: str, found: object, expected: str) -> ValueError:
    return ValueError(
        f"{model.folder}/plans.json, configuration {model.configuration}: {name} is {found}, expected {expected}. Copy "
        f"it anew from where the model was trained, or install the version of nnU-Net that trained it."
    )


def _is_length(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 < value < float("inf")
