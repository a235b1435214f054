"""Every reader of nnU-Net, every kind of damage: a ValueError that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage import io

from nnunet_sauron.console.progress import Progress
from nnunet_sauron.model.cases import Case, check_cases, find_cases, read_case
from nnunet_sauron.model.reading import read_image, read_segmentation
from nnunet_sauron.model.trained import TrainedModel

from ..compression.small_model import write_model

FORMATS = [
    (SimpleITKIO, ".nii.gz"), (SimpleITKIO, ".nrrd"), (SimpleITKIO, ".mha"), (SimpleITKIO, ".gipl"),
    (NibabelIO, ".nii.gz"), (NibabelIO, ".nii"), (NibabelIOWithReorient, ".nii.gz"), (NaturalImage2DIO, ".png"),
    (NaturalImage2DIO, ".bmp"), (NaturalImage2DIO, ".tif"), (Tiff3DIO, ".tif"), (Tiff3DIO, ".tiff"),
]  # fmt: skip
every_format = pytest.mark.parametrize(("reader", "ending"), FORMATS)
FLOATS = [
    (reader, ending) for reader, ending in FORMATS
    if ending not in (".png", ".bmp") and (reader, ending) != (SimpleITKIO, ".nii.gz")
]  # fmt: skip


def voxels(reader, dtype=np.float32) -> np.ndarray:
    shape = (20, 24) if reader is NaturalImage2DIO else (6, 20, 24)
    return np.random.default_rng(0).integers(1, 200, shape).astype(dtype)


def write(reader, path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if reader is SimpleITKIO:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))
    elif reader in (NibabelIO, NibabelIOWithReorient):
        nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)
    elif reader is Tiff3DIO or path.suffix == ".tif":
        tifffile.imwrite(path, array)
    else:
        io.imsave(path, array.astype(np.uint8), check_contrast=False)
    return path


def cut(path: Path, part: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("gone"))


DAMAGE = {
    "cut to a half": lambda path: cut(path, 0.5),
    "cut at its end": lambda path: cut(path, 0.98),
    "text": lambda path: path.write_text("no image at all\n" * 100),
    "short text": lambda path: path.write_text("x"),
    "empty": lambda path: path.write_bytes(b""),
    "folder": as_folder,
    "broken link": as_broken_link,
    "missing": Path.unlink,
}


@every_format
def test_a_whole_file_is_read_as_nnunet_reads_it(tmp_path, reader, ending):
    path = write(reader, tmp_path / f"ca$e [1].x_0000{ending}", voxels(reader))
    image, properties = read_image(reader(), [path])
    expected, expected_properties = reader().read_images([str(path)])
    assert (image == expected).all() and properties["spacing"] == expected_properties["spacing"]
    assert (read_segmentation(reader(), path)[0] == expected[0]).all()


@every_format
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, capfd, reader, ending, damage):
    path = write(reader, tmp_path / f"case_0000{ending}", voxels(reader))
    DAMAGE[damage](path)
    for read in (lambda: read_image(reader(), [path]), lambda: read_segmentation(reader(), path)):
        with pytest.raises(ValueError) as raised:
            read()
        assert str(path) in str(raised.value)
        assert any(words in str(raised.value) for words in ("leave", "Remove", "Put"))
    assert capfd.readouterr().out == ""


def test_voxels_that_begin_behind_the_header_though_it_tells_of_no_offset(tmp_path):
    path = write(NibabelIO, tmp_path / "case_0000.nii", voxels(NibabelIO))
    content = path.read_bytes()
    path.write_bytes(content[:108] + bytes(4) + content[112:348] + content[352:])  # vox_offset: 0
    assert read_image(SimpleITKIO(), [path])[0].shape == (1, 6, 20, 24)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="case_0000.nii is damaged or was cut short"):
        read_image(SimpleITKIO(), [path])


@pytest.mark.parametrize("bits", [0, 8, 64])
def test_the_size_of_a_voxel_is_that_of_its_type(tmp_path, bits):
    path = write(NibabelIO, tmp_path / "case_0000.nii", voxels(NibabelIO, np.int16))
    content = path.read_bytes()
    path.write_bytes(content[:72] + bits.to_bytes(2, "little") + content[74:])
    assert read_image(SimpleITKIO(), [path])[0].shape == (1, 6, 20, 24)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="case_0000.nii is damaged or was cut short"):
        read_image(SimpleITKIO(), [path])


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_channels_in_different_places_are_said_in_one_line_a_case(tmp_path, capsys, reader):
    model = TrainedModel.read(write_model(tmp_path / "model", channels=("T1", "T2"), reader=reader))
    for name in ("a", "b"):
        for channel in range(2):
            image = SimpleITK.GetImageFromArray(voxels(SimpleITKIO))
            image.SetOrigin((0, 0, 7.0 if (name, channel) == ("b", 1) else 0))
            (tmp_path / "images").mkdir(exist_ok=True)
            SimpleITK.WriteImage(image, str(tmp_path / f"images/{name}_{channel:04d}.nii.gz"))
    check_cases(model, find_cases(tmp_path / "images", model), Progress())
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if "WARNING" in line]
    assert "b_0001.nii.gz: nnU-Net's" in line and said.out == ""


@pytest.mark.parametrize("place", ["file", "folder"])
@every_format
def test_a_name_that_is_no_text_is_named_before_simpleitk_ends_the_process(tmp_path, reader, ending, place):
    bad = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    path = bad.with_name(f"{bad.name}_0000{ending}") if place == "file" else bad / f"a_0000{ending}"
    path.parent.mkdir(exist_ok=True)
    write(reader, tmp_path / f"good{ending}", voxels(reader)).rename(path)
    for read in (lambda: read_image(reader(), [path]), lambda: read_segmentation(reader(), path)):
        with pytest.raises(ValueError, match="has a name that is no UTF-8; rename it, or its folder"):
            read()


@pytest.mark.parametrize("metadata", [None, {"axes": "ZYX"}])
def test_slices_lost_at_the_end_of_a_tiff_are_missed(tmp_path, metadata):
    path = tmp_path / "case_0000.tif"
    with tifffile.TiffWriter(path) as file:
        for plane in voxels(Tiff3DIO):
            file.write(plane, contiguous=False, metadata=metadata)
    with tifffile.TiffFile(path) as file:
        fifth = min(file.pages[4].offset, file.pages[4].dataoffsets[0])
    path.write_bytes(path.read_bytes()[:fifth])
    with pytest.raises(ValueError, match="case_0000.tif cannot be read"):
        read_image(Tiff3DIO(), [path])


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = write(NibabelIO, tmp_path / "case_0000.nii.gz", voxels(NibabelIO))
    monkeypatch.setattr(os, "access", lambda file, mode: False)  # tests may run as root, who may read everything
    with pytest.raises(ValueError, match="case_0000.nii.gz must not be read: no permission"):
        read_image(NibabelIO(), [path])


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO, NibabelIOWithReorient, Tiff3DIO])
@pytest.mark.parametrize("axes", [2, 4])
def test_another_number_of_axes_is_named(tmp_path, reader, axes):
    ending = ".tif" if reader is Tiff3DIO else ".nii.gz"
    model = TrainedModel.read(write_model(tmp_path / "model", 3, reader=reader.__name__, ending=ending))
    volume = voxels(reader)
    if axes == 2:
        path = write(reader, tmp_path / "a" / f"c_0000{ending}", volume[0])
    elif reader is SimpleITKIO:
        path = tmp_path / f"c_0000{ending}"
        SimpleITK.WriteImage(SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(volume)] * 2), str(path))
    else:
        path = write(reader, tmp_path / "a" / f"c_0000{ending}", np.stack([volume] * 2))
    with pytest.raises(ValueError, match=rf"{path}"):
        read_case(model, Case("c", (str(path),)))


@pytest.mark.parametrize(("colours", "ending"), [(3, ".png"), (4, ".png"), (None, ".png"), (4, ".tif"), (2, ".tif")])
def test_another_number_of_colours_is_named(tmp_path, colours, ending):
    names = ("gray",) if colours == 3 else ("R", "G", "B")
    model = write_model(tmp_path / "model", 2, channels=names, reader="NaturalImage2DIO", ending=ending)
    array = np.zeros((20, 24, colours) if colours else (20, 24), np.uint8)
    path = tmp_path / f"c_0000{ending}"
    if ending == ".tif":
        tifffile.imwrite(path, array)
    else:
        io.imsave(path, array, check_contrast=False)
    with pytest.raises(ValueError, match=rf"{path}"):
        read_case(TrainedModel.read(model), Case("c", (str(path),)))


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
@pytest.mark.parametrize("shape", [(20, 24, 3), (3, 20, 24, 3)])
def test_voxels_of_several_parts_are_named(tmp_path, ending, shape):
    path = tmp_path / f"c{ending}"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.ones(shape, np.uint8), isVector=True), str(path))
    with pytest.raises(ValueError, match=rf"{path}.*several parts"):
        read_image(SimpleITKIO(), [path])


@pytest.mark.parametrize("slices", [1, 3, 4])
def test_few_slices_of_a_tiff_are_no_colours(tmp_path, slices):
    tifffile.imwrite(tmp_path / "c.tif", np.ones((slices, 20, 24), np.uint8))
    assert read_segmentation(Tiff3DIO(), tmp_path / "c.tif")[0].shape == (slices, 20, 24)


def test_a_colour_tiff_is_no_volume(tmp_path):
    tifffile.imwrite(tmp_path / "c_0000.tif", np.ones((20, 24, 3), np.uint8))
    with pytest.raises(ValueError, match=r"c_0000.tif is a colour image"):
        read_image(Tiff3DIO(), [tmp_path / "c_0000.tif"])


@pytest.mark.parametrize(("reader", "ending"), FLOATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, reader, ending, value):
    dim = 2 if reader is NaturalImage2DIO else 3
    model = TrainedModel.read(write_model(tmp_path / "model", dim, reader=reader.__name__, ending=ending))
    array = voxels(reader)
    array[(0,) * array.ndim] = value
    path = write(reader, tmp_path / f"c_0000{ending}", array)
    with pytest.raises(ValueError, match=rf"Case c has voxels that are not finite: 1 .*{path}"):
        read_case(model, Case("c", (str(path),)))


def test_nan_that_nnunet_reads_as_0_is_said(tmp_path, capsys):
    model = TrainedModel.read(write_model(tmp_path / "model", 3))
    array = voxels(SimpleITKIO)
    array[0, 0, :2] = np.nan, np.inf
    path = write(SimpleITKIO, tmp_path / "c_0000.nii.gz", array)
    check_cases(model, [Case("c", (str(path),))], Progress())
    assert f"{path} has 2 values that are nan or infinite: nnU-Net reads them as 0" in capsys.readouterr().err


def test_a_spacing_that_nnunet_assumes_is_said(tmp_path, capsys):
    model = TrainedModel.read(write_model(tmp_path / "model", 3, reader="Tiff3DIO", ending=".tif"))
    cases = [Case(name, (str(write(Tiff3DIO, tmp_path / f"{name}_0000.tif", voxels(Tiff3DIO))),)) for name in "ab"]
    (tmp_path / "a.json").write_text('{"spacing": [2, 0.5, 0.5]}')
    (tmp_path / "b.json").unlink(missing_ok=True)
    check_cases(model, cases, Progress())
    said = capsys.readouterr().err
    assert f"{tmp_path / 'b.json'} is not there: nnU-Net takes the voxels of b for 1 mm long" in said
    assert "a.json" not in said


@pytest.mark.parametrize("spacing", ["[1, 1]", "[0, 1, 1]", '["a", 1, 1]', "[1, 1", "{}"])
def test_the_spacing_beside_a_tiff_is_checked(tmp_path, spacing):
    path = write(Tiff3DIO, tmp_path / "c_0000.tif", voxels(Tiff3DIO))
    (tmp_path / "c.json").write_text(f'{{"spacing": {spacing}}}')
    with pytest.raises(ValueError, match=rf"{path} cannot be read"):
        read_image(Tiff3DIO(), [path])


def test_all_images_that_cannot_be_used_are_named_at_once(tmp_path):
    model = TrainedModel.read(write_model(tmp_path / "model", 3))
    for name in "abcd":
        write(SimpleITKIO, tmp_path / "images" / f"{name}_0000.nii.gz", voxels(SimpleITKIO))
    (tmp_path / "images" / "._a_0000.nii.gz").write_text("of macOS")
    cases = find_cases(tmp_path / "images", model)
    assert [case.name for case in cases] == ["a", "b", "c", "d"]
    check_cases(model, cases, Progress(quiet=True))
    cut(Path(cases[1].files[0]), 0.6)
    Path(cases[3].files[0]).write_text("text")
    with pytest.raises(ValueError, match=r"2 of 4 cases.*b_0000.nii.gz is damaged or was cut short(.|\n)*d_0000"):
        check_cases(model, cases, Progress(quiet=True))


@pytest.mark.parametrize("change", ["shape", "spacing", "value", "damage"])
def test_references_are_checked_with_the_images(tmp_path, change):
    model = TrainedModel.read(write_model(tmp_path / "model", 3))
    write(SimpleITKIO, tmp_path / "images" / "a_0000.nii.gz", voxels(SimpleITKIO))
    labels = np.zeros((6, 20, 24 + (change == "shape")), np.uint8)
    labels[0, 0, 0] = 255 if change == "value" else 1
    image = SimpleITK.GetImageFromArray(labels)
    if change == "spacing":
        image.SetSpacing((1.0, 1.0, 3.0))
    path = tmp_path / "a.nii.gz"
    SimpleITK.WriteImage(image, str(path))
    if change == "damage":
        cut(path, 0.5)
    with pytest.raises(ValueError, match=rf"{path}"):
        check_cases(model, find_cases(tmp_path / "images", model), Progress(quiet=True), {"a": path})
