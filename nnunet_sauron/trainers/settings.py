"""Settings of a training: the method's defaults, a trainer subclass's class attributes, the environment variable.

nnunet_sauron="lambda_=0.3,tau_max=0.2,num_epochs=50" nnUNetv2_train 4 2d 0 -tr SauronTrainer
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields

VARIABLE = "nnunet_sauron"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """nnU-Net's own numbers, which its trainer sets in its constructor; None leaves them at nnU-Net's default.

    Attributes:
        num_epochs: Length of the training.
        num_iterations_per_epoch: Training steps per epoch.
        num_val_iterations_per_epoch: Validation steps per epoch.
        save_every: Epochs between two `checkpoint_latest.pth` (one more is written with every cut).
        initial_lr: Learning rate at the start of the poly schedule.
        weight_decay: Of the optimiser.
        enable_deep_supervision: False trains with the full-resolution output alone.
    """

    num_epochs: int | None = None
    num_iterations_per_epoch: int | None = None
    num_val_iterations_per_epoch: int | None = None
    save_every: int | None = None
    initial_lr: float | None = None
    weight_decay: float | None = None
    enable_deep_supervision: bool | None = None

    def __post_init__(self) -> None:
        for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        for name in ("initial_lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more; got {value}.")

    def apply_to(self, trainer) -> None:
        """Set what is given on a trainer."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                setattr(trainer, field.name, value)


class Given:
    """Settings that were given for a training: by a trainer subclass's class attributes, then by the environment.

    Args:
        trainer_class: A class attribute with a setting's name overrides its default (nnU-Net's way).
        settings_classes: Frozen dataclasses with distinct field names.

    Attributes:
        values: What was given, by name.
        by_variable: The names that the environment variable gave.

    Raises:
        ValueError: The variable `nnunet_sauron` names an unknown setting or holds a bad value, or is spelled otherwise;
            all valid ones are listed.
    """

    def __init__(self, trainer_class: type, *settings_classes: type):
        self._trainer_name, self._classes = trainer_class.__name__, settings_classes
        self._known = {field.name: field for cls in settings_classes for field in fields(cls)}
        self.values: dict = {}
        self.by_variable: set[str] = set()
        try:
            _refuse_other_spellings()
            for name, field in self._known.items():
                if hasattr(trainer_class, name):
                    self.values[name] = _checked(name, getattr(trainer_class, name), str(field.type))
            for item in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
                name, equals, text = (part.strip() for part in item.partition("="))
                if not equals or name not in self._known:
                    raise ValueError(f"'{item}' is not a setting of {self._trainer_name}{self._nearest(name)}")
                self.values[name] = _parsed(name, text, str(self._known[name].type))
                self.by_variable.add(name)
        except ValueError as error:
            raise self._listed(error) from None

    def settings(self) -> tuple:
        """One instance of each settings class.

        Raises:
            ValueError: A value is out of range, or two exclude each other.
        """
        try:
            return tuple(
                getattr(cls, "from_given", cls)(
                    **{f.name: self.values[f.name] for f in fields(cls) if f.name in self.values}
                )
                for cls in self._classes
            )
        except ValueError as error:
            raise self._listed(error) from None

    def continued(self, before: Mapping, changeable: Collection[str]) -> tuple:
        """The settings of a training that goes on: those it had, and what may change and the variable gives.

        Args:
            before: The settings that its checkpoint holds, by name; names that are not settings any more are left out.
            changeable: Names that may differ from there on.

        Raises:
            ValueError: The variable gives another value for what cannot change in a running training.
        """
        differ = {name for name, value in self.values.items() if name in before and before[name] != value}
        if fixed := sorted((differ & self.by_variable) - set(changeable)):
            values = ", ".join(f"{name}={before[name]} (now {self.values[name]})" for name in fixed)
            raise ValueError(
                f"The training that is continued was begun with {values}, which cannot change on the way. Leave it "
                f"out of {VARIABLE} (a continued training keeps all its settings), or begin anew without --c."
            )
        kept = {name: value for name, value in before.items() if name in self._known}
        kept |= {name: value for name, value in self.values.items() if name not in before or name in changeable}
        return tuple(cls(**_of(cls, kept)) for cls in self._classes)

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._known, 1)
        return f" (did you mean {near[0]}?)" if near else ""

    def _listed(self, error: ValueError) -> ValueError:
        listing = "\n".join(f"    {name}={_default(field)}" for name, field in self._known.items())
        return ValueError(
            f"{str(error).rstrip('.')}. Settings come from the environment variable {VARIABLE}, as in "
            f'{VARIABLE}="num_epochs=50", or from class attributes of a subclass. Valid ones and their defaults:\n'
            f"{listing}"
        )


def _of(settings_class: type, values: Mapping) -> dict:
    """Those of the values that are fields of a settings class."""
    return {field.name: values[field.name] for field in fields(settings_class) if field.name in values}


def _refuse_other_spellings() -> None:
    # All of nnU-Net's own variables are written nnUNet_..., and a training with other settings than meant takes days.
    for name in os.environ:
        if name.lower() == VARIABLE and name != VARIABLE:
            raise ValueError(f"The environment variable {name} is not read: it is spelled {VARIABLE}")


def _parsed(name: str, text: str, annotation: str):
    """The value that a text in the environment variable stands for."""
    values = {"None": None, "true": True, "True": True, "false": False, "False": False}
    value = values.get(text, text)
    if isinstance(value, str) and "str" not in _kinds(annotation):
        for convert in (int, float):
            try:
                value = convert(text)
                break
            except ValueError:
                continue
    return _checked(name, value, annotation)


def _checked(name: str, value, annotation: str):
    kinds = _kinds(annotation)
    if value is None and "None" in kinds:
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    fits = {
        "bool": isinstance(value, bool),
        "int": is_number and value == int(value) and not isinstance(value, float),
        "float": is_number,
        "str": isinstance(value, str),
    }
    if not any(fits.get(kind, False) for kind in kinds):
        words = {"bool": "True or False", "int": "a whole number", "float": "a number", "str": "a word", "None": "None"}
        raise ValueError(f"{name} must be {' or '.join(words[kind] for kind in kinds)}; got '{value}'")
    return value


def _kinds(annotation: str) -> list[str]:
    return [kind.strip() for kind in annotation.split("|")]


def _default(field):
    return None if field.default is MISSING else field.default
