"""Segmentations of the runtime against those of nnU-Net's own predictor, on the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from nnunet_sauron_runtime import Bundle
from nnunet_sauron_runtime.prediction import Request, predict_folder

from .models import phantom, predict_with_nnunet, write_bundle, write_image, write_model

AT_MOST = 1e-5
FLIPPED = (0, -1, 0, 0, 0, 1, -1, 0, 0)


def assert_agree(ours: Path, theirs: Path) -> None:
    """The same cases, geometry, classes, and labels in all but one voxel of 100,000."""
    files = sorted(file.name for file in theirs.iterdir() if not file.name.endswith((".json", ".pkl", ".npz")))
    assert files and files == sorted(file.name for file in ours.iterdir() if not file.name.endswith(".npz"))
    different = voxels = 0
    for name in files:
        one, other = (SimpleITK.ReadImage(str(folder / name)) for folder in (ours, theirs))
        assert one.GetPixelID() == other.GetPixelID()
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(one, geometry)() == getattr(other, geometry)()
        one, other = map(SimpleITK.GetArrayFromImage, (one, other))
        assert set(np.unique(one)) == set(np.unique(other)) and len(np.unique(other)) > 1
        different, voxels = different + np.count_nonzero(one != other), voxels + one.size
    assert different <= AT_MOST * voxels, f"{different} of {voxels} voxels differ"


def compare(tmp_path: Path, model, images: Path, engine: str = "openvino", **options) -> None:
    predict_with_nnunet(model, images, tmp_path / "theirs", probabilities=options.get("save_probabilities", False))
    bundle = Bundle(write_bundle(tmp_path / "bundle", model), engine=engine, threads=1)
    assert predict_folder(bundle, images, Request(tmp_path / "ours", **options)) == []
    assert_agree(tmp_path / "ours", tmp_path / "theirs")
    for file in (tmp_path / "theirs").glob("*.npz"):
        found, expected = (np.load(folder / file.name)["probabilities"] for folder in (tmp_path / "ours", file.parent))
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, atol=2e-3)  # the last digit of logits in float16


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_volume_of_anisotropic_spacing(tmp_path, engine):
    images = tmp_path / "images"
    write_image(images / "a_0000.nii.gz", phantom((5, 28, 26)), (0.8, 0.9, 4.0), origin=(3, -20, 11.5))
    model = write_model(tmp_path / "model", mirror_axes=(0, 1, 2))
    compare(tmp_path, model, images, engine)


def test_a_volume_with_flipped_and_permuted_axes(tmp_path):
    write_image(tmp_path / "images/a_0000.nii.gz", phantom((30, 25, 40)), (1.2, 0.7, 1.0), FLIPPED, (5, 6, -70))
    model = write_model(tmp_path / "model", plan={"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]})
    compare(tmp_path, model, tmp_path / "images")


@pytest.mark.parametrize("reader", ["SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
def test_readers_that_reorient(tmp_path, reader):
    write_image(tmp_path / "images/a_0000.nii.gz", phantom((20, 25, 40)), (1.2, 0.7, 1.0), FLIPPED, (5, 6, -70))
    model = write_model(tmp_path / "model", plan={"image_reader_writer": reader})
    compare(tmp_path, model, tmp_path / "images")


def test_a_volume_smaller_than_the_patch_with_a_mask(tmp_path):
    volume = phantom((11, 30, 13))
    volume[:, :5], volume[:2], volume[3:6, 10:14, 4:7] = 0, 0, 0
    write_image(tmp_path / "images/a_0000.nii.gz", volume, (1.0, 1.0, 1.5))
    model = write_model(tmp_path / "model", configuration={"use_mask_for_norm": [True]})
    compare(tmp_path, model, tmp_path / "images", save_probabilities=True)


def test_slices_in_two_channels_with_the_scheme_of_ct(tmp_path):
    for channel in range(2):
        write_image(tmp_path / f"images/a_000{channel}.nrrd", phantom((4, 40, 50), channel), (0.6, 1.0, 3.0))
    model = write_model(
        tmp_path / "model", dim=2, mirror_axes=(0, 1),
        configuration={"normalization_schemes": ["CTNormalization", "RescaleTo01Normalization"]},
        dataset={"channel_names": {"0": "CT", "1": "rescale_to_0_1"}, "file_ending": ".nrrd"},
    )  # fmt: skip
    compare(tmp_path, model, tmp_path / "images")


@pytest.mark.parametrize(("colours", "bits"), [(1, 8), (3, 8), (1, 16), (3, 16)])
def test_pictures(tmp_path, colours, bits):
    picture = np.clip(np.stack([phantom((40, 60), seed) for seed in range(colours)], -1), 0, 255).astype(np.uint8)
    array = picture if colours > 1 else picture[..., 0]
    if bits == 16:  # which Pillow keeps where it is grey
        array = array.astype(np.uint16) * (257 if colours > 1 else 1)
    (tmp_path / "images").mkdir()
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array, isVector=colours > 1), str(tmp_path / "images/a_0000.png"))
    names = {str(channel): "rgb_to_0_1" for channel in range(colours)}
    model = write_model(
        tmp_path / "model", dim=2, plan={"image_reader_writer": "NaturalImage2DIO"},
        configuration={"normalization_schemes": ["RGBTo01Normalization"] * colours},
        dataset={"channel_names": names, "file_ending": ".png"},
    )  # fmt: skip
    compare(tmp_path, model, tmp_path / "images")


def test_regions(tmp_path):
    write_image(tmp_path / "images/a_0000.mha", phantom((30, 25, 40)), (1.2, 0.7, 1.0))
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    dataset = {"labels": labels, "regions_class_order": [1, 2, 3], "file_ending": ".mha"}
    compare(tmp_path, write_model(tmp_path / "model", dataset=dataset), tmp_path / "images", save_probabilities=True)


def test_two_folds_of_different_widths(tmp_path, monkeypatch):
    from nnunet_sauron.plugin import trainer_folder

    monkeypatch.setenv("nnUNet_extTrainer", str(trainer_folder()))
    write_image(tmp_path / "images/a_0000.nii.gz", phantom((20, 25, 30)), (1.2, 0.7, 1.0))
    model = write_model(tmp_path / "model", widths=[(6, 8, 10), (4, 7, 9)], trainer="SauronTrainer")
    compare(tmp_path, model, tmp_path / "images")


@pytest.mark.parametrize("masked", [False, True])
def test_a_cascade(tmp_path, masked):
    images = tmp_path / "images"
    volume = phantom((24, 40, 36))
    volume[:, :6] = 0
    if masked:  # with corners that the first stage labels, too
        volume[:8, :20] = volume[:, :, 26:] = 0
    write_image(images / "a_0000.nii.gz", volume, (0.8, 0.9, 1.4))
    mask = {"use_mask_for_norm": [masked]}
    low = write_model(tmp_path / "low", name="3d_lowres", configuration={"spacing": [2.0, 1.7, 1.7], **mask})
    high = write_model(tmp_path / "high", configuration={"previous_stage": "3d_lowres", **mask}, seed=3)
    predict_with_nnunet(low, images, tmp_path / "between")
    predict_with_nnunet(high, images, tmp_path / "theirs", previous=tmp_path / "between")
    bundle = Bundle(write_bundle(tmp_path / "bundle", low, high), threads=1)
    assert predict_folder(bundle, images, Request(tmp_path / "ours")) == []
    assert_agree(tmp_path / "ours", tmp_path / "theirs")
