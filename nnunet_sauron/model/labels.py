"""The classes of a dataset.json, as nnU-Net's LabelManager reads them."""

from __future__ import annotations

from collections.abc import Mapping


def class_values(labels: Mapping) -> dict[str, tuple[int, ...]]:
    """The values of each class or region, in the order of the file.

    Args:
        labels: The "labels" of a dataset.json. Values are numbers, numbers written as text, or lists of them.

    Raises:
        ValueError: A value is not a whole number.
    """
    return {str(name): _numbers(name, value) for name, value in labels.items()}


def foreground_values(labels: Mapping, ignore_label: int | None = None) -> dict[str, tuple[int, ...]]:
    """`class_values` without background (0) and the ignore label."""
    skipped = ({0}, {ignore_label})
    return {name: values for name, values in class_values(labels).items() if set(values) not in skipped}


def other_classes(checkpoint: Mapping, dataset_json: Mapping) -> str:
    """That a checkpoint was trained on other classes than a dataset.json tells, in words that follow the checkpoint's
    name; empty where it was not, or does not say."""
    trained = checkpoint.get("init_args", {}).get("dataset_json", {}).get("labels")
    told = dataset_json["labels"]
    if trained is None or class_values(trained) == class_values(told):
        return ""
    return (
        f"was trained on other classes than dataset.json tells: {trained}, and there {told}. Copy dataset.json anew "
        f"from where the model was trained."
    )


def _numbers(name, value) -> tuple[int, ...]:
    try:
        numbers = tuple(int(one) for one in (value if isinstance(value, (list, tuple)) else (value,)))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers:
        raise ValueError(
            f"The label {name!r} of dataset.json has the value {value!r}; expected is a whole number or a list of them."
        )
    return numbers
