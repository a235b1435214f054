from __future__ import annotations

import json
from pathlib import Path

import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_sauron.planning.planners import LUnet8Planner, LUnet16Planner, LUnetPlanner, ResEncLUnetPlanner
from nnunet_sauron.plugin import planner_names

NAME = "Dataset007_Small"
PLANNERS = [
    (LUnetPlanner, 32, "nnUNetLUnet32Plans", "PlainConvUNet"),
    (LUnet16Planner, 16, "nnUNetLUnet16Plans", "PlainConvUNet"),
    (LUnet8Planner, 8, "nnUNetLUnet8Plans", "PlainConvUNet"),
    (ResEncLUnetPlanner, 32, "nnUNetResEncLUnet32Plans", "ResidualEncoderUNet"),
]


@pytest.fixture
def preprocessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset's fingerprint; of its images only the names are there, since no more is needed to plan."""
    raw, preprocessed = tmp_path / "raw" / NAME, tmp_path / "preprocessed" / NAME
    (raw / "imagesTr").mkdir(parents=True)
    (raw / "labelsTr").mkdir()
    preprocessed.mkdir(parents=True)
    cases = [f"case_{index}" for index in range(6)]
    for case in cases:
        (raw / "imagesTr" / f"{case}_0000.nii.gz").touch()
        (raw / "labelsTr" / f"{case}.nii.gz").touch()
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    fingerprint = {
        "spacings": [[2.0, 1.0, 1.0]] * len(cases),
        "shapes_after_crop": [[16, 40, 40]] * len(cases),
        "foreground_intensity_properties_per_channel": {},
        "median_relative_size_after_cropping": 1.0,
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    return preprocessed


@pytest.mark.parametrize(("planner", "width", "name", "network"), PLANNERS, ids=lambda value: str(value))
def test_planner_plans_one_width_for_all_stages_on_the_default_data(
    preprocessed: Path, planner: type[ExperimentPlanner], width: int, name: str, network: str
) -> None:
    # As nnUNetv2_plan_experiment calls it.
    planner(NAME, preprocessor_name="DefaultPreprocessor", overwrite_target_spacing=None).plan_experiment()
    plans = json.loads((preprocessed / f"{name}.json").read_text())
    assert plans["plans_name"] == name
    assert plans["experiment_planner_used"] == planner.__name__
    assert set(plans["configurations"]) == {"2d", "3d_fullres"}
    for key, configuration in plans["configurations"].items():
        assert configuration["data_identifier"] == f"nnUNetPlans_{key}"
        architecture = configuration["architecture"]
        assert architecture["network_class_name"].endswith(f".{network}")
        arguments = architecture["arch_kwargs"]
        assert arguments["features_per_stage"] == [width] * arguments["n_stages"]
        assert arguments["n_stages"] > 2


def test_every_planner_that_nnunet_is_shown_is_tested_here() -> None:
    assert sorted(planner_names()) == sorted(planner.__name__ for planner, *_ in PLANNERS)


@pytest.mark.parametrize("planner", [LUnetPlanner, ResEncLUnetPlanner])
@pytest.mark.parametrize(
    "arguments",
    [{"overwrite_target_spacing": [2.0, 2.0, 2.0]}, {"preprocessor_name": "Mine"}, {"suppress_transpose": True}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_other_preprocessing_gets_data_of_its_own(
    preprocessed: Path, planner: type[ExperimentPlanner], arguments: dict
) -> None:
    assert planner(NAME, plans_name="mine", **arguments).generate_data_identifier("3d_fullres") == "mine_3d_fullres"


def test_lower_resolution_depends_on_the_patch_and_has_data_of_its_own(preprocessed: Path) -> None:
    assert LUnetPlanner(NAME).generate_data_identifier("3d_lowres") == "nnUNetLUnet32Plans_3d_lowres"
