"""Each fault of a download once: it is named, together with all others, before anything is written."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_sauron.dataset_conversion import acdc

from .trees import AFFINE, SHAPE, convert, pair, write, write_acdc

Fault = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_acdc(tmp_path_factory.mktemp("download") / "ACDC", training=2, testing=0)


@pytest.fixture
def download(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "ACDC"))


def image(root: Path, kind: str = "") -> Path:
    return root / "training" / "patient002" / f"patient002_frame09{kind}.nii.gz"


def mask(root: Path) -> Path:
    return image(root, "_gt")


def changed(file: Path, change: Callable[[np.ndarray], np.ndarray] = lambda voxels: voxels, affine=AFFINE) -> None:
    write(file, change(np.asarray(nibabel.load(file).dataobj)), affine)


def shifted(millimetres: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += millimetres
    return affine


def put(voxels: np.ndarray, value: float, dtype: type = np.float32) -> np.ndarray:
    voxels = voxels.astype(dtype)
    voxels[3, 3, 3] = value
    return voxels


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def unpacked_and_cut(file: Path) -> None:
    """As `.nii`, which ends without a checksum, and of which SimpleITK would make up the rest."""
    plain = file.with_name(file.name.removesuffix(".gz"))
    nibabel.save(nibabel.load(file), plain)
    file.unlink()
    cut(plain, 0.7)


def rescaled(file: Path) -> None:
    """As SimpleITK, and nnU-Net with it, reads it; nibabel sees the same affine as before."""
    stored = nibabel.load(file)
    stored.header.set_zooms((1.0, 1.5, 5.0))
    nibabel.save(stored, file)
    assert np.array_equal(nibabel.load(file).affine, AFFINE)


def sheared(file: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 2] = 1.0
    stored = nibabel.Nifti1Image(np.asarray(nibabel.load(file).dataobj), affine)
    stored.set_sform(affine, 1)
    nibabel.save(stored, file)


FAULTS: dict[str, tuple[Fault, str]] = {
    "no image": (lambda root: image(root).unlink(), "patient002: there is no patient002_frame09.nii.gz"),
    "no segmentation": (lambda root: mask(root).unlink(), "patient002: there is no patient002_frame09_gt.nii.gz"),
    "no Info.cfg": (lambda root: cfg(root).unlink(), "Info.cfg: it cannot be read"),
    "a phase twice": (lambda root: add_line(root, "ES: 7"), "found ED: 1, ES: 9, ES: 7"),
    "one frame for both": (lambda root: cfg(root).write_text("ED: 9\nES: 9\n"), "found ED: 9, ES: 9"),
    "a frame beyond the film": (lambda root: cfg(root).write_text("ED: 1\nES: 31\n"), "frame31.nii.gz, the ES frame"),
    "one phase": (lambda root: cfg(root).write_text("ED: 1\n"), "found ED: 1"),
    "twice": (lambda root: changed_copy(image(root)), "are the same case"),
    "shape": (lambda root: changed(mask(root), lambda voxels: voxels[:-1]), "has the shape (19, 24, 8)"),
    "spacing": (lambda root: changed(mask(root), affine=AFFINE @ np.diag([1.1, 1, 1, 1])), "spacing [1.65, 1.5, 5.0]"),
    "spacing but for the sform": (lambda root: rescaled(mask(root)), "spacing [1.0, 1.5, 5.0]"),
    "origin": (lambda root: changed(mask(root), affine=shifted(1)), "voxels are up to 1 mm apart"),
    "turned": (lambda root: changed(mask(root), affine=np.diag([1.5, 1.5, 5, 1])), "axes RAS) lies elsewhere"),
    "swapped": (lambda root: swap(image(root), mask(root)), "has the values"),
    "a copy of the labels": (lambda root: shutil.copy(mask(root), image(root)), "has no values but the labels'"),
    "the same everywhere": (lambda root: changed(image(root), np.zeros_like), "has the value 0 everywhere"),
    "beyond float32": (
        lambda root: changed(image(root), lambda voxels: put(voxels, 1e39, float)),
        "1 values that are nan",
    ),
    "almost no label": (lambda root: changed(mask(root), lambda voxels: voxels * 1e-5), "no value above 3e-05"),
    "label": (lambda root: changed(mask(root), lambda voxels: put(voxels, 4)), "has the values 4"),
    "negative label": (lambda root: changed(mask(root), lambda voxels: put(voxels, -1)), "has the values -1"),
    "half a label": (lambda root: changed(mask(root), lambda voxels: put(voxels, 1.5)), "such as 1.5"),
    "nan in labels": (lambda root: changed(mask(root), lambda voxels: put(voxels, np.nan)), "such as nan"),
    "empty mask": (lambda root: changed(mask(root), np.zeros_like), "empty (all background)"),
    "nan": (lambda root: changed(image(root), lambda voxels: put(voxels, np.nan)), "1 values that are nan"),
    "infinite": (lambda root: changed(image(root), lambda voxels: put(voxels, -np.inf)), "1 values that are nan"),
    "cut short": (lambda root: cut(image(root), 0.7), "frame09.nii.gz is damaged or was cut short"),
    "label cut short": (lambda root: cut(mask(root), 0.7), "frame09_gt.nii.gz is damaged or was cut short"),
    "nii cut short": (lambda root: unpacked_and_cut(image(root)), "frame09.nii is damaged or was cut short"),
    "no bytes": (lambda root: image(root).write_bytes(b""), "is empty (0 bytes)"),
    "not compressed": (lambda root: unpacked(image(root)), "is not compressed, though its name says otherwise"),
    "compressed": (lambda root: image(root).rename(image(root).with_suffix("")), "is compressed, though its name says"),
    "no NIfTI": (lambda root: image(root).write_text("<html>404</html>" * 50), "is no NIfTI file"),
    "a link to nothing": (lambda root: linked_to_nothing(image(root)), "is a link to a file that is not there"),
    "four axes": (lambda root: write(image(root), np.zeros((*SHAPE, 3), np.int16)), "expected three axes"),
    "two axes": (lambda root: write(image(root), np.zeros(SHAPE[:2], np.int16)), "expected three axes"),
    "complex": (lambda root: write(image(root), pair(0, 3)[0].astype(np.complex64)), "expected one number a voxel"),
    "sheared": (lambda root: sheared(image(root)), "cannot be read by SimpleITK"),
}


def cfg(root: Path) -> Path:
    return image(root).parent / "Info.cfg"


def add_line(root: Path, line: str) -> None:
    cfg(root).write_text(f"{cfg(root).read_text()}{line}\n")


def swap(one: Path, other: Path) -> None:
    for source, target in ((one, "aside"), (other, one.name), (one.with_name("aside"), other.name)):
        source.rename(source.with_name(target))


def changed_copy(file: Path) -> None:
    nibabel.save(nibabel.load(file), file.with_name(file.name.removesuffix(".gz")))


def unpacked(file: Path) -> None:
    file.write_bytes(gzip.decompress(file.read_bytes()))


def linked_to_nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to("gone.nii.gz")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_written(fault: str, download: Path, raw: Path, capsys) -> None:
    do, words = FAULTS[fault]
    do(download)
    assert convert(acdc, download) == 2
    told = capsys.readouterr().err
    assert words in told and "patient002" in told and "patient001" not in told
    assert ("1 problem in" in told or fault == "swapped") and "nothing was written" in told and "--exclude" in told
    assert [*raw.iterdir()] == []
    assert convert(acdc, download, "--exclude", "patient002") == 0
    assert {path.name[:10] for path in (raw / "Dataset027_ACDC/labelsTr").iterdir()} == {"patient001"}


@pytest.mark.parametrize("name", ["training", "ACDC", "patient"])
def test_a_name_of_a_folder_excludes_nothing(name: str, download: Path, raw: Path, capsys) -> None:
    mask(download).unlink()
    assert convert(acdc, download, "--exclude", name) == 2
    told = capsys.readouterr().err
    assert "there is no patient002_frame09_gt.nii.gz" in told
    assert f"--exclude {name}: there is no case and no patient of this name; names are such as patient001 and" in told


def test_a_name_that_is_no_text_is_named_before_simpleitk_aborts_at_it(download: Path, raw: Path, capsys) -> None:
    other = Path(os.fsdecode(bytes(download) + b"\xff"))
    download.rename(other)
    assert convert(acdc, other) == 2
    assert capsys.readouterr().err.count("has a name that is no UTF-8") == 8


def test_all_problems_are_named_at_once(download: Path, raw: Path, capsys) -> None:
    image(download).write_text("<html>404</html>" * 50)
    (download / "training/patient001/Info.cfg").unlink()
    changed(download / "training/patient002/patient002_frame01_gt.nii.gz", lambda voxels: put(voxels, 7)[1:])
    assert convert(acdc, download) == 2
    told = capsys.readouterr().err
    for words in ("4 problems", "is no NIfTI", "Info.cfg: it cannot be read", "has the shape (19,", "has the values 7"):
        assert words in told
    assert [*raw.iterdir()] == []


@pytest.mark.parametrize("given", [".", "nothing", "ACDC/training/patient001/Info.cfg"])
def test_a_source_that_is_none_tells_the_layout(given: str, download: Path, raw: Path, capsys) -> None:
    shutil.rmtree(download / "training" / "patient002")
    (download / "training" / "patient001").rename(download / "training" / "other")
    (download / "training" / "patient001").mkdir()
    source = download.parent / "nowhere" if given == "nothing" else download.parent / given
    assert convert(acdc, source) == 2
    told = capsys.readouterr().err
    assert "no training case" in told or "folders patient001, patient002, ..." in told
    assert [*raw.iterdir()] == []


def test_whole_numbers_stored_as_float_are_taken_and_lie_where_the_image_lies(download: Path, raw: Path) -> None:
    labels = np.asarray(nibabel.load(mask(download)).dataobj)
    write(mask(download), labels.astype(np.float64), shifted(1e-4))
    assert convert(acdc, download) == 0
    written = nibabel.load(raw / "Dataset027_ACDC/labelsTr/patient002_frame09.nii.gz")
    assert written.get_data_dtype() == np.uint8 and np.array_equal(written.dataobj, labels)
    of_image = nibabel.load(raw / "Dataset027_ACDC/imagesTr/patient002_frame09_0000.nii.gz").header
    for field in ("pixdim", "qoffset_x", "srow_x", "srow_y", "srow_z", "qform_code", "sform_code"):
        assert np.array_equal(written.header[field], of_image[field])


def test_empty_masks_can_be_allowed(download: Path, raw: Path, capsys) -> None:
    changed(mask(download), np.zeros_like)
    assert convert(acdc, download, "--allow-empty") == 0
    assert "1 of 4 cases have an empty segmentation" in capsys.readouterr().err


def test_a_folder_with_the_name_of_an_image_is_told_as_that(download: Path, raw: Path, capsys) -> None:
    file = image(download)
    aside = file.rename(file.with_name("aside"))
    file.mkdir()
    aside.rename(file / file.name)
    assert convert(acdc, download) == 2
    told = capsys.readouterr().err
    assert f"{file}: it is a folder with the name of an image file; if that file lies in it, move the file up" in told
