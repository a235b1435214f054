"""Files that are damaged, lie in each other's way, or cannot be written whole."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from nnunet_sauron_runtime import Bundle
from nnunet_sauron_runtime.archive import Archive
from nnunet_sauron_runtime.images import read_case, to_array
from nnunet_sauron_runtime.images import write_image as write_segmentation
from nnunet_sauron_runtime.prediction import Request, predict_folder
from nnunet_sauron_runtime.sliding_window import predict_logits

from ..full_disk import full_disk
from .models import phantom, write_image

VOLUME = phantom((8, 9, 10))


def packed(file):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOLUME), str(file), True)
    return file


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_packed_voxels_are_compared_with_their_checksum(tmp_path, ending):
    file = packed(tmp_path / f"a{ending}")
    read_case([file])
    whole = file.read_bytes()
    for place in (-2, -700, -1500):
        changed = bytearray(whole)
        changed[place] ^= 255
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=f"a{ending} is damaged or was cut short"):
            read_case([file])
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"a{ending} is damaged or was cut short"):
        read_case([file])


def test_voxels_that_are_not_packed_or_in_a_file_of_their_own_are_read(tmp_path):
    for ending in (".mha", ".nrrd"):
        write_image(tmp_path / f"a{ending}", VOLUME)
        read_case([tmp_path / f"a{ending}"])
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOLUME), str(tmp_path / "b.nhdr"), True)
    (tmp_path / "b.nhdr").rename(tmp_path / "b.nrrd")
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(*read_case([tmp_path / "b.nrrd"])), VOLUME)


@pytest.mark.parametrize("start", [0, -50, 300])
def test_a_header_is_not_taken_for_voxels(tmp_path, start):
    file = write_image(tmp_path / "a.nii.gz", VOLUME)
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[108:112] = struct.pack("<f", start)
    content[300:304] = struct.pack("<f", np.nan)
    file.write_bytes(gzip.compress(content))
    assert len(read_case([file])) == 1


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_bytes_behind_the_voxels_are_not_judged(tmp_path, pack):
    content = gzip.decompress(write_image(tmp_path / "a.nii.gz", VOLUME.astype(np.float32)).read_bytes())
    file = tmp_path / f"b.nii{'.gz' * (pack is gzip.compress)}"
    file.write_bytes(pack(content + b"\xff" * 8))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(*read_case([file])), VOLUME)
    file.write_bytes(pack(content[:-4] + b"\xff" * 12))
    with pytest.raises(ValueError, match="1 of its values are infinite or not numbers"):
        read_case([file])


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_segmentation_that_cannot_be_written_whole_leaves_nothing(tmp_path, ending):
    segmentation = SimpleITK.GetImageFromArray(np.random.default_rng(0).integers(0, 3, (40, 40, 40)).astype(np.uint8))
    with (
        full_disk(),
        pytest.raises(OSError, match=rf"a{ending} could not be written.* Make room, or choose another -o"),
    ):
        write_segmentation(segmentation, tmp_path / f"a{ending}")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_the_temporary_folder_has_no_room_for_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bundle = Bundle(folder, threads=1, max_memory=1e-6)
    _ = bundle.networks
    with full_disk(), pytest.raises(OSError, match=f"{tmp_path} has no room for .* name another folder in TMPDIR"):
        bundle.predict(SimpleITK.GetImageFromArray(VOLUME), mirroring=False)
    seen = []
    bundle.predict(
        SimpleITK.GetImageFromArray(VOLUME), mirroring=False, on_tile=lambda *_: seen.extend(tmp_path.iterdir())
    )
    assert seen == []  # so that a process that is killed leaves no gigabytes behind


@pytest.mark.filterwarnings("ignore:overflow")
def test_steps_with_which_sums_overflow_are_named():
    networks = [lambda tiles: np.full((len(tiles), 2, *tiles.shape[2:]), 30, np.float32)]
    data = np.zeros((1, 24, 24, 24), np.float32)
    assert np.isfinite(predict_logits(data, networks, (16, 16, 16), 2, step=0.5)).all()
    with pytest.raises(ValueError, match=r"16 bits.* or tiles, 0\.05 of a patch apart, overlap too often"):
        predict_logits(data, networks, (16, 16, 16), 2, step=0.05)


@pytest.mark.parametrize(("threads", "memory", "expected"), [(8, None, 8), (8, 0.4, 3), (2, 0.4, 2), (8, 0.01, 1)])
def test_fewer_threads_resample_in_little_memory(folder, threads, memory, expected):
    assert Bundle(folder, threads=threads, max_memory=memory)._resampling_threads() == expected
    assert 1 <= Bundle(folder)._resampling_threads() <= os.cpu_count()


def predict(bundle, images, output, **options) -> list[str]:
    return predict_folder(Bundle(bundle, threads=1), images, Request(output, mirroring=False, **options))


@pytest.mark.parametrize("ending", [".nii.gz", ".npz"])
def test_an_output_that_has_no_room_is_named_and_no_image(folder, tmp_path, capsys, ending):
    images, output = tmp_path / "images", tmp_path / "out"
    write_image(images / "a_0000.nii.gz", VOLUME)
    bundle = Bundle(folder, threads=1)
    _ = bundle.networks
    request = Request(output, mirroring=False, save_probabilities=ending == ".npz")
    with full_disk(50):
        assert predict_folder(bundle, images, request) == ["a"]
    error = capsys.readouterr().err
    assert f"FAILED: {output}/a{ending} could not be written" in error and "Make room, or choose another -o" in error
    assert "a_0000" not in error and not list(output.iterdir())


def test_what_a_killed_process_leaves_is_no_case_and_goes_after_an_hour(folder, tmp_path):
    write_image(tmp_path / "images/a_0000.nii.gz", VOLUME)
    code = f"""
import os
from pathlib import Path
from nnunet_sauron_runtime.bundle import Bundle
from nnunet_sauron_runtime.prediction import Request, predict_folder
os.replace = lambda *_: os._exit(9)
predict_folder(Bundle(Path({str(folder)!r}), threads=1), Path("images"), Request(Path("out"), mirroring=False))
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    output = tmp_path / "out"
    (left,) = output.iterdir()
    assert killed.returncode == 9 and left.is_dir() and left.name.startswith(".")  # where nnU-Net looks for no case
    assert predict(folder, tmp_path / "images", output) == []
    assert left.is_dir() and (output / "a.nii.gz").is_file()  # another process may be writing there
    os.utime(left, (0, 0))
    assert predict(folder, tmp_path / "images", output) == []
    assert [path.name for path in output.iterdir()] == ["a.nii.gz"]


def test_a_year_that_is_read_as_a_channel_is_told(folder, tmp_path, capsys):
    write_image(tmp_path / "scan_2024.nii.gz", VOLUME)
    assert predict(folder, tmp_path / "scan_2024.nii.gz", tmp_path / "out") == ["scan"]
    assert "2024 in its name is read as a channel's number: rename it scan_2024_0000.nii.gz" in capsys.readouterr().err
    (tmp_path / "scan_2024.nii.gz").rename(tmp_path / "scan_2024_0000.nii.gz")
    assert predict(folder, tmp_path / "scan_2024_0000.nii.gz", tmp_path / "out") == []


def test_no_image_of_any_case_is_replaced(folder, tmp_path, capsys):
    for name in ("a_0000", "a_0000_0000"):
        write_image(tmp_path / f"{name}.nii.gz", VOLUME)
    before = (tmp_path / "a_0000.nii.gz").read_bytes()
    assert predict(folder, tmp_path, tmp_path) == ["a_0000"]
    assert "a_0000.nii.gz is an image and would be replaced" in capsys.readouterr().err
    assert (tmp_path / "a_0000.nii.gz").read_bytes() == before and (tmp_path / "a.nii.gz").is_file()


def test_images_that_are_passed_over_are_named(folder, tmp_path, capsys):
    for name in ("a_0000.nii.gz", "scan.nii.gz"):
        write_image(tmp_path / name, VOLUME)
    shutil.copy(tmp_path / "scan.nii.gz", tmp_path / "B_0000.NII.GZ")
    (tmp_path / "notes.txt").touch()
    assert predict(folder, tmp_path, tmp_path) == []
    told = "Skipped, not named like CASE_0000.nii.gz: B_0000.NII.GZ, scan.nii.gz\n"
    assert told in capsys.readouterr().err
    (tmp_path / "scan.nii.gz").unlink()
    (tmp_path / "B_0000.NII.GZ").unlink()
    assert predict(folder, tmp_path, tmp_path) == []
    assert "Skipped" not in capsys.readouterr().err


def test_a_name_that_is_no_text_is_named_before_simpleitk_ends_the_process(folder, tmp_path, capsys):
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is without pytest
    bad = Path(os.fsdecode(b"caf\xe9"))
    write_image(tmp_path / "images/a_0000.nii.gz", VOLUME)
    (write_image(tmp_path / "images/b_0000.nii.gz", VOLUME)).rename(tmp_path / "images" / f"{bad}_0000.nii.gz")
    assert predict(folder, tmp_path / "images", tmp_path / "out") == [str(bad)]
    assert "has a name that is no UTF-8; rename it, or its folder" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.nii.gz"]
    with pytest.raises(ValueError, match="has a name that is no UTF-8; rename it, or its folder"):
        predict(folder, tmp_path / "images/a_0000.nii.gz", tmp_path / bad)
    assert not (tmp_path / bad).exists()


def test_a_case_in_two_formats_is_not_guessed_at(folder, tmp_path, capsys):
    for name in ("a_0000.nii.gz", "a_0000.nii", "b_0000.nii"):
        write_image(tmp_path / "images" / name, VOLUME)
    assert predict(folder, tmp_path / "images", tmp_path / "out") == ["a", "a"]
    assert "a_0000.nii: the case a is there with another ending, too" in capsys.readouterr().err
    assert predict(folder, tmp_path / "images/a_0000.nii", tmp_path / "out") == []


@pytest.mark.parametrize("spacing", [1e3, 1e30, 1e300])
def test_a_spacing_that_no_image_has_is_named(folder, tmp_path, capsys, spacing):
    write_image(tmp_path / "a_0000.mha", VOLUME, (spacing,) * 3)
    assert predict(folder, tmp_path, tmp_path / "out") == ["a"]
    error = capsys.readouterr().err
    assert "a_0000.mha" in error and f"{spacing}" in error and "spacing" in error and "memory" not in error


def test_regions_with_labels_above_255(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    said = json.loads((copy / "bundle.json").read_text())
    said.update(labels={"background": 0, "a": [1, 300], "b": 2, "c": 300}, regions_class_order=[1, 2, 300])
    (copy / "bundle.json").write_text(json.dumps(said))
    found = Bundle(copy, threads=1).predict(SimpleITK.GetImageFromArray(VOLUME), mirroring=False)
    assert 300 in SimpleITK.GetArrayFromImage(found)


def test_a_volume_without_an_orientation_is_refused_where_it_would_be_guessed(folder, tmp_path):
    file = write_image(tmp_path / "a.nii.gz", VOLUME)
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[252:256] = bytes(4)
    file.write_bytes(gzip.compress(content))
    copy = shutil.copytree(folder, tmp_path / "copy")
    for reader, refused in (("SimpleITKIOWithReorient", False), ("NibabelIOWithReorient", True)):
        said = json.loads((copy / "bundle.json").read_text()) | {"image_reader": reader}
        (copy / "bundle.json").write_text(json.dumps(said))
        manifest = Bundle(copy).manifest
        if refused:
            with pytest.raises(ValueError, match="neither qform nor sform"):
                to_array(read_case([file]), manifest)
        else:
            to_array(read_case([file]), manifest)
        with pytest.raises(ValueError, match="it is a 2D image"):
            to_array([SimpleITK.GetImageFromArray(VOLUME[0])], manifest)


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_is_named_however_it_is_packed(folder, tmp_path, how):
    with zipfile.ZipFile(tmp_path / "b.zip", "w", how) as archive:
        archive.write(folder / "bundle.json", "bundle.json")
    content = bytearray((tmp_path / "b.zip").read_bytes())
    for place in range(100, 140):
        content[place] ^= 255
    (tmp_path / "b.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.zip: bundle\.json"):
        Archive(tmp_path / "b.zip").manifest()


def flipped(content: bytearray) -> None:
    content[280:284], content[292:296] = struct.pack("<f", 1), struct.pack("<f", 9)


def moved(content: bytearray) -> None:
    content[292:296] = struct.pack("<f", 30)


def turned(content: bytearray) -> None:
    angle = np.deg2rad(10)
    content[280:288] = struct.pack("<ff", -np.cos(angle), -np.sin(angle))
    content[296:304] = struct.pack("<ff", np.sin(angle), -np.cos(angle))


@pytest.mark.parametrize("change", [flipped, moved, turned])
@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient"])
def test_a_volume_that_lies_in_two_places_is_refused(folder, tmp_path, change, reader):
    """nibabel takes the sform, SimpleITK the qform: programs that align images change one of them."""
    file = write_image(tmp_path / "a.nii", VOLUME)
    manifest = dataclasses.replace(Bundle(folder).manifest, image_reader=reader)
    to_array(read_case([file]), manifest)
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)
    to_array(read_case([file]), manifest)  # of two forms of code 1 SimpleITK takes the sform as well
    content[254] = 2
    file.write_bytes(content)
    with pytest.raises(ValueError, match="qform and sform put it in different places"):
        to_array(read_case([file]), manifest)
    to_array(read_case([file]), dataclasses.replace(manifest, image_reader="SimpleITKIO"))


def png(file: Path, mode: str, **more) -> Path:
    from PIL import Image

    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert(mode).save(file, **more)
    return file


def with_chunk(file: Path, kind: bytes, content: bytes) -> Path:
    whole = file.read_bytes()
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    file.write_bytes(whole[:33] + chunk + whole[33:])  # behind the header
    return file


def test_pngs_whose_values_readers_take_differently_are_refused(tmp_path):
    from PIL import Image

    for mode, kind, content, said in (
        ("RGB", b"sBIT", bytes((5, 8, 8)), "5 of the 8 bits"),
        ("L", b"sBIT", b"\x06", "6 of the 8 bits"),
        ("RGB", b"tRNS", bytes(6), "which of its colours are transparent"),
        ("L", b"tRNS", bytes(2), "which of its colours are transparent"),
    ):
        file = with_chunk(png(tmp_path / "a.png", mode), kind, content)
        with pytest.raises(ValueError, match=said):
            read_case([file])
    read_case([with_chunk(png(tmp_path / "a.png", "RGB"), b"sBIT", bytes((8, 8, 8)))])
    read_case([with_chunk(png(tmp_path / "a.png", "P"), b"sBIT", bytes((8, 8, 8)))])
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "b.png", format="JPEG")
    with pytest.raises(ValueError, match="is a JPEG with the name of a PNG"):
        read_case([tmp_path / "b.png"])
    for kind in (b"sBIT", b"IHDR"):
        with pytest.raises(ValueError, match=f"is damaged: its {kind.decode()} has 0 bytes"):
            read_case([with_chunk(png(tmp_path / "a.png", "L"), kind, b"")])


def test_what_is_continued_is_segmented_anew_where_it_was_cut_short(folder, tmp_path, capsys):
    write_image(tmp_path / "images" / "a_0000.nii.gz", VOLUME)
    request = Request(tmp_path / "out", continue_prediction=True, mirroring=False)
    assert predict_folder(Bundle(folder), tmp_path / "images", request) == []
    whole = (tmp_path / "out" / "a.nii.gz").read_bytes()
    (tmp_path / "out" / "a.nii.gz").write_bytes(whole[:100])
    assert predict_folder(Bundle(folder), tmp_path / "images", request) == []
    read_case([tmp_path / "out" / "a.nii.gz"])
    assert "skipped" not in capsys.readouterr().err
    assert predict_folder(Bundle(folder), tmp_path / "images", request) == []
    assert "skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({123: b"\x03"}, "its header tells lengths in micrometres"),
        ({123: b"\x01"}, "its header tells lengths in metres"),
        ({112: struct.pack("<ff", 0, 25)}, "the slope 0 and the intercept 25"),
        ({112: struct.pack("<ff", np.nan, 25)}, "and the intercept 25"),
        ({80: struct.pack("<f", 3)}, r"voxels of \[3.0, 1.0, 1.0\] mm \(pixdim\) and an sform of others"),
    ],
)
def test_a_header_that_readers_take_differently_is_refused(folder, tmp_path, changes, said):
    """Of bundles whose model reads by nibabel; SimpleITK's scale intensities and lengths otherwise."""
    file = write_image(tmp_path / "a.nii", VOLUME)
    content = bytearray(file.read_bytes())
    content[123] = 2  # mm
    file.write_bytes(content)
    manifest = Bundle(folder).manifest
    by_nibabel = dataclasses.replace(manifest, image_reader="NibabelIO")
    to_array(read_case([file]), by_nibabel)
    for place, values in changes.items():
        content[place : place + len(values)] = values
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        to_array(read_case([file]), by_nibabel)
    if 80 in changes or 112 in changes:
        to_array(read_case([file]), manifest)  # as nnU-Net's SimpleITKIO does


def test_nifti_2_is_named_and_not_called_damaged(tmp_path):
    import nibabel

    nibabel.save(nibabel.Nifti2Image(VOLUME, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="is NIfTI-2, which is not read here; convert it to NIfTI-1"):
        read_case([tmp_path / "a.nii.gz"])


def test_bytes_behind_a_packed_volume_are_no_damage(tmp_path):
    """SimpleITK and nibabel read such a file; a whole one must not be called damaged."""
    from nnunet_sauron.model.reading import check_file

    file = write_image(tmp_path / "a.nii.gz", VOLUME)
    whole = file.read_bytes()
    file.write_bytes(whole + b"xx")
    check_file(file)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(*read_case([file])), VOLUME)
    file.write_bytes(gzip.compress(gzip.decompress(whole)[:-100]) + b"xx")
    for check in (check_file, lambda file: read_case([file])):
        with pytest.raises(ValueError, match="was cut short"):
            check(file)


@pytest.mark.parametrize("name", ["a.nii.gz", "A.PNG"])
def test_a_files_name_is_no_folder(folder, tmp_path, name):
    write_image(tmp_path / "images" / "a_0000.nii.gz", VOLUME)
    with pytest.raises(ValueError, match=f"{name} is a file's name; -o takes a folder"):
        predict_folder(Bundle(folder), tmp_path / "images", Request(tmp_path / name))
    assert not (tmp_path / name).exists()
