"""Derive lean plans from a dataset's existing ones: other widths, the same preprocessed data."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..files import read_json_object, write_text_atomically
from ..model.architecture import network_of_plans
from ..plugin.commands import command
from .patches import check_patch, enlarged_patch, largest_batch, patch_limits, pooling_steps
from .size import ConfigurationSize, configuration_size, feature_map_values
from .widths import Widths

NOTE = "nnunet_sauron"  # nnU-Net reads the keys it knows and leaves others alone
NOT_PLANS = ("dataset", "dataset_fingerprint", "splits_final")


@dataclass(frozen=True)
class ConfigurationChange:
    """A configuration in the source plans and in the derived ones.

    Attributes:
        old, new: What it costs.
        limits: With `same_memory`, what kept patch and batch from growing further; else None.
    """

    old: ConfigurationSize
    new: ConfigurationSize
    limits: str | None = None


@dataclass(frozen=True)
class DerivedPlans:
    """What was written.

    Attributes:
        name: The new plans' name, for `-p`.
        source: The name of the plans that they were derived from.
        dataset: The dataset's name.
        path: The new plans' file.
        configurations: Those that were changed, by name.
        to_train: The first of those asked for, after the stage of a cascade that it needs.
    """

    name: str
    source: str
    dataset: str
    path: Path
    configurations: dict[str, ConfigurationChange]
    to_train: tuple[str, ...]


def derive_plans(
    dataset: int | str,
    widths: Widths,
    *,
    source: str = "nnUNetPlans",
    configurations: Sequence[str] = (),
    batch_size: int | None = None,
    patch_size: Sequence[int] | None = None,
    same_memory: bool = False,
    name: str | None = None,
    overwrite: bool = False,
) -> DerivedPlans:
    """Write new plans beside the source plans, which stay as they are.

    Every configuration keeps its `data_identifier`: nothing has to be preprocessed again. Beside the configurations
    asked for the new plans get those which these inherit from or name as previous stage. All of them change, except
    with a pruned checkpoint's widths, which are for one configuration only.

    Args:
        dataset: Number or name, such as 4 or `Dataset004_Hippocampus`.
        widths: `Flat`, `Scaled`, `PerStage` or `PrunedWidths` of `planning.widths`.
        source: Name of the plans to derive from.
        configurations: Names; by default all, or the one that a pruned checkpoint was trained for.
        batch_size: Patches per batch; by default the source's.
        patch_size: Voxels per axis; by default the source's.
        same_memory: Let the patch grow, then the batch, as far as the source's memory estimate allows; the patch up to
            the median image, the batch up to 5 % of the dataset. What `patch_size` or `batch_size` gives stays.
        name: The new plans' name; by default the source's with `widths.label` in it.
        overwrite: Replace plans of that name.

    Raises:
        ValueError: There is no such dataset, source or configuration, the name is taken or unusable, or widths, patch
            or batch do not fit. Nothing is written then.
        OSError: The file cannot be written; one that was there before is untouched.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"The batch size is {batch_size}, which must be at least 1; nnU-Net's own least is 2.")
    folder = _dataset_folder(dataset)
    plans, dataset_json = _read_plans(folder, source), _read_dataset_json(folder / "dataset.json")
    path = _target(folder, source, name or _derived_name(source, widths.label), overwrite)
    chosen = _chosen(plans, source, configurations, widths)
    kept = _with_what_they_need(plans, chosen)
    changed = kept if widths.configuration is None else chosen

    new = copy.deepcopy(plans)
    new["plans_name"] = path.stem
    new[NOTE] = {"derived_from": source, "widths": str(widths)}
    new["configurations"] = {key: new["configurations"][key] for key in kept}
    limits: dict[str, str] = {}
    with _named(folder / f"{source}.json"):
        for key in changed:
            old = PlansManager(plans).get_configuration(key).configuration
            entry = new["configurations"][key]
            entry["architecture"] = widths.architecture(key, old["architecture"])
            entry["patch_size"] = list(patch_size or old["patch_size"])
            entry["batch_size"] = batch_size or old["batch_size"]
            if patch_size is not None:
                check_patch(patch_size, _steps(old), key)
            if same_memory:
                limits[key] = _enlarge(plans, new, key, dataset_json, patch_size is not None, batch_size is not None)
        _inherit_what_is_equal(plans, new)
        _forget_stages_left_out(new)
        before, after = PlansManager(plans), PlansManager(new)
        changes = {
            key: ConfigurationChange(
                configuration_size(before, key, dataset_json),
                configuration_size(after, key, dataset_json),
                limits.get(key),
            )
            for key in changed
        }
        stage_before = after.get_configuration(chosen[0]).configuration.get("previous_stage")
    write_text_atomically(path, json.dumps(new, indent=4))
    to_train = (stage_before, chosen[0]) if stage_before else (chosen[0],)
    return DerivedPlans(path.stem, source, folder.name, path, changes, to_train)


def plans_of_model(plans: dict, configuration: str, widths: Widths) -> dict:
    """A trained model's plans with other widths: its configuration and those it inherits from, under the derived name.

    Raises:
        ValueError: The widths do not fit.
    """
    old = PlansManager(plans).get_configuration(configuration).configuration["architecture"]
    new = copy.deepcopy(plans)
    source = plans["plans_name"]
    new["plans_name"] = _derived_name(source, widths.label)
    new[NOTE] = {"derived_from": source, "widths": str(widths)}
    kept = _with_what_they_need(plans, [configuration])
    new["configurations"] = {key: new["configurations"][key] for key in kept}
    new["configurations"][configuration]["architecture"] = widths.architecture(configuration, old)
    _forget_stages_left_out(new)
    return new


def _dataset_folder(dataset: int | str) -> Path:
    preprocessed = os.environ.get("nnUNet_preprocessed")
    if not preprocessed:
        raise ValueError("nnUNet_preprocessed is not set, where plans are expected: export nnUNet_preprocessed=FOLDER")
    folders = sorted(folder for folder in Path(preprocessed).glob("Dataset*") if folder.is_dir())
    number = str(dataset).zfill(3)
    found = [folder for folder in folders if folder.name == dataset or folder.name.startswith(f"Dataset{number}_")]
    if not found:
        names = ", ".join(folder.name for folder in folders) or "none"
        raise ValueError(
            f"There is no dataset {dataset} in {preprocessed} (there: {names}); plan and preprocess it first: "
            f"{command('nnUNetv2_plan_and_preprocess', '-d', dataset)}"
        )
    if len(found) > 1:
        raise ValueError(f"{dataset} is the number of {' and '.join(f.name for f in found)}; give the dataset's name.")
    return found[0]


def _read_plans(folder: Path, source: str) -> dict:
    path = folder / f"{source}.json"
    if source in NOT_PLANS or Path(source).name != source or not path.is_file():
        others = (p.stem for p in folder.glob("*.json") if p.stem not in NOT_PLANS and not p.name.startswith("."))
        there = ", ".join(sorted(others)) or "none"
        raise ValueError(f"There are no plans {source} in {folder} (there: {there}); give one of them by -p.")
    plans = _read_json(path)
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict) or not configurations:
        raise ValueError(f"{path} holds no plans: it has no 'configurations'; give others by -p.")
    return plans


def _read_dataset_json(path: Path) -> dict:
    """What a network is built by."""
    found = _read_json(path)
    channels = "channel_names" if "channel_names" in found or "modality" not in found else "modality"
    for name in ("labels", channels):
        if not isinstance(found.get(name), dict) or not found[name]:
            raise ValueError(f"{path} has no {name}, expected an object as in nnU-Net's format; add it.")
    return found


@contextlib.contextmanager
def _named(plans: Path) -> Iterator[None]:
    """Name the plans where one of nnU-Net's values in them is missing, or of another kind than nnU-Net writes."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{plans} was changed or is damaged: {why}. Make it anew with nnU-Net's planning, choose other "
            f"configurations with -c, or give other plans by -p."
        ) from error


def _read_json(path: Path) -> dict:
    return read_json_object(path, "make it anew with nnU-Net's planning")


def _derived_name(source: str, label: str) -> str:
    before, plans, after = source.rpartition("Plans")
    return f"{before}{label}Plans{after}" if plans else f"{source}{label}Plans"


def _target(folder: Path, source: str, name: str, overwrite: bool) -> Path:
    # nnU-Net splits a model folder's name at "__", and plans' names are part of it.
    if not name or "__" in name or Path(name).name != name or name in NOT_PLANS:
        raise ValueError(f"'{name}' cannot name plans: give a word without '__' and '/', such as nnUNetLeanPlans.")
    if name == source:
        raise ValueError(f"The new plans would replace {source}, which they come from; give another name with -o.")
    path = folder / f"{name}.json"
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; give another name with -o, or replace it with --overwrite.")
    return path


def _chosen(plans: dict, source: str, configurations: Sequence[str], widths: Widths) -> list[str]:
    available = list(plans["configurations"])
    only = widths.configuration
    chosen = list(configurations) or (available if only is None else [only])
    for configuration in chosen:
        if configuration not in available:
            raise ValueError(
                f"{source} has no configuration {configuration} (there: {', '.join(available)}); choose with -c, or "
                f"other plans by -p."
            )
        if only not in (None, configuration):
            raise ValueError(f"The checkpoint was trained for {only}, not for {configuration}; choose -c {only}.")
    return [configuration for configuration in available if configuration in chosen]


def _with_what_they_need(plans: dict, chosen: Iterable[str]) -> list[str]:
    """The configurations, those they inherit from and those of the stage before, in the plans' order."""
    needed, todo = set(), list(chosen)
    while todo:
        name = todo.pop()
        if name in plans["configurations"] and name not in needed:
            needed.add(name)
            configuration = plans["configurations"][name]
            todo += [configuration[key] for key in ("inherits_from", "previous_stage") if key in configuration]
    return [name for name in plans["configurations"] if name in needed]


def _steps(configuration: dict) -> tuple[int, ...]:
    return pooling_steps(configuration["architecture"]["arch_kwargs"]["strides"], len(configuration["patch_size"]))


def _enlarge(plans: dict, new: dict, name: str, dataset_json: dict, keep_patch: bool, keep_batch: bool) -> str:
    """Let patch and batch of a new configuration grow within the old one's memory estimate; returns the limits."""
    old, entry = PlansManager(plans).get_configuration(name).configuration, new["configurations"][name]
    if "median_image_size_in_voxels" not in old:
        raise ValueError(f"{name} has no median_image_size_in_voxels, up to which patches grow; leave --same-memory.")
    before = network_of_plans(PlansManager(plans), name, dataset_json)
    after = network_of_plans(PlansManager(new), name, dataset_json)
    budget = feature_map_values(before, old["patch_size"]) * old["batch_size"]
    median, steps = old["median_image_size_in_voxels"], _steps(entry)

    patch = entry["patch_size"]
    if not keep_patch:
        patch = enlarged_patch(
            patch, steps, median, lambda grown: feature_map_values(after, grown) * entry["batch_size"] <= budget
        )
        entry["patch_size"] = list(patch)
    covers = all(size >= limit for size, limit in zip(patch, patch_limits(steps, median), strict=True))

    affordable = budget // feature_map_values(after, patch)
    cap = largest_batch(patch, _dataset_voxels(plans, old, dataset_json))
    if not keep_batch:
        entry["batch_size"] = max(entry["batch_size"], min(affordable, cap))
    return (
        f"patch limited by {'what was given' if keep_patch else 'the median image' if covers else 'the memory'}, "
        f"batch by {'what was given' if keep_batch else '5 % of the dataset' if cap < affordable else 'the memory'}"
    )


def _dataset_voxels(plans: dict, configuration: dict, dataset_json: dict) -> float:
    """Voxels of the training cases at their median size, as nnU-Net's planner counts them."""
    median = list(configuration["median_image_size_in_voxels"])
    if len(median) == 2:  # a slice
        volume = plans["configurations"].get("3d_fullres", {}).get("median_image_size_in_voxels")
        median.insert(0, (volume or plans["original_median_shape_after_transp"])[0])
    told = dataset_json.get("numTraining", "missing")
    try:
        voxels = int(told)  # users' scripts write it as a text
    except (TypeError, ValueError):
        raise ValueError(
            f"dataset.json: numTraining is {told}, expected the number of training cases; mend it, or leave "
            f"--same-memory."
        ) from None
    for size in median:
        voxels *= size
    return voxels


def _inherit_what_is_equal(plans: dict, new: dict) -> None:
    """Leave out values that an heir did not set itself and inherits unchanged."""
    for name, entry in new["configurations"].items():
        if "inherits_from" in entry:
            inherited = PlansManager(new).get_configuration(entry["inherits_from"]).configuration
            for key in ("architecture", "patch_size", "batch_size"):
                if key not in plans["configurations"][name] and entry.get(key) == inherited[key]:
                    entry.pop(key, None)


def _forget_stages_left_out(new: dict) -> None:
    # After its validation nnU-Net predicts for every next stage, and stops if the plans do not have it.
    for entry in new["configurations"].values():
        if "next_stage" in entry:
            stages = [entry["next_stage"]] if isinstance(entry["next_stage"], str) else entry["next_stage"]
            there = [stage for stage in stages if stage in new["configurations"]]
            if not there:
                del entry["next_stage"]
            elif there != stages:
                entry["next_stage"] = there
