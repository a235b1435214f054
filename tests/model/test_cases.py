from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_sauron.model.cases import Case, case_of, find_cases, preprocess, read_case
from nnunet_sauron.model.trained import TrainedModel

from ..compression.small_model import write_images, write_model

NO_IMAGES = (
    "case_0_extra_0000.nii",
    "case_0.nii.gz",
    "case_0_0003.nrrd",
    "case_0_00.nii.gz",
    "case_0_0003.nii.gz~",
    "case_0_0003-nii.gz",
)


@pytest.fixture
def model(tmp_path) -> TrainedModel:
    return TrainedModel.read(write_model(tmp_path / "model"))


def three_channels(tmp_path) -> TrainedModel:
    return TrainedModel.read(write_model(tmp_path / "model", channels=("T1", "T2", "FLAIR")))


def test_the_cases_of_a_folder_are_found_by_nnunets_naming(tmp_path):
    folder = write_images(tmp_path / "images", 3, channels=3)
    for other in NO_IMAGES:
        (folder / other).write_text("")
    cases = find_cases(folder, three_channels(tmp_path))
    assert [case.name for case in cases] == ["case_0", "case_1", "case_2"]
    assert cases[1].files == tuple(str(folder / f"case_1_000{channel}.nii.gz") for channel in range(3))


def test_the_other_channels_of_a_case_are_found_beside(tmp_path):
    folder = write_images(tmp_path / "images", 2, channels=3)
    for other in (*NO_IMAGES, "case_0_extra_0000.nii.gz"):
        (folder / other).touch()
    found = case_of(folder / "case_0_0001.nii.gz", three_channels(tmp_path))
    assert found == Case("case_0", tuple(str(folder / f"case_0_000{channel}.nii.gz") for channel in range(3)))


def test_a_folder_without_images_is_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_cases(tmp_path / "nowhere", model)
    with pytest.raises(FileNotFoundError, match=r"CASE_0000.nii.gz"):
        find_cases(tmp_path, model)


@pytest.mark.parametrize("name", ["case.nii.gz", "case_0000.nrrd", "_0000.nii.gz", "case_00a0.nii.gz"])
def test_another_naming_is_refused(model, tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"not in nnU-Net's naming: CASE_0000.nii.gz, .*\(MRI\)"):
        case_of(tmp_path / name, model)


def test_channels_may_be_called_modality_as_they_once_were(model, tmp_path):
    model.dataset_json["modality"] = model.dataset_json.pop("channel_names")
    assert model.input_channels == 1
    with pytest.raises(ValueError, match=r"not in nnU-Net's naming: .*\(MRI\)"):
        case_of(tmp_path / "case.nii.gz", model)


def test_a_missing_image(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no image .*case_0000.nii.gz"):
        case_of(tmp_path / "case_0000.nii.gz", model)


def test_a_case_of_other_channels_is_refused_wherever_it_lies_in_the_folder(model, tmp_path):
    folder = write_images(tmp_path / "images", 3)
    (write_images(tmp_path / "other", 1) / "case_0_0000.nii.gz").rename(folder / "case_1_0001.nii.gz")
    wrong = r"Case case_1 has 2 channels in .*_0000.nii.gz, .*_0001.nii.gz; the model takes 1 \(MRI\). Name files"
    with pytest.raises(ValueError, match=wrong):
        find_cases(folder, model)
    with pytest.raises(ValueError, match=wrong):
        read_case(model, case_of(folder / "case_1_0000.nii.gz", model))


def test_channels_that_do_not_fit_each_other(tmp_path):
    model = TrainedModel.read(write_model(tmp_path / "model", channels=("T1", "T2")))
    folders = [write_images(tmp_path / name, 1, shape) for name, shape in (("a", (3, 16, 16)), ("b", (3, 16, 17)))]
    with pytest.raises(ValueError, match="cannot be read as one case: .*same shape"):
        read_case(model, Case("case_0", tuple(str(folder / "case_0_0000.nii.gz") for folder in folders)))


def test_channels_in_one_file_count_as_channels(tmp_path):
    folder = write_model(tmp_path / "model", 2, channels=("R", "G", "B"), reader="NaturalImage2DIO", ending=".png")
    images = tmp_path / "images"
    images.mkdir()
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((20, 20, 3), np.uint8), True), str(images / "a_0000.png"))
    model = TrainedModel.read(folder)
    (case,) = find_cases(images, model)
    assert read_case(model, case)[0].shape == (3, 1, 20, 20)


def test_preprocessed_is_what_nnunets_own_prediction_works_on(tmp_path, monkeypatch):
    model = TrainedModel.read(write_model(tmp_path / "model"))
    case = case_of(write_images(tmp_path / "images", 1) / "case_0_0000.nii.gz", model)
    original, properties = read_case(model, case)
    before, told = original.copy(), dict(properties)
    image, _, _ = preprocess(model, original, properties)
    assert image.dtype == torch.float32 and (original == before).all() and properties == told

    seen = []
    monkeypatch.setattr(
        nnUNetPredictor, "predict_logits_from_preprocessed_data", lambda self, data: seen.append(data) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        model.predictor(torch.device("cpu")).predict_from_files_sequential([list(case.files)], None)
    assert torch.equal(image, seen[0])


OF_PLANS = ("transpose_forward", "transpose_backward", "foreground_intensity_properties_per_channel")
OF_CONFIGURATION = (
    "spacing", "normalization_schemes", "use_mask_for_norm", "batch_size", "preprocessor_name", "resampling_fn_data",
    "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_probabilities_kwargs",
)  # fmt: skip
WRONG = {
    "preprocessor_name": "SomebodysPreprocessor", "spacing": [1.0, "2"], "normalization_schemes": [],
    "use_mask_for_norm": None, "resampling_fn_seg": "resample_by_somebody", "transpose_forward": [0, 1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "fault"),
    [*((key, "missing") for key in (*OF_PLANS, *OF_CONFIGURATION)), *((key, "wrong") for key in WRONG)],
)
def test_plans_that_do_not_tell_how_to_preprocess_are_named_before_any_image_is_read(tmp_path, key, fault):
    folder, images = write_model(tmp_path / "model"), write_images(tmp_path / "images", 1)
    plans = json.loads((folder / "plans.json").read_text())
    place = plans if key in OF_PLANS else plans["configurations"]["2d"]
    if fault == "missing":
        del place[key]
    else:
        place[key] = WRONG[key]
    (folder / "plans.json").write_text(json.dumps(plans))
    model = TrainedModel.read(folder)  # a report needs none of it
    for find in (lambda: find_cases(images, model), lambda: case_of(images / "case_0_0000.nii.gz", model)):
        with pytest.raises(ValueError, match=rf"plans\.json.*{key}.*[Cc]opy it anew"):
            find()


@pytest.mark.parametrize(("numbers", "channels"), [([1], 1), ([0, 2], 2), ([1, 2], 2)])
def test_another_channel_does_not_stand_for_one_that_is_missing(tmp_path, numbers, channels):
    model = TrainedModel.read(write_model(tmp_path / "model", channels=("T1", "T2")[:channels]))
    folder = write_images(tmp_path / "images", 2, channels=channels)
    for number, wanted in reversed(list(enumerate(numbers))):
        (folder / f"case_1_{number:04d}.nii.gz").rename(folder / f"case_1_{wanted:04d}.nii.gz")
    said = rf"Case case_1 has the channels {', '.join(f'{number:04d}' for number in numbers)} .*expected 0000"
    with pytest.raises(ValueError, match=said):
        find_cases(folder, model)
    with pytest.raises(ValueError, match=said):
        case_of(folder / f"case_1_{numbers[-1]:04d}.nii.gz", model)


@pytest.mark.parametrize(("length", "voxels"), [(1e-3, "6 x 0 x 0"), (1e4, "6 x 240000 x 240000")])
def test_a_spacing_in_metres_or_micrometres_is_named_with_its_file(model, tmp_path, length, voxels):
    file = write_images(tmp_path / "images", 1) / "case_0_0000.nii.gz"
    image = SimpleITK.ReadImage(str(file))
    image.SetSpacing((length, length, 1.0))
    SimpleITK.WriteImage(image, str(file))
    with pytest.raises(ValueError, match=rf"{file.name}\) has 6 x 24 x 24 voxels of .* which are {voxels} .*spacing"):
        read_case(model, Case("case_0", (str(file),)))
