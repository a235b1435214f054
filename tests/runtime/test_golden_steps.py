"""Each step of the pipeline against nnU-Net's own function, on random input."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunet_sauron_runtime import images, labels, preprocessing, resampling, sliding_window
from nnunet_sauron_runtime.manifest import Normalization
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.normalization import default_normalization_schemes as schemes
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from PIL import Image

DRAW = np.random.default_rng(0)
SPACINGS = [
    # of the image, of the network: finer, coarser, an axis apart by the first, by the second, two axes long
    ([1.0, 0.7, 1.3], [0.8, 0.8, 0.8]),
    ([0.5, 0.5, 0.6], [1.1, 1.0, 1.3]),
    ([5.0, 0.8, 0.9], [4.0, 1.0, 1.0]),
    ([1.0, 4.0, 1.0], [1.0, 1.0, 2.0]),
    ([1.0, 1.2, 1.1], [0.5, 0.5, 2.0]),
    ([4.0, 4.0, 1.0], [2.0, 2.0, 1.0]),
]
SHAPE = (9, 14, 11)


def settings_of(order: int, force: bool | None = None) -> tuple[resampling.Resampling, dict]:
    return resampling.Resampling(order, force), {"order": order, "order_z": 0, "force_separate_z": force}


@pytest.mark.parametrize(("spacing", "wanted"), SPACINGS)
@pytest.mark.parametrize("force", [None, True, False])
def test_an_image_is_resampled_alike(spacing, wanted, force):
    image = DRAW.normal(size=(2, *SHAPE)).astype(np.float32) * 5
    shape = resampling.new_shape(SHAPE, spacing, wanted)
    ours, theirs = settings_of(3, force)
    if force and resampling.Resampling(3, True).axis_apart(spacing, wanted) is None:
        return  # nnU-Net fails on two long axes
    expected = resample_data_or_seg_to_shape(image, shape, spacing, wanted, is_seg=False, **theirs)
    found = resampling.resample_image(image, shape, ours, spacing, wanted)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("spacing", "wanted"), SPACINGS)
def test_logits_are_resampled_alike_slab_by_slab(spacing, wanted):
    logits = (DRAW.normal(size=(2, *SHAPE)) * 5).astype(np.float16)
    shape = resampling.new_shape(SHAPE, spacing, wanted)
    ours, theirs = settings_of(1)
    expected = resample_data_or_seg_to_shape(logits, shape, spacing, wanted, is_seg=False, **theirs)
    slabs = resampling.LogitsInSlabs(logits, shape, ours, spacing, wanted)
    found = np.stack([
        np.concatenate([slabs.slab(label, at, min(at + 2, shape[0])) for at in range(0, shape[0], 2)])
        for label in range(2)
    ])  # fmt: skip
    # The last digit of float16 where doubles, rounded in another order, lie on either side of its half.
    assert np.count_nonzero(found != expected) < 5e-3 * found.size
    np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=1.1e-3, atol=1e-6)


@pytest.mark.parametrize(("spacing", "wanted"), [*SPACINGS, ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])])
def test_a_segmentation_is_resampled_alike_also_where_labels_tie(spacing, wanted):
    segmentation = DRAW.integers(-1, 4, (1, *SHAPE)).astype(np.float32)
    shape = resampling.new_shape(SHAPE, spacing, wanted)
    ours, theirs = settings_of(1)
    expected = resample_data_or_seg_to_shape(segmentation, shape, spacing, wanted, is_seg=True, **theirs)
    found = resampling.resample_segmentation(segmentation[0], shape, ours, spacing, wanted)
    np.testing.assert_array_equal(found, expected[0])


def test_shapes_round_half_to_even():
    for length in range(1, 40):
        arguments = [length] * 3, [1.0, 0.5, 2.5], [2.0, 1.0, 1.0]
        assert resampling.new_shape(*arguments) == tuple(compute_new_shape(*arguments))


@pytest.mark.parametrize("scheme", ["ZScore", "CT", "No", "RescaleTo01", "RGBTo01"])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("content", ["volume", "constant", "zeros"])
def test_a_crop_is_normalised_alike(scheme, with_mask, content):
    volume = np.zeros((12, 13, 14), np.float32)
    if content != "zeros":
        volume[2:9, 3:, :12] = 100
    if content == "volume":
        volume[2:9, 3:, :12] = DRAW.uniform(1, 250, (7, 10, 12))
        volume[4, 6, 7] = 0  # a hole
        volume[2:5, 3:5, :6] = 0  # outside
    data = volume[None].transpose(0, 3, 1, 2)  # nnU-Net's layout in memory after transpose_forward
    expected, outside, box = crop_to_nonzero(data.copy(order="K"), None)
    mask = preprocessing.nonzero_mask(data)
    ours = preprocessing.bounding_box(mask)
    assert [[part.start, part.stop] for part in ours] == box
    np.testing.assert_array_equal(mask[ours], outside[0] >= 0)
    numbers = {"mean": 90.0, "std": 30.0, "percentile_00_5": 5.0, "percentile_99_5": 200.0}
    with np.errstate(invalid="ignore"):
        normalized = getattr(schemes, f"{scheme}Normalization")(with_mask, numbers).run(expected[0], outside[0])
    found = data.copy(order="K")[(slice(None), *ours)][0]
    preprocessing.normalize(found, mask[ours], Normalization(f"{scheme}Normalization", with_mask, **numbers))
    np.testing.assert_array_equal(found, normalized)


@pytest.mark.parametrize("patch", [(16, 16, 16), (40, 56, 40), (192, 160), (20, 320, 256), (5, 7)])
def test_the_gaussian_is_the_same_to_the_bit(patch):
    expected = compute_gaussian(patch, 1 / 8, 10, device=torch.device("cpu")).numpy()
    np.testing.assert_array_equal(sliding_window.gaussian_map(patch), expected)


@pytest.mark.parametrize("step", [0.5, 0.3, 1.0])
def test_tiles_lie_at_the_same_places(step):
    for _ in range(50):
        patch = DRAW.integers(8, 40, 3)
        shape = patch + DRAW.integers(0, 90, 3)
        steps = compute_steps_for_sliding_window(tuple(shape), tuple(patch), step)
        expected = [
            tuple(slice(start, start + length) for start, length in zip(corner, patch, strict=True))
            for corner in itertools.product(*steps)
        ]
        assert sliding_window.tile_places(tuple(shape), tuple(patch), step) == expected


def test_what_is_too_small_is_padded_on_both_sides_the_odd_voxel_after():
    assert sliding_window.pad_widths((5, 10, 20), (8, 10, 16)) == [(1, 2), (0, 0), (0, 0)]
    assert sliding_window.pad_widths((5, 10, 20), (13, 16)) == [(0, 0), (1, 2), (0, 0)]


@pytest.mark.parametrize("kind", ["grey", "one bit", "palette", "16 bits", "colours and alpha"])
def test_a_picture_is_read_alike(kind, tmp_path):
    colours = DRAW.integers(0, 255, (8, 9, 4)).astype(np.uint8)
    picture = {
        "grey": lambda: Image.fromarray(colours[..., 0]),
        "one bit": lambda: Image.fromarray(colours[..., 0] > 99),
        "palette": lambda: Image.fromarray(colours[..., :3].copy()).quantize(16),
        "16 bits": lambda: Image.fromarray(colours[..., 0].astype(np.uint16) * 200),
        "colours and alpha": lambda: Image.fromarray(colours),
    }[kind]()
    file = tmp_path / "a_0000.png"
    picture.save(file)
    expected, _ = NaturalImage2DIO().read_images([str(file)])
    manifest = SimpleNamespace(
        image_reader="NaturalImage2DIO", channel_names="c" * len(expected), stages=[SimpleNamespace(patch_size=(8, 8))]
    )
    found, spacing = images.to_array(images.read_case([file]), manifest)
    np.testing.assert_array_equal(found, expected)
    assert spacing == (999, 1, 1)


def test_a_region_begins_at_the_same_logit():
    manager = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    logits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    logits = logits[np.isfinite(logits)]
    expected = manager.convert_logits_to_segmentation(np.stack([logits, -np.ones_like(logits)])) == 1
    np.testing.assert_array_equal(logits >= labels.REGION_FROM, expected)
