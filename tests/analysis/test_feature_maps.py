from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from nnunet_sauron.analysis.feature_maps import plots as feature_maps_plot
from nnunet_sauron.analysis.feature_maps.grid import Grid
from nnunet_sauron.analysis.feature_maps.maps import default_layer, feature_maps, layer_names
from nnunet_sauron.analysis.feature_maps.plots import check_output, draw, write, write_nifti
from nnunet_sauron.cli import main
from nnunet_sauron.model.cases import Case, case_of
from nnunet_sauron.model.trained import TrainedModel
from nnunet_sauron.pruning import channel_layout, resize

from ..compression.small_model import write_images, write_model
from ..full_disk import full_disk

SIDE = 16  # of the models' patches
LAST, STRIDED = "decoder.stages.1.convs.1", "encoder.stages.1.0.convs.0"


def model_of(folder, dim=2, **options) -> TrainedModel:
    return TrainedModel.read(write_model(folder / "model", dim, **options))


def change_plans(folder, change) -> None:
    path = folder / "model" / "plans.json"
    plans = json.loads(path.read_text())
    change(plans, next(iter(plans["configurations"].values())))
    path.write_text(json.dumps(plans))


def one_image(folder, shape=(3, SIDE, SIDE), channels=1) -> Case:
    files = sorted(write_images(folder / "images", 1, shape, channels).iterdir())
    return Case("case_0", tuple(str(path) for path in files))


def direct(model, layer, windows) -> list[np.ndarray]:
    """The layer's output for each window (input channels, *patch): (channels, *voxels)."""
    network, outputs = model.network("0"), []
    network.get_submodule(layer).register_forward_hook(lambda module, inputs, output: outputs.append(output[0].numpy()))
    with torch.no_grad():
        for window in windows:
            network(torch.from_numpy(np.ascontiguousarray(window))[None])
    return outputs


def repeated(maps: np.ndarray, times: int) -> np.ndarray:
    for axis in range(1, maps.ndim):
        maps = maps.repeat(times, axis)
    return maps


class TestLayers:
    def test_names_channels_and_resolution_in_the_networks_order(self, tmp_path):
        found = layer_names(model_of(tmp_path), "0")
        assert [(one.name, one.channels, one.strides) for one in found] == [
            ("encoder.stages.0.0.convs.0", 6, (1, 1)),
            ("encoder.stages.0.0.convs.1", 6, (1, 1)),
            ("encoder.stages.1.0.convs.0", 8, (2, 2)),
            ("encoder.stages.1.0.convs.1", 8, (2, 2)),
            ("encoder.stages.2.0.convs.0", 10, (4, 4)),
            ("encoder.stages.2.0.convs.1", 10, (4, 4)),
            ("decoder.transpconvs.0", 8, (2, 2)),
            ("decoder.stages.0.convs.0", 8, (2, 2)),
            ("decoder.stages.0.convs.1", 8, (2, 2)),
            ("decoder.transpconvs.1", 6, (1, 1)),
            ("decoder.stages.1.convs.0", 6, (1, 1)),
            ("decoder.stages.1.convs.1", 6, (1, 1)),
        ]
        assert [one.name for one in found if one.transposed] == ["decoder.transpconvs.0", "decoder.transpconvs.1"]
        assert found[2].voxels == (8, 8)

    def test_every_channel_unit_has_its_name_here(self, tmp_path):
        model = model_of(tmp_path, 3, architecture="resenc", widths=(8, 8, 10))
        units = channel_layout(model.network("0")).units
        assert {unit.name for unit in units} <= {layer.name for layer in layer_names(model, "0")}
        assert "encoder.stages.2.blocks.1" in {layer.name for layer in layer_names(model, "0")}

    @pytest.mark.parametrize(
        ("architecture", "decoder", "name", "strides"),
        [
            ("plain", [2, 2], "decoder.stages.1.convs.0", (1, 1)),
            ("resenc", [2, 2], "decoder.stages.1.convs.0", (1, 1)),
            ("resenc", [1, 1], "decoder.stages.0.convs.0", (2, 2)),
            ("resenc", [1], "encoder.stages.1.blocks.1", (2, 2)),
        ],
    )
    def test_the_second_to_last_block_is_the_default(self, tmp_path, architecture, decoder, name, strides):
        model = model_of(tmp_path, architecture=architecture, widths=(6, 8, 10)[: len(decoder) + 1])
        configuration = model.plans["configurations"]["2d"]
        configuration["architecture"]["arch_kwargs"]["n_conv_per_stage_decoder"] = decoder
        network = replace_weights(model)
        layer = default_layer(layer_names(network, "0"))
        assert (layer.name, layer.strides) == (name, strides)

    def test_an_unknown_one_is_refused_with_those_close_to_it(self, tmp_path):
        model, case = model_of(tmp_path), one_image(tmp_path)
        with pytest.raises(ValueError, match=r"no layer decoder.stages.1.conv.0; .*decoder.stages.1.convs.0.*--list"):
            feature_maps(model, "0", case, "decoder.stages.1.conv.0")


def replace_weights(model: TrainedModel) -> TrainedModel:
    """The model with random weights that fit its changed plans."""
    from nnunet_sauron.model.architecture import network_of_plans

    network = network_of_plans(model.manager, model.configuration, model.dataset_json, device="cpu")
    return replace(model, checkpoints={"0": {**model.checkpoints["0"], "network_weights": network.state_dict()}})


class TestMaps:
    @pytest.mark.parametrize(("layer", "times"), [(LAST, 1), (STRIDED, 2), ("encoder.stages.2.0.convs.1", 4)])
    @pytest.mark.parametrize("index", [0, 2])
    def test_an_image_of_one_patch_gives_the_layers_output(self, tmp_path, layer, times, index):
        model = model_of(tmp_path)
        maps = feature_maps(model, "0", one_image(tmp_path), layer, index)
        (expected,) = direct(model, layer, [maps.image[:, index]])
        assert maps.maps.dtype == np.float32 and maps.maps.shape == (maps.layer.channels, SIDE, SIDE)
        np.testing.assert_allclose(maps.maps, repeated(expected, times), atol=1e-5)

    @pytest.mark.parametrize(("layer", "times"), [(LAST, 1), (STRIDED, 2)])
    def test_two_windows_are_blended_with_nnunets_weights(self, tmp_path, layer, times):
        model = model_of(tmp_path)
        maps = feature_maps(model, "0", one_image(tmp_path, (2, SIDE, 24)), layer, 1)
        image = maps.image[:, 1]
        left, right = (repeated(one, times) for one in direct(model, layer, [image[:, :, :16], image[:, :, 8:]]))
        weights = compute_gaussian((SIDE, SIDE), 1 / 8, 10, device=torch.device("cpu")).float().numpy()
        total, sums = np.zeros((len(left), SIDE, 24)), np.zeros((SIDE, 24))
        for one, start in ((left, 0), (right, 8)):
            total[:, :, start : start + 16] += weights * one
            sums[:, start : start + 16] += weights
        np.testing.assert_allclose(maps.maps, total / sums, atol=1e-5)
        assert np.abs(maps.maps[:, :, :16] - left).max() > 0.1  # a test of blending has something to blend

    @pytest.mark.parametrize(("layer", "times"), [(LAST, 1), (STRIDED, 2)])
    def test_one_slice_of_a_3d_image_smaller_than_the_patch(self, tmp_path, layer, times):
        model = model_of(tmp_path, 3)
        maps = feature_maps(model, "0", one_image(tmp_path, (9, 12, SIDE)), layer, 4)
        padded = np.pad(maps.image, ((0, 0), (3, 4), (2, 2), (0, 0)))
        (expected,) = direct(model, layer, [padded])
        np.testing.assert_allclose(maps.maps, repeated(expected, times)[:, 3 + 4, 2:14], atol=1e-5)

    @pytest.mark.parametrize("dim", [2, 3])
    @pytest.mark.parametrize("layer", [None, STRIDED])
    def test_volumes_hold_the_slice_in_whichever_window_it_lies(self, tmp_path, dim, layer):
        model = model_of(tmp_path, dim)
        maps = feature_maps(model, "0", one_image(tmp_path, (20, 18, 12)), layer, 10)
        files = write_nifti(maps, tmp_path / "out")[-maps.layer.channels :]
        assert [path.name for path in files[:2]] == ["map_000.nii.gz", "map_001.nii.gz"]
        volumes = np.stack([SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))) for path in files])
        assert volumes.shape == (maps.layer.channels, 20, 18, 12)
        np.testing.assert_allclose(volumes[:, 10], maps.maps, atol=1e-5)
        other = feature_maps(model, "0", one_image(tmp_path / "again", (20, 18, 12)), layer, 3)
        np.testing.assert_allclose(volumes[:, 3], other.maps, atol=1e-5)
        assert not list((tmp_path / "out").glob("*.tmp"))

    def test_the_last_blocks_maps_are_what_the_prediction_was_made_of(self, tmp_path):
        model = model_of(tmp_path)
        maps = feature_maps(model, "0", one_image(tmp_path, (2, SIDE, 40)), LAST, 0)
        head = model.network("0").decoder.seg_layers[-1]
        logits = head(torch.from_numpy(maps.maps)[None])[0]  # it is linear, so blending may come before it
        agrees = logits.argmax(0).numpy() == maps.prediction[0]
        assert agrees.mean() > 0.99 and len(np.unique(maps.prediction)) > 1  # nnU-Net blends in half precision

    def test_the_prediction_is_nnunets_own(self, tmp_path):
        model, case = model_of(tmp_path, 3), one_image(tmp_path, (20, 24, 18))
        model.predictor(torch.device("cpu")).predict_from_files_sequential(
            [list(case.files)], [str(tmp_path / "predicted")]
        )
        expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "predicted.nii.gz")))
        maps = feature_maps(model, "0", case)
        assert (maps.prediction == expected).all() and maps.prediction.dtype == np.int16

    def test_a_pruned_network_has_the_maps_it_has_left(self, tmp_path):
        model = model_of(tmp_path)
        network = model.network("0")
        resize(network, {**channel_layout(network).widths, "decoder.stages.1.convs.0": 2})
        model.checkpoints["0"]["network_weights"] = network.state_dict()
        maps = feature_maps(model, "0", one_image(tmp_path))
        assert maps.layer.name == "decoder.stages.1.convs.0" and maps.maps.shape == (2, SIDE, SIDE)

    def test_of_several_folds_the_one_asked_for(self, tmp_path):
        model, case = model_of(tmp_path, folds=(0, 1)), one_image(tmp_path)
        one, other = (feature_maps(model, fold, case, LAST, 0) for fold in "01")
        assert "fold 1" in other.model and not np.allclose(one.maps, other.maps)
        assert (one.prediction != other.prediction).any()

    def test_a_reference_changes_no_map(self, tmp_path):
        """Labels outside an image's mask enter the normalisation, if nnU-Net is given both."""
        write_model(tmp_path / "model")
        change_plans(tmp_path, lambda plans, configuration: configuration.update(use_mask_for_norm=[True]))
        model, case = TrainedModel.read(tmp_path / "model"), one_image(tmp_path)
        image = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(case.files[0]))
        image[:, :4, :6] = 0  # a corner, which is not cropped
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image), case.files[0])
        labels = np.zeros(image.shape, np.uint8)
        labels[:, :5, :3] = 1
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), str(tmp_path / "labels.nii.gz"))
        without = feature_maps(model, "0", case, LAST, 1)
        given = feature_maps(model, "0", case, LAST, 1, tmp_path / "labels.nii.gz")
        assert (given.maps == without.maps).all() and (given.image == without.image).all()
        assert (given.reference == labels).all() and without.reference is None

    def test_an_image_that_tells_no_directions(self, tmp_path):
        model = model_of(tmp_path, channels=("R", "G", "B"), reader="NaturalImage2DIO", ending=".png")
        voxels = np.random.default_rng(0).integers(1, 255, (20, 30, 3), dtype=np.uint8)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels, True), str(tmp_path / "photo_0000.png"))
        maps = feature_maps(model, "0", case_of(tmp_path / "photo_0000.png", model))
        assert maps.maps.shape == (6, 20, 30) and not maps.grid.oriented and maps.case == "photo"
        assert [path.name for path in draw(maps, tmp_path / "out")] == ["feature_maps_1.png"]
        files = write_nifti(maps, tmp_path / "out")
        assert [path.name for path in files[:3]] == ["image_0000.nii.gz", "image_0001.nii.gz", "image_0002.nii.gz"]

    def test_nothing_is_printed_and_steps_are_counted(self, tmp_path, capsys):
        counted = []

        class Bar:
            def __init__(self, text, steps):
                self.entry = [text, steps, 0]
                counted.append(self.entry)

            def __enter__(self):
                def step(name):
                    self.entry[2] += 1

                return step

            def __exit__(self, *_):
                pass

        maps = feature_maps(model_of(tmp_path), "0", one_image(tmp_path, (3, SIDE, 24)), bar=Bar)
        write(maps, tmp_path / "out", nifti=True, bar=Bar)
        assert counted == [
            ["segmenting", 6, 6],
            ["gathering 6 maps", 2, 2],
            ["gathering 6 maps", 6, 6],
            ["writing", 6, 6],
        ]
        assert capsys.readouterr() == ("", "")


class TestSlice:
    def labels(self, folder, values, shape=(5, SIDE, SIDE)):
        """A reference with so many voxels of a value in each slice."""
        array = np.zeros(shape, np.uint8)
        for index, (value, count) in values.items():
            array[index].flat[:count] = value
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(folder / "labels.nii.gz"))
        return folder / "labels.nii.gz"

    def chosen(self, tmp_path, monkeypatch, labels=None, predicted=None, **options):
        if predicted is not None:
            array = torch.from_numpy(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(predicted))).astype(int))
            monkeypatch.setattr(
                "nnunetv2.utilities.label_handling.label_handling.LabelManager.convert_logits_to_segmentation",
                lambda manager, logits: array,
            )
        model = model_of(tmp_path, **options)
        maps = feature_maps(model, "0", one_image(tmp_path, (5, SIDE, SIDE)), reference=labels)
        (expected,) = direct(model, maps.layer.name, [maps.image[:, maps.slice_index]])
        np.testing.assert_allclose(maps.maps, expected, atol=1e-5)
        return maps.slice_index, maps.note

    def test_most_foreground_in_the_reference(self, tmp_path, monkeypatch):
        labels = self.labels(tmp_path, {1: (2, 9), 3: (1, 10), 4: (2, 3)})
        assert self.chosen(tmp_path, monkeypatch, labels) == (3, None)

    def test_nobodys_judgement_is_no_foreground(self, tmp_path, monkeypatch):
        labels = self.labels(tmp_path, {1: (1, 9), 3: (3, 50)})
        assert self.chosen(tmp_path, monkeypatch, labels, ignore=3) == (1, None)

    def test_most_foreground_in_the_prediction_without_a_reference(self, tmp_path, monkeypatch):
        (tmp_path / "p").mkdir()
        predicted = self.labels(tmp_path / "p", {0: (1, 9), 4: (2, 10)})
        assert self.chosen(tmp_path, monkeypatch, predicted=predicted) == (4, None)

    def test_the_prediction_if_the_reference_is_empty(self, tmp_path, monkeypatch):
        (tmp_path / "p").mkdir()
        predicted = self.labels(tmp_path / "p", {0: (1, 9), 4: (2, 10)})
        index, note = self.chosen(tmp_path, monkeypatch, self.labels(tmp_path, {}), predicted)
        assert index == 4 and note.startswith("There is no foreground in the reference: this is the slice with most")

    def test_the_middle_without_any_foreground(self, tmp_path, monkeypatch):
        (tmp_path / "p").mkdir()
        index, note = self.chosen(tmp_path, monkeypatch, predicted=self.labels(tmp_path / "p", {}))
        assert index == 2 and note == "There is no foreground in prediction: this is the middle slice."

    def test_one_that_is_asked_for(self, tmp_path):
        maps = feature_maps(model_of(tmp_path), "0", one_image(tmp_path, (5, SIDE, SIDE)), slice_index=4)
        assert maps.slice_index == 4 and maps.note is None

    @pytest.mark.parametrize("index", [-1, 5])
    def test_one_that_is_not_there(self, tmp_path, index):
        with pytest.raises(ValueError, match=rf"--slice is {index}; the preprocessed image has 5 slices, 0 to 4"):
            feature_maps(model_of(tmp_path), "0", one_image(tmp_path, (5, SIDE, SIDE)), slice_index=index)


def blob(path, spacing=(0.8, 1.3, 2.2), centre=(14.3, 11.8, 7.4)) -> np.ndarray:
    """An oblique image with a margin of zeros and a soft blob at an index (x, y, z); its place in mm.

    Its spacing is not so uneven that nnU-Net would resample an axis to the nearest slice, which moves things a little.
    """
    z, y, x = np.mgrid[:16, :26, :30]
    distance = sum(((a - c) * s) ** 2 for a, c, s in zip((x, y, z), centre, spacing, strict=True))
    voxels = 1 + 100 * np.exp(-distance / (2 * 3.0**2))
    voxels[:2] = voxels[-1:] = voxels[:, :3] = voxels[:, :, :1] = voxels[:, :, -4:] = 0
    image = SimpleITK.GetImageFromArray(voxels.astype(np.float32))
    cos, sin = np.cos(0.4), np.sin(0.4)
    image.SetDirection((0, -sin, cos, -1, 0, 0, 0, -cos, -sin))
    image.SetSpacing(spacing)
    image.SetOrigin((-31.0, 17.0, 250.0))
    SimpleITK.WriteImage(image, str(path))
    return np.array(image.TransformContinuousIndexToPhysicalPoint(centre))


def place_of_blob(path) -> np.ndarray:
    image = SimpleITK.ReadImage(str(path))
    voxels = SimpleITK.GetArrayFromImage(image)
    weights = np.clip(voxels - (voxels.min() + 0.3 * np.ptp(voxels)), 0, None)
    indices = [float((weights * axis).sum() / weights.sum()) for axis in np.indices(weights.shape)[::-1]]
    return np.array(image.TransformContinuousIndexToPhysicalPoint(indices))


class TestNifti:
    @pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
    @pytest.mark.parametrize("transpose", [[0, 1, 2], [1, 0, 2], [2, 0, 1]])
    def test_what_lies_somewhere_in_the_image_lies_there_in_the_volumes(self, tmp_path, reader, transpose):
        write_model(tmp_path / "model", 3, reader=reader)

        def change(plans, configuration):
            configuration["spacing"] = [2.1, 1.1, 0.9]
            plans.update(transpose_forward=transpose, transpose_backward=np.argsort(transpose).tolist())

        change_plans(tmp_path, change)
        there = blob(tmp_path / "case_0000.nii.gz")
        model = TrainedModel.read(tmp_path / "model")
        maps = feature_maps(model, "0", case_of(tmp_path / "case_0000.nii.gz", model))
        files = write_nifti(maps, tmp_path / "out")
        assert [path.name for path in files[:3]] == ["image.nii.gz", "prediction.nii.gz", "map_000.nii.gz"]
        assert np.linalg.norm(place_of_blob(files[0]) - there) < 0.1  # mm; voxels are 2.1 x 1.1 x 0.9
        image, *others = (SimpleITK.ReadImage(str(path)) for path in files)
        for other in others:
            assert other.GetSize() == image.GetSize()
            assert np.allclose(other.GetOrigin(), image.GetOrigin())
            assert np.allclose(other.GetDirection(), image.GetDirection())
        assert np.allclose(maps.grid.spacing, [2.1, 1.1, 0.9], rtol=0.05)

    def test_the_voxels_are_those_of_the_grid(self, tmp_path):
        """A whole chain of geometry can be right with the voxels in another order."""
        write_model(tmp_path / "model")
        change_plans(tmp_path, lambda plans, _: plans.update(transpose_forward=[2, 0, 1], transpose_backward=[1, 2, 0]))
        model = TrainedModel.read(tmp_path / "model")
        maps = feature_maps(model, "0", one_image(tmp_path, (4, 10, 12)))
        assert maps.image.shape == (1, 12, 4, 10) and maps.grid.slice_axis == "x"
        files = write_nifti(maps, tmp_path / "out")
        image = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(files[0])))
        np.testing.assert_allclose(image, maps.image[0].transpose(1, 2, 0), atol=1e-6)

    def test_the_slices_number_in_the_original_image(self, tmp_path):
        write_model(tmp_path / "model", 3)
        change_plans(tmp_path, lambda plans, configuration: configuration.update(spacing=[1.5, 1.0, 1.0]))
        blob(tmp_path / "case_0000.nii.gz", spacing=(1.0, 1.0, 3.0))
        model = TrainedModel.read(tmp_path / "model")
        maps = feature_maps(model, "0", case_of(tmp_path / "case_0000.nii.gz", model), slice_index=0)
        # Slices 2 to 14 of 3 mm are left by the crop; there are two of 1.5 mm in each.
        assert maps.image.shape[1] == 26
        assert [maps.grid.original_slice(index) for index in (0, 1, 2, 25)] == [2, 2, 3, 14]

    @pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
    @pytest.mark.parametrize("orientation", ["LPS", "RAS", "AIL", "SRP"])
    def test_they_are_the_files_own_where_the_reader_turns_it(self, tmp_path, reader, orientation):
        image = SimpleITK.GetImageFromArray(np.zeros((7, 9, 11), np.float32))
        image[3, 2, 1] = 1.0  # x, y, z
        direction = SimpleITK.DICOMOrientImageFilter.GetDirectionCosinesFromOrientation(orientation)
        image.SetDirection(direction)
        image.SetSpacing((0.5, 0.7, 2.0))
        SimpleITK.WriteImage(image, str(tmp_path / "a.nii.gz"))
        array, properties = recursive_find_reader_writer_by_name(reader)().read_images([str(tmp_path / "a.nii.gz")])
        transpose = (1, 0, 2)
        seen = array[0].transpose(transpose)
        properties["shape_before_cropping"] = properties["shape_after_cropping_and_before_resampling"] = seen.shape
        properties["bbox_used_for_cropping"] = [[0, length] for length in seen.shape]
        grid = Grid.of(properties, transpose, seen.shape)
        (index,) = np.argwhere(seen)
        np.testing.assert_allclose(grid.to_original @ (*index, 1), (1, 2, 3, 1), atol=1e-4)
        assert grid.original_slice(index[0]) == {"z": 1, "y": 2, "x": 3}[grid.slice_axis]
        np.testing.assert_allclose(
            (grid.affine @ (*index, 1))[:3], image.TransformIndexToPhysicalPoint((3, 2, 1)), atol=1e-4
        )


class TestPictures:
    @pytest.fixture
    def maps(self, tmp_path):
        write_images(tmp_path / "images", 1, (3, SIDE, 20), labels=tmp_path / "labels")
        model = model_of(tmp_path)
        case = case_of(tmp_path / "images/case_0_0000.nii.gz", model)
        return feature_maps(model, "0", case, reference=tmp_path / "labels/case_0.nii.gz")

    @pytest.mark.parametrize(("channels", "pages"), [(1, [1]), (6, [6]), (7, [4, 3]), (16, [6, 5, 5])])
    def test_maps_are_spread_over_pages_and_all_are_there(self, tmp_path, maps, monkeypatch, channels, pages):
        drawn, panels = [], []
        assert (feature_maps_plot.COLUMNS, feature_maps_plot.ROWS) == (8, 6)
        monkeypatch.setattr(feature_maps_plot, "COLUMNS", 3)
        monkeypatch.setattr(feature_maps_plot, "ROWS", 2)

        def page(*arguments):
            drawn.append([])
            return original(*arguments)

        original = feature_maps_plot._page
        monkeypatch.setattr(feature_maps_plot, "_page", page)
        monkeypatch.setattr(
            feature_maps_plot, "_show_map", lambda axes, upright, plane, channel: drawn[-1].append(channel)
        )
        monkeypatch.setattr(feature_maps_plot, "_show_image", lambda *words: panels.append((len(drawn), words[3])))
        many = replace(maps, maps=np.zeros((channels, SIDE, 20), np.float32))
        files = draw(many, tmp_path / "out")
        assert [path.name for path in files] == [f"feature_maps_{i + 1}.png" for i in range(len(pages))]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
        assert [len(one) for one in drawn] == pages and [i for one in drawn for i in one] == list(range(channels))
        assert panels == [(1, "MRI"), (1, "reference"), (1, "prediction")]

    def test_every_map_has_its_own_range(self, maps):
        planes = np.stack([np.zeros((SIDE, 20)), np.linspace(-1, 3, SIDE * 20).reshape(SIDE, 20)]).astype(np.float32)
        sheet = feature_maps_plot._page(
            replace(maps, maps=planes), feature_maps_plot._Upright(maps.grid), range(2), number=2, pages=2
        )
        first, second = sheet.figure.axes
        assert first.get_title("right") == "all 0" and second.get_title("right") == "-1 to 3"
        assert second.images[0].get_clim() == (-1, 3) and second.get_title("left") == "1"

    def test_segmentations_lie_on_the_image_in_their_colours(self, maps):
        sheet = feature_maps_plot._page(maps, feature_maps_plot._Upright(maps.grid), range(6), number=1, pages=1)
        image, reference, prediction = sheet.figure.axes[:3]
        assert [axes.get_title() for axes in (image, reference, prediction)] == ["MRI", "reference", "prediction"]
        assert [text.get_text() for text in image.texts] == list("RLAP") and len(image.images) == 1
        colours = {0: (0, 0, 0, 0)}
        colours.update({v: (*c[:3], 0.5) for v, c in feature_maps_plot._colours(maps).items()})
        for axes, labels in ((reference, maps.reference), (prediction, maps.prediction)):
            below, above = (shown.get_array() for shown in axes.images)
            assert (below == maps.image[0, maps.slice_index]).all()
            expected = np.array([[colours[value] for value in row] for row in labels[maps.slice_index].tolist()])
            np.testing.assert_allclose(above, expected)

    def test_classes_keep_their_colours_and_values_of_one_region_share_it(self, maps):
        slices = np.zeros_like(maps.prediction)
        slices[0, 0, :4] = 1, 2, 3, 9
        slices[1, 0, 0] = 2
        shown = replace(maps, prediction=slices, reference=None, classes={1: "whole", 2: "core", 3: "core"})
        first, second = (feature_maps_plot._colours(replace(shown, slice_index=index)) for index in (0, 1))
        assert list(first) == [1, 2, 3, 9] and list(second) == [2]
        assert first[2] == first[3] == second[2] and len(set(first.values())) == 3

    @pytest.mark.parametrize(
        ("rows", "columns", "letters", "corner"),
        [
            # Towards where rows and columns count; the corner of the stored slice that is then on top, on the left.
            ("P", "L", "RLAP", (0, 0)),
            ("A", "R", "RLAP", (-1, -1)),
            ("L", "P", "RLAP", (0, 0)),
            ("S", "L", "RLSI", (-1, 0)),
            ("R", "I", "RLSI", (-1, 0)),
            ("I", "P", "APSI", (0, 0)),
            ("A", "S", "APSI", (-1, -1)),
        ],
    )
    def test_slices_stand_upright_however_they_are_stored(self, rows, columns, letters, corner):
        towards = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}
        affine = np.eye(4)
        affine[:3, :3] = 0
        for axis, (letter, spacing) in enumerate(((rows, 2.0), (columns, 0.5)), 1):
            direction, sign = towards[letter]
            affine[direction, axis] = sign * spacing
        affine[3 - sum(towards[letter][0] for letter in (rows, columns)), 0] = 1
        upright = feature_maps_plot._Upright(Grid((0, 1, 2), np.eye(4), affine, oriented=True))
        stored = np.arange(12.0).reshape(3, 4)
        turned = upright(stored)
        assert upright.letters == letters and turned[0, 0] == stored[corner]
        as_tall_as_it_was_wide = towards[rows][0] < towards[columns][0]
        assert turned.shape == ((4, 3) if as_tall_as_it_was_wide else (3, 4))
        assert upright.aspect == (0.25 if as_tall_as_it_was_wide else 4)
        unknown = feature_maps_plot._Upright(Grid((0, 1, 2), np.eye(4), affine, oriented=False))
        assert (unknown(stored) == stored).all() and unknown.letters == "" and unknown.aspect == 4

    def test_nested_regions_are_named_by_the_innermost(self, tmp_path):
        write_model(tmp_path / "model")
        path = tmp_path / "model/dataset.json"
        dataset = json.loads(path.read_text())
        dataset["labels"] = {"background": 0, "core": [2, 3], "whole": [1, 2, 3], "inner": 3}
        dataset["regions_class_order"] = [2, 1, 3]
        path.write_text(json.dumps(dataset))
        maps = feature_maps(TrainedModel.read(tmp_path / "model"), "0", one_image(tmp_path))
        assert maps.classes == {1: "whole", 2: "core", 3: "inner"}
        assert set(np.unique(maps.prediction)) <= {0, 1, 2, 3}


class TestOutput:
    @pytest.fixture
    def maps(self, tmp_path):
        return feature_maps(model_of(tmp_path), "0", one_image(tmp_path))

    def test_the_files_are_where_it_says(self, tmp_path, maps):
        (tmp_path / "out").mkdir()
        files = write(maps, tmp_path / "out", nifti=True)
        names = ["feature_maps_1.png", "image.nii.gz", "prediction.nii.gz", *(f"map_00{i}.nii.gz" for i in range(6))]
        assert [path.name for path in files] == names
        assert sorted((tmp_path / "out").iterdir()) == sorted(files)
        assert write(maps, tmp_path / "deep/out") == [tmp_path / "deep/out/feature_maps_1.png"]

    def test_a_folder_with_something_in_it_is_left_alone(self, tmp_path, maps):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/notes.txt").touch()
        for refuse in (lambda: write(maps, tmp_path / "out"), lambda: check_output(tmp_path / "out/notes.txt")):
            with pytest.raises(FileExistsError, match=r"exists and is not empty; give another -o, or remove it"):
                refuse()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]

    @pytest.mark.parametrize("there", [True, False])
    def test_a_link_stays_a_link(self, tmp_path, maps, there):
        if there:
            (tmp_path / "place").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "place")
        write(maps, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "place/feature_maps_1.png").is_file()

    @pytest.mark.parametrize(
        ("room", "said"),
        [
            (0, "File too large"),
            (1000, "image.nii.gz was not written to its end"),
            (10_000, "no room for 1.84e-05 GB of maps"),
        ],
    )
    def test_a_full_disk_is_said_and_leaves_nothing(self, tmp_path, maps, monkeypatch, room, said):
        if room:  # else the picture finds none
            monkeypatch.setattr(feature_maps_plot, "draw", lambda *_: [])
        with (
            full_disk(room),
            pytest.raises(OSError, match=f"out could not be written: .*{said}.* make room or mend what is named"),
        ):
            write(maps, tmp_path / "out", nifti=True)
        assert not list(tmp_path.glob("*out*"))

    def test_what_fails_leaves_nothing(self, tmp_path, maps, monkeypatch):
        def fails(*_):
            raise OSError("disk full")

        monkeypatch.setattr(feature_maps_plot, "write_nifti", fails)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OSError, match="disk full"):
            write(maps, tmp_path / "out", nifti=True)
        assert sorted(tmp_path.rglob("*")) == before


class TestCase:
    def test_all_its_channels_are_shown(self, tmp_path):
        model = model_of(tmp_path, channels=("T1", "T2", "FLAIR"))
        maps = feature_maps(model, "0", one_image(tmp_path, channels=3), slice_index=0)
        assert maps.image.shape[0] == 3 and maps.case == "case_0" and maps.input_channels == ("T1", "T2", "FLAIR")

    def test_a_missing_reference(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no file .*labels.nii.gz"):
            feature_maps(model_of(tmp_path), "0", one_image(tmp_path), reference=tmp_path / "labels.nii.gz")

    def test_a_reference_of_another_shape(self, tmp_path):
        case, other = (one_image(tmp_path / name, (3, 16, 16 + i)) for i, name in enumerate("ab"))
        with pytest.raises(ValueError, match=r"has \(3, 16, 17\) voxels, the image .* \(3, 16, 16\) \(z, y, x\)"):
            feature_maps(model_of(tmp_path), "0", case, reference=Path(other.files[0]))


def test_volumes_are_not_written_to_a_name_at_which_simpleitk_ends_the_process(tmp_path, capsys):
    model, case = model_of(tmp_path), one_image(tmp_path)
    output = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    words = ["feature_maps", "-m", str(model.folder), "-i", case.files[0], "-o", str(output)]
    assert main([*words, "--nifti"]) == 2
    assert "has a name that is no UTF-8; rename it, or its folder" in capsys.readouterr().err and not output.exists()
    assert main(words) == 0 and len(list(output.iterdir())) == 1


class TestModel:
    def test_the_second_stage_of_a_cascade(self, tmp_path):
        write_model(tmp_path / "model")
        change_plans(tmp_path, lambda plans, configuration: configuration.update(previous_stage="2d"))
        model = TrainedModel.read(tmp_path / "model")
        image = one_image(tmp_path)
        for refused in (lambda: layer_names(model, "0"), lambda: feature_maps(model, "0", image)):
            with pytest.raises(ValueError, match="second stage of a cascade"):
                refused()

    @pytest.mark.parametrize("verb", ["feature_maps", "clusterability"])
    def test_it_is_said_before_the_number_of_its_channels(self, tmp_path, capsys, verb):
        """Those that an image lacks are the segmentations', which no file of the case holds."""
        write_model(tmp_path / "model")
        change_plans(tmp_path, lambda plans, configuration: configuration.update(previous_stage="2d"))
        image = Path(one_image(tmp_path).files[0])
        given = image.parent if verb == "clusterability" else image
        assert main([verb, "-m", str(tmp_path / "model"), "-i", str(given), "-o", str(tmp_path / "out")]) != 0
        said = capsys.readouterr()
        assert "second stage of a cascade" in said.err + said.out and "CASE_0001" not in said.err + said.out

    def test_a_fold_that_was_not_read(self, tmp_path):
        with pytest.raises(ValueError, match=r"Fold 3 .* was not read; folds are 0, 1"):
            layer_names(model_of(tmp_path, folds=(0, 1)), "3")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="no GPU for -device cuda"):
            feature_maps(model_of(tmp_path), "0", one_image(tmp_path), device="cuda")
