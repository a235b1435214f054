from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_sauron.planning.derive import derive_plans
from nnunet_sauron.planning.widths import Flat, PerStage, Scaled, StageWidths
from nnunet_sauron.pruning import count_parameters

from .plans import DATASET, configuration, network, plans, write_plans

FEATURES = ("architecture", "arch_kwargs", "features_per_stage")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stage_widths(plans: dict, configuration: str) -> list[int]:
    return PlansManager(plans).get_configuration(configuration).network_arch_init_kwargs["features_per_stage"]


@pytest.mark.parametrize(
    ("widths", "expected", "name"),
    [
        (Flat(6), [6, 6, 6], "nnUNetLUnet6Plans"),
        (Scaled(0.75), [6, 9, 9], "nnUNetScaled75Plans"),
        (Scaled(0.8), [6, 10, 10], "nnUNetScaled80Plans"),
        (Scaled(0.01), [1, 1, 1], "nnUNetScaled1Plans"),
        (Scaled(1.5), [12, 18, 18], "nnUNetScaled150Plans"),
        (PerStage((4, 5, 6)), [4, 5, 6], "nnUNetWidths4-5-6Plans"),
    ],
)
def test_every_configuration_gets_the_widths_and_nothing_else_changes(
    source: Path, widths: StageWidths, expected: list[int], name: str
) -> None:
    before = files(source.parent)
    derived = derive_plans(7, widths)
    assert derived.path == source.with_name(f"{name}.json")
    assert files(source.parent) == {**before, f"{name}.json": derived.path.read_bytes()}

    wanted, new = plans(), read(derived.path)
    for key in ("2d", "3d_lowres", "3d_fullres"):
        wanted["configurations"][key]["architecture"]["arch_kwargs"]["features_per_stage"] = expected
    wanted["plans_name"] = name
    wanted["nnunet_sauron"] = {"derived_from": "nnUNetPlans", "widths": str(widths)}
    assert new == wanted
    assert stage_widths(new, "3d_cascade_fullres") == expected


def test_what_is_counted_is_what_nnunet_builds_and_estimates(source: Path) -> None:
    derived = derive_plans(DATASET, Flat(6))
    change, new = derived.configurations["3d_cascade_fullres"], read(derived.path)
    for plan, size in ((plans(), change.old), (new, change.new)):
        manager = PlansManager(plan).get_configuration("3d_cascade_fullres")
        # The cascade also reads the lower resolution's two labels.
        assert size.parameters == count_parameters(network(manager.configuration["architecture"], input_channels=3))
        assert size.widths == tuple(stage_widths(plan, "3d_fullres"))
        assert size.feature_map_values == 2 * ExperimentPlanner.static_estimate_VRAM_usage(
            manager.patch_size, 3, 3, manager.network_arch_class_name, manager.network_arch_init_kwargs,
            manager.network_arch_init_kwargs_req_import,
        )  # fmt: skip
    # By hand: 3 convolutions of 3 x 3 x 3 at full resolution (the decoder's first reads 12 channels), and so on.
    voxels = 16 * 32 * 32
    full = voxels * (27 * 6 * (3 + 6 + 12 + 6) + 6 * 3)
    half = voxels // 4 * (27 * 6 * (6 + 6 + 12 + 6) + 6 * 6 * 4)
    quarter = voxels // 32 * (27 * 6 * (6 + 6) + 6 * 6 * 8)
    assert change.new.macs == full + half + quarter


@pytest.mark.parametrize("source_name", ["nnUNetResEncUNetMPlans", "nnUNetPlans_torchres", "mine"])
def test_name_keeps_what_the_sources_says(source: Path, source_name: str) -> None:
    write_plans(source.parents[1], source_name, configurations=plans(residual=True)["configurations"])
    names = {
        "nnUNetResEncUNetMPlans": "nnUNetResEncUNetMLUnet16Plans",
        "nnUNetPlans_torchres": "nnUNetLUnet16Plans_torchres",
        "mine": "mineLUnet16Plans",
    }
    derived = derive_plans(7, Flat(16), source=source_name)
    assert derived.path.stem == derived.name == read(derived.path)["plans_name"] == names[source_name]
    assert derived.configurations["3d_fullres"].new.widths == (16, 16, 16)


@pytest.mark.parametrize(
    ("asked", "there", "changed"),
    [
        (["3d_fullres"], ["3d_fullres"], ["3d_fullres"]),
        (["3d_lowres", "2d"], ["2d", "3d_lowres"], ["2d", "3d_lowres"]),
        (["3d_cascade_fullres"], ["3d_lowres", "3d_fullres", "3d_cascade_fullres"], None),
    ],
)
def test_chosen_configurations_come_with_those_they_need(
    source: Path, asked: list[str], there: list[str], changed: list[str] | None
) -> None:
    derived = derive_plans(7, Flat(6), configurations=asked)
    assert list(read(derived.path)["configurations"]) == there
    assert list(derived.configurations) == (changed or there)


def test_next_stage_that_is_left_out_is_not_predicted_for(source: Path) -> None:
    # nnU-Net stops after the validation of a stage whose next one the plans do not have.
    alone = read(derive_plans(7, Flat(6), configurations=["3d_lowres"]).path)
    assert "next_stage" not in alone["configurations"]["3d_lowres"]
    whole = read(derive_plans(7, Flat(8), configurations=["3d_cascade_fullres"]).path)
    assert whole["configurations"]["3d_lowres"]["next_stage"] == "3d_cascade_fullres"


def test_heir_keeps_its_own_batch_and_inherits_the_widths(source: Path) -> None:
    changed = plans()
    heirs = {f"3d_fullres_bs{size}": {"inherits_from": "3d_fullres", "batch_size": size} for size in (2, 5)}
    changed["configurations"] |= copy.deepcopy(heirs)
    source.write_text(json.dumps(changed))
    new = read(derive_plans(7, Flat(6)).path)["configurations"]
    # Also the one whose batch is its parent's by chance.
    assert {name: new[name] for name in heirs} == heirs


def test_batch_and_patch_are_taken_as_given(source: Path) -> None:
    given = {"batch_size": 5, "patch_size": (8, 16, 64)}
    derived = derive_plans(7, Flat(6), configurations=["3d_fullres"], **given)
    assert derived.name == "nnUNetLUnet6Plans"
    new = read(derived.path)["configurations"]["3d_fullres"]
    assert (new["batch_size"], new["patch_size"]) == (5, [8, 16, 64])
    change = derived.configurations["3d_fullres"]
    assert (change.new.batch_size, change.new.patch_size) == (5, (8, 16, 64))
    assert (change.old.batch_size, change.old.patch_size) == (2, (16, 32, 32))


@pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans format")
def test_plans_of_old_versions_of_nnunet_are_understood(source: Path) -> None:
    old, modern = plans(), configuration([16, 32, 32], [])["architecture"]["arch_kwargs"]
    fullres = old["configurations"]["3d_fullres"]
    del fullres["architecture"]
    fullres |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 8,
        "n_conv_per_stage_encoder": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        "num_pool_per_axis": [1, 2, 2],
        "pool_op_kernel_sizes": modern["strides"],
        "conv_kernel_sizes": modern["kernel_sizes"],
        "unet_max_num_features": 12,
    }
    source.write_text(json.dumps(old))
    assert derive_plans(7, Flat(6)).configurations["3d_fullres"].old.widths == (8, 12, 12)
    assert stage_widths(read(source.with_name("nnUNetLUnet6Plans.json")), "3d_fullres") == [6, 6, 6]


def test_plans_that_exist_are_kept_unless_told_otherwise(source: Path) -> None:
    path = derive_plans(7, Flat(6)).path
    first = path.read_bytes()
    with pytest.raises(ValueError, match=r"nnUNetLUnet6Plans.json exists already; .* --overwrite"):
        derive_plans(7, Flat(6), batch_size=9)
    assert path.read_bytes() == first
    derive_plans(7, Flat(6), batch_size=9, overwrite=True)
    assert read(path)["configurations"]["2d"]["batch_size"] == 9


def test_source_is_never_replaced(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(ValueError, match="would replace nnUNetPlans"):
        derive_plans(7, Flat(6), name="nnUNetPlans", overwrite=True)
    assert source.read_bytes() == before


def test_interrupted_write_leaves_the_old_plans_and_nothing_else(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    derive_plans(7, Flat(6))
    before = files(source.parent)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        derive_plans(7, Flat(6), batch_size=9, overwrite=True)
    assert files(source.parent) == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"dataset": 8}, "no dataset 8 in .*Dataset007_Small.*nnUNetv2_plan_and_preprocess"),
        ({"dataset": "Dataset007_Smal"}, "no dataset Dataset007_Smal"),
        ({"source": "nnUNetPlanz"}, r"no plans nnUNetPlanz in .*\(there: nnUNetPlans\)"),
        ({"source": "dataset"}, r"no plans dataset in .*\(there: nnUNetPlans\)"),
        ({"configurations": ["3d"]}, r"no configuration 3d \(there: 2d, 3d_lowres, 3d_fullres, 3d_cascade_fullres\)"),
        ({"widths": PerStage((4, 5))}, r"2 widths were given \(4-5\), but 2d has 3 stages, now of 8-12-12"),
        ({"batch_size": 0}, "batch size is 0, which must be at least 1"),
        ({"patch_size": (32, 32)}, "patch size 32 32 has 2 axes, but 3d_lowres has 3"),
        (
            {"patch_size": (16, 34, 32), "configurations": ["3d_fullres"]},
            "size 34 of axis 1 cannot be pooled by 3d_fullres: it must be a multiple of 4; nearest are 32 and 36",
        ),
        ({"name": "a__b"}, "'a__b' cannot name plans"),
        ({"name": "a/b"}, "'a/b' cannot name plans"),
        ({"name": "dataset"}, "'dataset' cannot name plans"),
    ],
)
def test_refusal_names_the_value_and_writes_nothing(source: Path, arguments: dict, complaint: str) -> None:
    before = files(source.parent)
    with pytest.raises(ValueError, match=complaint):
        derive_plans(**{"dataset": 7, "widths": Flat(6), **arguments})
    assert files(source.parent) == before


def test_number_of_two_datasets_is_refused(source: Path) -> None:
    (source.parents[1] / "Dataset007_Other").mkdir()
    with pytest.raises(ValueError, match="7 is the number of Dataset007_Other and Dataset007_Small"):
        derive_plans(7, Flat(6))
    assert derive_plans(DATASET, Flat(6)).dataset == DATASET


def test_unset_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    with pytest.raises(ValueError, match="nnUNet_preprocessed is not set"):
        derive_plans(7, Flat(6))


def test_plans_that_are_no_json_are_named(source: Path) -> None:
    source.write_text('{"configurations": ')
    with pytest.raises(ValueError, match="nnUNetPlans.json is no JSON file"):
        derive_plans(7, Flat(6))
    source.write_text("[]")
    with pytest.raises(ValueError, match="nnUNetPlans.json holds a list, expected a JSON object"):
        derive_plans(7, Flat(6))


@pytest.mark.parametrize(
    ("key", "change", "complaint"),
    [
        ("2d", lambda c: c.pop("batch_size"), "'batch_size' is missing"),
        ("2d", lambda c: c.pop("architecture"), "is missing"),
        ("2d", lambda c: c["architecture"]["arch_kwargs"].pop("features_per_stage"), "'features_per_stage' is missing"),
        ("2d", lambda c: c["architecture"]["arch_kwargs"].pop("strides"), "strides"),
    ],
)
def test_edited_plans_are_named_with_what_is_missing(source: Path, key: str, change, complaint: str) -> None:
    edited = read(source)
    change(edited["configurations"][key])
    source.write_text(json.dumps(edited))
    before = files(source.parent)
    with pytest.raises(ValueError, match=rf"{source.name} was changed or is damaged: .*{complaint}"):
        derive_plans(7, Flat(6))
    assert files(source.parent) == before


@pytest.mark.parametrize("configurations", [[], {}, "2d"])
def test_plans_without_configurations_are_refused_before_anything_is_written(source: Path, configurations) -> None:
    source.write_text(json.dumps({**plans(), "configurations": configurations}))
    before = files(source.parent)
    with pytest.raises(ValueError, match="has no 'configurations'"):
        derive_plans(7, Flat(6))
    assert files(source.parent) == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"labels": None}, "has no labels"),
        ({"channel_names": None}, "has no channel_names"),
        ({"numTraining": "many"}, "numTraining is many, expected the number"),
        ({"numTraining": None}, "numTraining is None, expected the number"),
    ],
)
def test_a_dataset_json_that_lacks_something_is_named(source: Path, change: dict, complaint: str) -> None:
    path = source.with_name("dataset.json")
    path.write_text(json.dumps({**read(path), **change}))
    with pytest.raises(ValueError, match=complaint):
        derive_plans(7, Flat(6), same_memory=True)
    if "numTraining" in change:  # which nothing else reads
        derive_plans(7, Flat(6))


def test_a_number_of_cases_that_is_a_text_counts(source: Path) -> None:
    as_number = derive_plans(7, Flat(6), same_memory=True).configurations
    path = source.with_name("dataset.json")
    path.write_text(json.dumps({**read(path), "numTraining": "100"}))
    assert derive_plans(7, Flat(6), same_memory=True, overwrite=True).configurations == as_number


def test_plans_of_another_data_set_are_no_source(source: Path) -> None:
    with pytest.raises(ValueError, match="There are no plans"):
        derive_plans(7, Flat(6), source=f"../{DATASET}/nnUNetPlans")
