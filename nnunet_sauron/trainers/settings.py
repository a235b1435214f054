"""Settings of a training: the method's defaults, a trainer subclass's class attributes, the environment variable.

nnunet_sauron="lambda_=0.3,target_macs=0.2,num_epochs=50" nnUNetv2_train 4 2d 0 -tr SauronTrainer
nnunet_sauron="@settings.json" nnUNetv2_train 4 2d 0 -tr SauronTrainer
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from ..files import CONTINUE, write_text_atomically
from ..methods.targets import EXCLUSIVE
from .setting_values import SETTINGS_FILE, VARIABLE, absolute, checked, kinds_of, parsed, read_file, split_variable

NO_SETTING, LISTED = "is not a setting of", ". Settings come from the environment variable"


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
        trainer_class: A class attribute with a setting's name overrides its default (nnU-Net's way). Methods and
            properties of such a name are the subclass's own affair.
        settings_classes: Frozen dataclasses with distinct field names.

    Attributes:
        values: What was given, by name.
        by_class: The names that class attributes gave; after `continued`, those that its checkpoint does not hold.
        by_variable: The names that the environment variable gave, itself or by a file.
        changed: After `continued`: what the variable changed, by name, as a pair of values before and now.
        passed_over: After `continued`: class attributes that differ from what the training was begun with, likewise.

    Raises:
        FileNotFoundError, OSError: The variable names a file that is missing or cannot be read.
        ValueError: The variable `nnunet_sauron` or its file names an unknown setting or holds a bad value, or the
            variable is spelled otherwise; all valid ones are listed.
    """

    def __init__(self, trainer_class: type, *settings_classes: type):
        self._trainer_name, self._classes = trainer_class.__name__, settings_classes
        self._known = {field.name: field for cls in settings_classes for field in fields(cls)}
        self._kinds = {name: kinds for cls in settings_classes for name, kinds in kinds_of(cls).items()}
        self.values: dict = {}
        self.by_class: set[str] = set()
        self.by_variable: set[str] = set()
        self.changed: dict[str, tuple] = {}
        self.passed_over: dict[str, tuple] = {}
        try:
            _refuse_other_spellings()
            for name in self._known:
                value = inspect.getattr_static(trainer_class, name, MISSING)
                if value is not MISSING and not hasattr(type(value), "__get__"):
                    self.values[name] = self._of_class(name, value)
                    self.by_class.add(name)
            path, items = split_variable(os.environ.get(VARIABLE, ""))
            if path is not None:
                self._take_file(path)
            of_file = dict(self.values)
            self._take(items)
            if path is not None:
                self._override(path, of_file, {item.partition("=")[0].strip() for item in items})
        except ValueError as error:
            raise self._listed(error) from None

    def _of_class(self, name: str, value):
        try:
            return absolute(name, checked(name, value, self._kinds[name]))
        except ValueError as error:
            raise ValueError(
                f"{error}. It is a class attribute of {self._trainer_name} with the name of a setting: rename it if it "
                f"is meant for something else"
            ) from None

    def _take(self, items: list[str]) -> None:
        found: set[str] = set()
        for item in items:
            name, equals, text = (part.strip() for part in item.partition("="))
            if not equals or name not in self._known:
                hint = "" if equals else f". (A value that holds a comma is given by a file, {VARIABLE}=@FILE)"
                raise ValueError(f"'{item}' {NO_SETTING} {self._trainer_name}{self._nearest(name)}{hint}")
            if name in found:
                raise ValueError(f"{name} is given twice in {VARIABLE}; leave one value for it")
            self.values[name] = absolute(name, parsed(name, text, self._kinds[name]))
            found.add(name)
        self.by_variable |= found

    def _take_file(self, path: Path) -> None:
        for name, value in read_file(path).items():
            if name not in self._known:
                raise ValueError(f"'{name}' in {path} {NO_SETTING} {self._trainer_name}{self._nearest(name)}")
            try:
                self.values[name] = absolute(name, checked(name, value, self._kinds[name]))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            self.by_variable.add(name)

    def _override(self, path: Path, of_file: Mapping, beside: Collection[str]) -> None:
        """Let settings given beside a file override the file's conflicting ones."""
        if "published" in beside and of_file.get("published", self.values["published"]) != self.values["published"]:
            raise ValueError(
                f"published={self.values['published']} decides other settings' defaults, for which {path} has values "
                f"of its own; give the settings that you want without that file"
            )
        if beside & EXCLUSIVE:  # one target at most
            for name in EXCLUSIVE - beside:
                self.values.pop(name, None)

    def settings(self) -> tuple:
        """One instance of each settings class.

        Raises:
            ValueError: A value is out of range, or two exclude each other.
        """
        try:
            return tuple(getattr(cls, "from_given", cls)(**_of(cls, self.values)) for cls in self._classes)
        except ValueError as error:
            raise self._listed(error) from None

    def continued(self, before: Mapping, changeable: Collection[str]) -> tuple:
        """The settings of a training that is continued: its own, but for those that may change and the variable gives.

        Args:
            before: The settings that its checkpoint holds, by name; names that are not settings any more are left out.
            changeable: Names that may differ from there on.

        Raises:
            ValueError: The variable gives another value for what cannot change in a running training.
        """
        before = {name: absolute(name, value) for name, value in before.items()}
        # As its class makes them: some settings decide others, and None may stand for a default.
        given = {
            name: value
            for settings in self.settings()
            for name, value in vars(settings).items()
            if name in self.values and not (value is None and isinstance(settings, TrainingSettings))
        }
        differ = {name for name, value in given.items() if name in before and before[name] != value}
        if fixed := sorted((differ & self.by_variable) - set(changeable)):
            values = ", ".join(f"{name}={before[name]} (now {given[name]})" for name in fixed)
            raise ValueError(
                f"The training that is continued was begun with {values}, which cannot change any more. Leave it out "
                f"of {VARIABLE}: a training keeps its settings when it is continued or validated. Another one is begun "
                f"without --c and --val."
            )
        kept = {name: value for name, value in before.items() if name in self._known}
        kept |= {name: value for name, value in given.items() if name not in before or name in self.by_variable}
        self.passed_over |= {
            name: (before[name], given[name]) for name in sorted(differ & self.by_class - self.by_variable)
        }
        self.by_class -= before.keys()
        self.changed = {name: (before[name], given[name]) for name in sorted(differ & self.by_variable)}
        return tuple(cls(**_of(cls, kept)) for cls in self._classes)

    def enforce(self, trainer) -> None:
        """Set nnU-Net's own numbers that the variable gives once more, where a subclass's constructor set others."""
        for name in self.by_variable & {field.name for field in fields(TrainingSettings)}:
            if self.values[name] is not None:
                setattr(trainer, name, self.values[name])

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._known, 1)
        return f" (did you mean {near[0]}?)" if near else ""

    def _listed(self, error: ValueError) -> ValueError:
        listing = "\n".join(f"    {name}={_default(field)}" for name, field in self._known.items())
        return ValueError(
            f"{str(error).rstrip('.')}{LISTED} {VARIABLE}, as in "
            f'{VARIABLE}="num_epochs=50" or {VARIABLE}="@{SETTINGS_FILE}", or from class attributes of a subclass. '
            f"Valid ones and their defaults:\n"
            f"{listing}"
        )


def _of(settings_class: type, values: Mapping) -> dict:
    """Those of the values that are fields of a settings class."""
    return {field.name: values[field.name] for field in fields(settings_class) if field.name in values}


def check_variable(trainer_classes: Iterable[type]) -> None:
    """Raise what the variable makes every one of some trainers raise: it suits none of them.

    Args:
        trainer_classes: Each with `settings_classes`.

    Raises:
        OSError, ValueError: As `Given` and `Given.settings`, without the list of settings; of a trainer that knows all
            names, if one does.
    """
    said = []
    for trainer_class in trainer_classes:
        try:
            Given(trainer_class, *trainer_class.settings_classes()).settings()
            return
        except ValueError as error:
            said.append(str(error).partition(LISTED)[0])
    if said:
        raise ValueError(min(said, key=lambda text: NO_SETTING in text))


def _refuse_other_spellings() -> None:
    # All of nnU-Net's own variables are written nnUNet_..., and a training with other settings than meant takes days.
    if sys.platform == "win32":  # where all spellings are the same variable
        return
    for name in os.environ:
        if name.lower() == VARIABLE and name != VARIABLE:
            raise ValueError(f"The environment variable {name} is not read: it is spelled {VARIABLE}")


def write_settings(settings: Mapping, folder: Path) -> None:
    """Write a training's settings into its fold's folder, as a file that the variable takes.

    Raises:
        OSError: It could not be written; an older file is untouched.
    """
    text = json.dumps(dict(settings), indent=4, ensure_ascii=False) + "\n"
    write_text_atomically(folder / SETTINGS_FILE, text, CONTINUE)


def _default(field):
    return None if field.default is MISSING else field.default
