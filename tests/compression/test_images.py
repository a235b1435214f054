from __future__ import annotations

import pytest
import torch

from nnunet_sauron.compression.agreement import split
from nnunet_sauron.compression.images import (
    _windows,
    batches,
    enough_patches,
    patches,
    too_few,
)
from nnunet_sauron.model.cases import Case, find_cases, preprocess, read_case
from nnunet_sauron.model.trained import TrainedModel

from .small_model import write_images, write_model


@pytest.fixture
def model(tmp_path) -> TrainedModel:
    return TrainedModel.read(write_model(tmp_path / "model"))


@pytest.mark.parametrize("dim", [2, 3])
def test_patches_are_windows_of_what_nnunet_predicts_from(tmp_path, dim):
    model = TrainedModel.read(write_model(tmp_path / "model", dim))
    cases = find_cases(write_images(tmp_path / "images", 2, shape=(20, 24, 18)), model)
    images = [preprocess(model, *read_case(model, case))[0] for case in cases]
    cut = patches(model, cases, 6)
    assert len(cut) == 6 and {tuple(p.shape) for p in cut} == {(1, 1, *[16] * dim)}
    predictor = model.predictor(torch.device("cpu"))
    for patch in cut:
        found = [
            torch.equal(image[window], patch[0])
            for image in images
            for window in predictor._internal_get_sliding_window_slicers(image.shape[1:])
        ]
        assert any(found)
    assert [p.sum() for p in patches(model, cases, 6)] == [p.sum() for p in cut]


def test_windows_are_nnunets(tmp_path):
    for dim, shape in ((2, (3, 20, 33)), (3, (20, 33, 16))):
        predictor = TrainedModel.read(write_model(tmp_path / f"{dim}", dim)).predictor(torch.device("cpu"))
        expected = [window[1:] for window in predictor._internal_get_sliding_window_slicers(shape)]
        assert _windows(shape, [16] * dim) == expected


def test_an_image_smaller_than_the_patch_is_padded(tmp_path):
    model = TrainedModel.read(write_model(tmp_path / "model", 3))
    cases = find_cases(write_images(tmp_path / "images", 1, shape=(6, 24, 10)), model)
    cut = patches(model, cases, 4)
    assert cut[0].shape == (1, 1, 16, 16, 16) and (cut[0] == 0).any()


def nth_case(folder, index, slices, model) -> Case:
    """One whose voxels no other one has."""
    return find_cases(write_images(folder / f"{index}", index + 1, shape=(slices, 16, 16)), model)[index]


@pytest.mark.parametrize("rich", [0, 2])
def test_what_some_cases_lack_the_others_make_up_for(model, tmp_path, rich):
    """Whether the case with many windows comes first or last."""
    cases = []
    for index in range(3):
        slices = 30 if index == rich else 2
        cases.append(nth_case(tmp_path, index, slices, model))
    cut = patches(model, cases, 12)
    assert len(cut) == 12
    assert len(patches(model, cases[1:2], 12, more=False)) == 2
    windows = {patch.numpy().tobytes() for case in cases for patch in preprocess(model, *read_case(model, case))[0][0]}
    assert {patch.numpy().tobytes() for patch in cut} <= windows  # none was made, where there are enough


def test_spare_patches_come_from_all_cases_alike(model, tmp_path):
    cases = [nth_case(tmp_path, index, slices, model) for index, slices in enumerate((30, 30, 1, 1, 1))]
    images = [preprocess(model, *read_case(model, case))[0] for case in cases]
    cut = patches(model, cases, 17)
    of = [sum(any(torch.equal(patch[0], part) for part in image.unbind(1)) for patch in cut) for image in images]
    assert of == [7, 7, 1, 1, 1]


@pytest.mark.parametrize(("dim", "axes"), [(2, None), (2, (0,)), (2, (0, 1)), (3, (0, 1, 2))])
def test_of_images_as_large_as_the_patch_more_are_made(tmp_path, dim, axes):
    """All that are wanted are different; mirrored as the model was trained, or shifted beyond the border."""
    model = TrainedModel.read(write_model(tmp_path / "model", dim))
    model.checkpoints["0"]["inference_allowed_mirroring_axes"] = axes
    cases = find_cases(write_images(tmp_path / "images", 1, shape=(1 if dim == 2 else 16, 16, 16)), model)
    image = preprocess(model, *read_case(model, cases[0]))[0].view(1, 1, *[16] * dim)
    flips = 2 ** len(axes or ())
    cut = patches(model, cases, 1000)
    assert len(cut) == flips * (1 + 2**dim) == len({patch.numpy().tobytes() for patch in cut})
    assert {patch.shape for patch in cut} == {image.shape} and torch.equal(cut[0], image)
    axes = tuple(axis + 2 for axis in axes or ())
    mirrored = {flipped.numpy().tobytes() for flipped in [image, *(image.flip(axis) for axis in axes)]}
    assert mirrored <= {patch.numpy().tobytes() for patch in cut[:flips]}
    corner = (..., *[slice(None, 12)] * dim)
    shifted = torch.zeros_like(image)
    shifted[(..., *[slice(4, None)] * dim)] = image[corner]
    assert any(torch.equal(patch, shifted) for patch in cut[flips:])
    assert len(patches(model, cases, 3)) == min(3, len(cut))


def test_small_patches_are_put_together(model, tmp_path, monkeypatch):
    cut = patches(model, find_cases(write_images(tmp_path / "images", 2), model), 5)
    monkeypatch.setattr("nnunet_sauron.compression.images.VOXELS_AT_ONCE", 2 * 16 * 16)
    together = batches(cut)
    assert [len(batch) for batch in together] == [2, 2, 1] and torch.equal(torch.cat(together), torch.cat(cut))


def test_fewer_patches_than_cases_are_of_cases_all_over_the_folder(model, tmp_path, monkeypatch):
    cases = find_cases(write_images(tmp_path / "images", 9, shape=(3, 20, 20)), model)
    read: list[str] = []
    monkeypatch.setattr(
        "nnunet_sauron.compression.images.read_case",
        lambda model, case: read.append(case.name) or read_case(model, case),
    )
    assert len(patches(model, cases, 3)) == 3 and read == ["case_0", "case_3", "case_6"]


def test_patches_suffice_for_the_layer_with_the_fewest_positions_a_channel():
    assert enough_patches({"wide": 1024, "deep": 8}, {"wide": 32, "deep": 320}) == 4 * 320 / 8
    assert enough_patches({"wide": 1024}, {"wide": 32}) == 8
    assert too_few(80, {"deep": 8}, {"deep": 320}) == []
    assert too_few(79, {"wide": 1024, "deep": 8}, {"wide": 32, "deep": 320}) == ["deep"]
    with pytest.raises(ValueError, match=r"even deep has 320 channels and 8 positions.*at least 640.*80 patches"):
        too_few(79, {"deep": 8}, {"deep": 320})


@pytest.mark.parametrize(
    ("there", "most", "fitted", "held"), [(1, 20, 1, 0), (2, 20, 1, 1), (8, 20, 6, 2), (100, 20, 15, 5)]
)
def test_a_quarter_is_held_out_and_all_of_the_folder_is_used(there, most, fitted, held):
    cases = [Case(f"{i:03d}", ()) for i in range(there)]
    fit_on, held_out = split(cases, most)
    assert (len(fit_on), len(held_out)) == (fitted, held)
    assert not set(fit_on) & set(held_out)
    if there == 100:
        assert max(case.name for case in fit_on + held_out) > "090"
