"""Values of settings: from the environment variable's text, from a file, and whether they are of their setting's type.

A file is what a training writes into its fold's folder: one JSON object, values by name. Its path may hold commas and
spaces. Further settings may follow after a comma, or stand before it, and go before the file's:
`nnunet_sauron="@settings.json,num_epochs=50"`.
"""

from __future__ import annotations

import json
import math
import os
import re
import types
import typing
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

VARIABLE = "nnunet_sauron"
SETTINGS_FILE = "settings.json"
PATHS = {"start_from": (), "widths_from": (), "teacher": ("start", "source")}
"""Settings that are paths, and the words that they may be instead."""
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a word", type(None): "None"}


def split_variable(text: str) -> tuple[Path | None, list[str]]:
    """The file that the variable names, if it does, and the settings beside it, such as "num_epochs=50".

    Raises:
        FileNotFoundError: There is no such file.
    """
    before, *after = re.split(r"(?:^|,)\s*@", text.strip(), maxsplit=1)
    if not after:
        return None, _items(text)
    # A path may hold commas: it is the longest one that is there.
    parts = after[0].split(",")
    for count in range(len(parts), 0, -1):
        path = Path(os.path.expanduser(",".join(parts[:count]).strip()))
        if os.path.isfile(path):
            return path, [*_items(before), *_items(",".join(parts[count:]))]
    until = next((i for i, part in enumerate(parts) if i and "=" in part), len(parts))
    path = Path(os.path.expanduser(",".join(parts[:until]).strip()))
    found = "a folder" if os.path.isdir(path) else f"not there (seen from {Path.cwd()})"
    raise FileNotFoundError(
        f"{VARIABLE} names the settings file '{path}', which is {found}. Name a {SETTINGS_FILE} as a training leaves "
        f'it in its fold\'s folder, or give settings as in {VARIABLE}="num_epochs=50".'
    )


def _items(text: str) -> list[str]:
    return [item for item in (part.strip() for part in text.split(",")) if item]


def read_file(path: Path) -> dict:
    """A file's settings, by name; the caller, who knows the trainer, checks their values.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON object, or gives a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no settings file: it is not text in UTF-8 ({error})") from None
    except OSError as error:
        raise OSError(f"The settings file {path} cannot be read: {error.strerror or error}.") from error
    try:
        found = json.loads(text, object_pairs_hook=_distinct)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a JSON {type(found).__name__}, expected an object of settings by name, as in "
            f'{{"num_epochs": 50}}'
        )
    return found


def _distinct(pairs: list[tuple]) -> dict:
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"given twice: {', '.join(twice)}; leave one value for each")
    return dict(pairs)


def parsed(name: str, text: str, kinds: Collection[type]):
    """The value that a text in the environment variable stands for.

    Raises:
        ValueError: It is of none of these types.
    """
    values = {"None": None, "true": True, "True": True, "false": False, "False": False}
    value = values.get(text, text)
    if isinstance(value, str) and str not in kinds:
        for convert in (int, float):
            try:
                value = convert(text)
                break
            except ValueError:
                continue
    return checked(name, value, kinds, text)


def checked(name: str, value, kinds: Collection[type], written: str | None = None):
    """The value, if it is of one of these types: a whole number is a float, too, and a bool is no number.

    Args:
        written: The text it stood in, for the message.

    Raises:
        ValueError: It is of none of them.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    fits = {
        bool: isinstance(value, bool),
        int: is_number and not isinstance(value, float),
        float: is_number,
        str: isinstance(value, str),
        type(None): value is None,
    }
    if not any(fits[kind] for kind in kinds):
        raise ValueError(f"{name} must be {' or '.join(WORDS[kind] for kind in kinds)}; got '{written or value}'")
    return value


def absolute(name: str, value):
    """A path that holds wherever the training is continued; any other value as it is.

    Raises:
        ValueError: The path is empty, or no UTF-8.
    """
    if name not in PATHS or value is None or value in PATHS[name]:
        return value
    if not value.strip():
        raise ValueError(f"{name} is empty, expected the path of a model; leave it out, or give {name}=None")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}={value!a} has a name that is no UTF-8; rename it, or its folder") from None
    return os.path.abspath(os.path.expanduser(value))


def kinds_of(settings_class: type) -> dict[str, tuple[type, ...]]:
    """The types that each field's value may have, whether annotations are text or types.

    Raises:
        TypeError: One is annotated with anything but bool, int, float, str, None, or a choice of these.
    """
    hints = typing.get_type_hints(settings_class)
    return {field.name: _kinds(field.name, hints[field.name]) for field in fields(settings_class)}


def _kinds(name: str, hint) -> tuple[type, ...]:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not all(kind in WORDS for kind in kinds):
        raise TypeError(f"The setting {name} is annotated {hint}; a setting is bool, int, float, str or None of these.")
    return kinds
