"""Derived plans beside those they come from: a table for people, JSON for programs."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial

from ..console.json_output import print_json
from ..console.numbers import with_prefix
from ..console.terminal import PlainTable, plain_console
from ..plugin.commands import command
from .derive import ConfigurationChange, DerivedPlans

_short = partial(with_prefix, digits=4)
ROWS = (
    # Label, attribute of ConfigurationSize, how it is shown.
    ("stages", "stages", str),
    ("widths", "widths", lambda widths: "-".join(map(str, widths))),
    ("parameters", "parameters", _short),
    ("MACs of one patch", "macs", _short),
    ("patch size", "patch_size", lambda sizes: " ".join(map(str, sizes))),
    ("batch size", "batch_size", str),
    ("feature map values", "feature_map_values", _short),
)


def print_derived(derived: DerivedPlans, *, json_output: bool = False) -> None:
    """Print the old and the new numbers of each configuration, and new over old."""
    if json_output:
        print_json(_as_json(derived))
        return

    console = plain_console()
    for name, change in derived.configurations.items():
        table = PlainTable(name, derived.source, derived.name, "ratio")
        over_old = ratios(change)
        for label, key, show in ROWS:
            ratio = f"{over_old[key]:.1%}" if key in over_old else ""
            table.add_row(label, show(getattr(change.old, key)), show(getattr(change.new, key)), ratio)
        console.print(table)
        if change.limits is not None:
            console.print(f"{name}: {change.limits}", soft_wrap=True)
    console.print(f"Wrote {derived.path}", soft_wrap=True)
    for name in derived.to_train:
        train = command("nnUNetv2_train", derived.dataset, name, "FOLD", "-p", derived.name)
        console.print(f"Train: {train}", soft_wrap=True)


def ratios(change: ConfigurationChange) -> dict[str, float]:
    """Each number of the new configuration over the old one's; patches are compared by their voxels."""
    numbers = ("parameters", "macs", "batch_size", "feature_map_values")
    found = {name: getattr(change.new, name) / getattr(change.old, name) for name in numbers}
    return {**found, "patch_size": math.prod(change.new.patch_size) / math.prod(change.old.patch_size)}


def _as_json(derived: DerivedPlans) -> dict:
    described = asdict(derived)
    for name, change in derived.configurations.items():
        for key in ("old", "new"):
            described["configurations"][name][key]["stages"] = getattr(change, key).stages
        described["configurations"][name]["ratios"] = ratios(change)
    return described
