"""Variables of the environment at which nnU-Net's import ends without naming them."""

from __future__ import annotations

import os

PROCESSES = {"nnUNet_def_n_proc": 1, "nnUNet_n_proc_DA": 0}
"""nnU-Net's variables of numbers of processes, and the least that it works with."""


def wrong_number(variable: str) -> tuple[str, str] | None:
    """What is wrong with a variable of `PROCESSES`, and what to do; None where it is right or not set."""
    value, least = os.environ.get(variable), PROCESSES[variable]
    if value is None:
        return None
    try:
        number = int(value)
    except ValueError:
        return f"'{value}' is no whole number", f"Give one, or: unset {variable}"
    return (f"{number} is below {least}", f"Give at least {least}, or: unset {variable}") if number < least else None


def prepare_for_nnunet() -> None:
    """Let pictures be drawn into files alone, and check numbers of processes, before nnU-Net is imported.

    Raises:
        ValueError: One of them is none.
    """
    os.environ["MPLBACKEND"] = "agg"  # a notebook names one that may be missing in this environment
    for variable in PROCESSES:
        if wrong := wrong_number(variable):
            raise ValueError(f"The environment variable {variable}: {wrong[0]}. {wrong[1]}")
