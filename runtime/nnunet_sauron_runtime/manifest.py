"""What bundle.json says, checked before anything else is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .resampling import FUNCTION, Resampling

FORMAT = 1
READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient", "NaturalImage2DIO")
SCHEMES = (
    "ZScoreNormalization", "CTNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization",
)  # fmt: skip
PRECISIONS = ("float32", "float16", "int8")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.onnx")
LARGEST_FILE = 2**31  # ONNX's own limit
LARGEST_PATCH = 2**28  # voxels; nnU-Net's have some millions
SMALLEST_STEP = 0.01  # less is less than a voxel of most patches, and takes forever


@dataclass(frozen=True)
class Normalization:
    """How a channel is normalised; the four numbers are those of CT's scheme."""

    scheme: str
    use_mask_for_norm: bool
    mean: float = 0.0
    std: float = 1.0
    percentile_00_5: float = 0.0
    percentile_99_5: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One configuration of a model with its networks, as docs/bundle.md describes it."""

    configuration: str
    spacing: tuple[float, ...]
    transpose_forward: tuple[int, ...]
    transpose_backward: tuple[int, ...]
    patch_size: tuple[int, ...]
    step: float
    mirror_axes: tuple[int, ...]
    outputs: int
    normalization: tuple[Normalization, ...]
    resampling_data: Resampling
    resampling_seg: Resampling
    resampling_probabilities: Resampling
    previous_stage_labels: tuple[int, ...] | None
    networks: tuple[str, ...]

    @property
    def input_channels(self) -> int:
        """Channels of its networks' input."""
        return len(self.normalization) + len(self.previous_stage_labels or ())


@dataclass(frozen=True)
class Manifest:
    """bundle.json.

    Attributes:
        channel_names: In the order of a case's files.
        labels: Values in a segmentation by class or region, without the label of voxels to ignore.
        regions_class_order: What is written for each region; None where classes exclude each other.
        files: Checksum and size of each file.
        said: All of it, as it stands there.
    """

    dataset: str
    channel_names: tuple[str, ...]
    file_ending: str
    image_reader: str
    labels: Mapping[str, tuple[int, ...]]
    regions_class_order: tuple[int, ...] | None
    precision: str
    stages: tuple[Stage, ...]
    files: Mapping[str, tuple[str, int]]
    said: Mapping[str, Any]

    @property
    def foreground_labels(self) -> tuple[int, ...]:
        """All values but 0 that a reference may have, in ascending order."""
        return tuple(sorted({value for values in self.labels.values() for value in values} - {0}))


def read_manifest(said: object, place: str) -> Manifest:
    """bundle.json as checked data.

    Args:
        said: What was parsed from the JSON.
        place: Its name, for errors.

    Raises:
        ValueError: A key is missing or has another kind of value, or the format is newer than this runtime.
    """
    bundle = _Object(said, place, "")
    number = bundle.take("format", int, "a whole number")
    if number > FORMAT:
        raise ValueError(
            f"{place} has format {number}, this runtime reads format {FORMAT}: install a newer nnunet-sauron-runtime."
        )
    if number < 1:
        raise bundle.wrong("format", number, "a number from 1")
    names = bundle.take("channel_names", dict, "an object of names")
    if list(names) != [str(index) for index in range(len(names))] or not names:
        raise bundle.wrong("channel_names", names, 'names under "0", "1", ...')
    if not _are(list(names.values()), str):
        raise bundle.wrong("channel_names", names, "texts")
    files = bundle.take("files", dict, "an object of files")
    if "card" in bundle.said:
        bundle.take("card", dict, "an object of texts")
    order = bundle.optional("regions_class_order", _whole_numbers, "null or whole numbers from 0 to 65535")
    labels = _labels(bundle)
    stages = bundle.take("stages", list, "a list of one or two stages")
    if len(stages) not in (1, 2):
        raise bundle.wrong("stages", f"{len(stages)} stages", "one or two")
    manifest = Manifest(
        dataset=bundle.take("dataset", str, "a text"),
        channel_names=tuple(names.values()),
        file_ending=bundle.checked("file_ending", _is_ending, 'an ending such as ".nii.gz"'),
        image_reader=bundle.checked("image_reader", lambda name: name in READERS, f"one of {', '.join(READERS)}"),
        labels=labels,
        regions_class_order=order,
        precision=bundle.checked("precision", lambda name: name in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        stages=tuple(
            _stage(_Object(stage, place, f"stages[{index}]."), index, len(names)) for index, stage in enumerate(stages)
        ),
        files={name: _file(_Object(file, place, f"files[{name}]."), name) for name, file in files.items()},
        said=bundle.said,
    )
    _check_together(bundle, manifest)
    return manifest


def check_step(step: float) -> None:
    """Raise ValueError unless tiles may lie so far apart, in patches."""
    if not SMALLEST_STEP <= step <= 1:
        raise ValueError(f"step is {step}, expected a number from {SMALLEST_STEP} to 1.")


def is_length(value: float) -> bool:
    """Whether it can be the side of a voxel in mm."""
    return 1e-6 < value < 1e6


def _check_together(bundle: _Object, manifest: Manifest) -> None:
    order, labels = manifest.regions_class_order, manifest.foreground_labels
    outputs = len(labels) + 1 if order is None else len(order)
    for index, stage in enumerate(manifest.stages):
        if stage.outputs != outputs:
            raise bundle.wrong(f"stages[{index}].outputs", stage.outputs, f"{outputs}, as labels and regions tell")
        missing = [name for name in stage.networks if name not in manifest.files]
        if missing:
            raise bundle.wrong(f"stages[{index}].networks", missing[0], "a file that `files` lists")
    if order is None and labels != tuple(range(1, len(labels) + 1)):
        raise bundle.wrong("labels", list(labels), "the numbers 1, 2, ... without a gap")


def _stage(stage: _Object, index: int, channels: int) -> Stage:
    patch = stage.checked(
        "patch_size",
        lambda numbers: (
            _are(numbers, int) and len(numbers) in (2, 3) and min(numbers) > 0 and math.prod(numbers) <= LARGEST_PATCH
        ),
        "two or three numbers of voxels",
    )
    axes = len(patch)
    forward = stage.checked("transpose_forward", _is_permutation, "a permutation of 0, 1, 2")
    backward = stage.checked("transpose_backward", _is_permutation, "a permutation of 0, 1, 2")
    if [forward[axis] for axis in backward] != [0, 1, 2]:
        raise stage.wrong("transpose_backward", backward, "the inverse of transpose_forward")
    previous = stage.optional("previous_stage_labels", _whole_numbers, "null or whole numbers from 0 to 65535")
    if (previous is not None) != (index == 1):
        raise stage.wrong("previous_stage_labels", previous, "labels in the second stage and null in the first")
    mirror = stage.optional(
        "mirror_axes",
        lambda numbers: _are(numbers, int) and set(numbers) <= set(range(axes)) and len(set(numbers)) == len(numbers),
        f"null or axes from 0 to {axes - 1}, each once",
    )
    schemes = stage.take("normalization", list, "a list")
    if len(schemes) != channels:
        raise stage.wrong("normalization", f"{len(schemes)} channels", f"{channels}, as channel_names has")
    networks = stage.checked("networks", lambda names: _are(names, str) and names, "a list of at least one file's name")
    return Stage(
        configuration=stage.take("configuration", str, "a text"),
        spacing=tuple(
            stage.checked(
                "spacing",
                lambda numbers: _are(numbers, (int, float)) and len(numbers) == axes and all(map(is_length, numbers)),
                f"{axes} lengths in mm, above 0 and below 1e6",
            )
        ),
        transpose_forward=tuple(forward),
        transpose_backward=tuple(backward),
        patch_size=tuple(patch),
        step=stage.checked(
            "step", lambda step: _are([step], (int, float)) and SMALLEST_STEP <= step <= 1, f"from {SMALLEST_STEP} to 1"
        ),
        mirror_axes=tuple(mirror or ()),
        outputs=stage.checked("outputs", lambda number: _are([number], int) and number > 0, "a number above 0"),
        normalization=tuple(
            _normalization(_Object(scheme, stage.place, f"{stage.path}normalization[{channel}]."))
            for channel, scheme in enumerate(schemes)
        ),
        resampling_data=_resampling(stage, "resampling_data", (0, 1, 3)),
        resampling_seg=_resampling(stage, "resampling_seg", (0, 1)),
        resampling_probabilities=_resampling(stage, "resampling_probabilities", (0, 1)),
        previous_stage_labels=None if previous is None else tuple(previous),
        networks=tuple(networks),
    )


def _normalization(said: _Object) -> Normalization:
    scheme = said.checked("scheme", lambda name: name in SCHEMES, f"one of {', '.join(SCHEMES)}")
    with_mask = said.take("use_mask_for_norm", bool, "true or false")
    if scheme != "CTNormalization":
        return Normalization(scheme, with_mask)
    names = ("mean", "std", "percentile_00_5", "percentile_99_5")
    numbers = [said.checked(name, lambda value: _are([value], (int, float)), "a number") for name in names]
    return Normalization(scheme, with_mask, *(float(number) for number in numbers))


def _resampling(stage: _Object, key: str, orders: tuple[int, ...]) -> Resampling:
    said = _Object(stage.take(key, dict, "an object"), stage.place, f"{stage.path}{key}.")
    said.checked("function", lambda name: name == FUNCTION, FUNCTION)
    # What plans leave out has nnU-Net's default.
    said.said = {
        "order": 3, "order_z": 0, "force_separate_z": False, "separate_z_anisotropy_threshold": 3, **said.said
    }  # fmt: skip
    said.checked("order_z", lambda order: _are([order], int) and order == 0, "0")
    ratio = said.checked("separate_z_anisotropy_threshold", lambda ratio: _are([ratio], (int, float)), "a number")
    return Resampling(
        said.checked("order", lambda order: _are([order], int) and order in orders, f"one of {orders}"),
        said.optional("force_separate_z", lambda value: isinstance(value, bool), "true, false or null"),
        float(ratio),
    )


def _labels(bundle: _Object) -> dict[str, tuple[int, ...]]:
    labels = {}
    for name, values in bundle.take("labels", dict, "an object of numbers").items():
        several = values if isinstance(values, list) else [values]
        if not several or not _whole_numbers(several):
            raise bundle.wrong(f"labels[{name}]", values, "a whole number from 0 to 65535 or several")
        if name != "ignore":
            labels[name] = tuple(several)
    return labels


def _file(said: _Object, name: str) -> tuple[str, int]:
    if not PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"{said.place} lists the file {name!r}; names there have letters, digits, _, - and . and end in .onnx."
        )
    digest = said.checked(
        "sha256", lambda text: isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text), "64 digits of base 16"
    )
    size = said.checked(
        "bytes", lambda number: _are([number], int) and 0 < number <= LARGEST_FILE, f"from 1 to {LARGEST_FILE}"
    )
    return digest, size


class _Object:
    """An object of the JSON that knows where it stands, for errors."""

    def __init__(self, said: object, place: str, path: str):
        self.place, self.path = place, path
        if not isinstance(said, dict):
            raise ValueError(
                f"{place}{': ' + path.rstrip('.') if path else ''} is {_shown(said)}, expected a JSON object."
            )
        self.said: dict = said

    def take(self, key: str, kind: type, expected: str) -> Any:
        return self.checked(key, lambda value: _are([value], kind), expected)

    def checked(self, key: str, fits: Callable[[Any], object], expected: str) -> Any:
        if key not in self.said:
            raise ValueError(f"{self.place} lacks {self.path}{key}: export the bundle anew.")
        value = self.said[key]
        try:
            good = fits(value)
        except TypeError:  # such as a number where a list belongs
            good = False
        if not good:
            raise self.wrong(key, value, expected)
        return value

    def optional(self, key: str, fits: Callable[[Any], object], expected: str) -> Any:
        return self.checked(key, lambda value: value is None or fits(value), expected)

    def wrong(self, key: str, value: object, expected: str) -> ValueError:
        return ValueError(
            f"{self.place}: {self.path}{key} is {_shown(value)}, expected: {expected}. Export the bundle anew."
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _are(values: object, kind: type | tuple[type, ...]) -> bool:
    """Whether it is a list of values of a kind; true is no number, and a number is finite."""
    return isinstance(values, list) and all(
        isinstance(value, kind)
        and (kind is bool or not isinstance(value, bool))
        and (not isinstance(value, float) or math.isfinite(value))
        and (not isinstance(value, int) or abs(value) < 2**53)
        for value in values
    )


def _whole_numbers(values: object) -> bool:
    return _are(values, int) and all(0 <= value <= 65535 for value in values)


def _is_permutation(values: object) -> bool:
    return _are(values, int) and sorted(values) == [0, 1, 2]


def _is_ending(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"(\.[A-Za-z0-9]+){1,2}", text) is not None
