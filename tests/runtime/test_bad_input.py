"""Bundles that were changed, and images that the model does not take: what is wrong is said, with the file's name."""

from __future__ import annotations

import errno
import gzip
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from nnunet_sauron_runtime import Bundle, engines
from nnunet_sauron_runtime.cases import find_cases
from nnunet_sauron_runtime.manifest import FORMAT
from nnunet_sauron_runtime.prediction import Request, check, predict_folder

from .models import phantom, write_image


@pytest.fixture
def changed(folder, tmp_path):
    """A function that copies the bundle, lets another change bundle.json, and returns the copy."""

    def change(how=lambda said: None) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(folder, copy)
        said = json.loads((copy / "bundle.json").read_text())
        how(said)
        (copy / "bundle.json").write_text(json.dumps(said))
        return copy

    return change


def zipped(folder: Path, file: Path, **more: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
        for name, content in more.items():
            archive.writestr(name, content)
    return file


def test_a_whole_bundle_passes_its_check(folder, tmp_path, capsys):
    check(Bundle(zipped(folder, tmp_path / "b.zip"), threads=1), print)
    assert "1 networks have their checksums" in capsys.readouterr().out


@pytest.mark.parametrize("length", [1e-3, 200.0])
def test_the_check_takes_an_image_of_the_models_own_spacing(changed, length):
    def how(said):
        said["stages"][0]["spacing"] = [length] * len(said["stages"][0]["spacing"])

    lines = []
    check(Bundle(changed(how), threads=1), lines.append)
    assert lines[-1].startswith("a built-in image of")


def test_what_a_mac_adds_to_a_zip_is_passed_over(folder, tmp_path):
    names = {"__MACOSX/._bundle.json": b"x", ".DS_Store": b"x", "._fold_0.onnx": b"x"}
    check(Bundle(zipped(folder, tmp_path / "b.zip", **names), threads=1), print)


def test_a_changed_network_is_refused_by_name(changed):
    copy = changed()
    content = bytearray((copy / "fold_0.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "fold_0.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"fold_0\.onnx is not the file that was exported"):
        _ = Bundle(copy).networks
    write_image(copy.parent / "images/a_0000.nii.gz", VOLUME)
    with pytest.raises(ValueError, match=r"fold_0\.onnx is not the file that was exported"):
        predict_folder(Bundle(copy), copy.parent / "images", Request(copy.parent / "out"))


@pytest.mark.parametrize("left", [0, 100, 5000])
def test_a_zip_cut_short_is_refused_by_name(folder, tmp_path, left):
    whole = zipped(folder, tmp_path / "b.zip")
    whole.write_bytes(whole.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"b\.zip is no zip, or was cut short"):
        Bundle(whole)


@pytest.mark.parametrize("name", ["../out.onnx", "/tmp/out.onnx", "a/b.onnx", "..", "a\\b.onnx", ".hidden.onnx"])
def test_names_that_lead_out_of_a_zip_are_refused(folder, tmp_path, name):
    with pytest.raises(
        ValueError, match=r"as no bundle does; nothing of it was read\. If you zipped a folder, zip the"
    ):
        Bundle(zipped(folder, tmp_path / "b.zip", **{name: b"x"}))


def test_a_file_that_nobody_lists_is_refused_and_one_that_is_there_twice(folder, tmp_path):
    with pytest.raises(ValueError, match=r"other\.onnx, which bundle\.json does not list"):
        Bundle(zipped(folder, tmp_path / "a.zip", **{"other.onnx": b"x"}))
    with pytest.warns(UserWarning, match="Duplicate name"), pytest.raises(ValueError, match="twice"):
        Bundle(zipped(folder, tmp_path / "b.zip", **{"bundle.json": b"{}"}))


def test_a_size_that_differs_is_refused_before_anything_is_unpacked(changed, tmp_path, monkeypatch):
    copy = changed(lambda said: said["files"]["fold_0.onnx"].update(bytes=100))
    file = zipped(copy, tmp_path / "b.zip")
    opened = []
    monkeypatch.setattr(zipfile.ZipFile, "open", _recording(zipfile.ZipFile.open, opened))
    with pytest.raises(ValueError, match=r"fold_0\.onnx has \d+ bytes, bundle\.json says 100"):
        Bundle(file)
    assert opened == ["bundle.json"]


def _recording(function, names: list):
    def record(archive, name, *arguments, **options):
        names.append(getattr(name, "filename", name))
        return function(archive, name, *arguments, **options)

    return record


def remove(key):
    return lambda said: said.pop(key)


def set_in_stage(**values):
    return lambda said: said["stages"][0].update(values)


def test_a_newer_format_is_refused(changed):
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}, this runtime reads format {FORMAT}: install a newer"):
        Bundle(changed(lambda said: said.update(format=FORMAT + 1)))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        *(
            (remove(key), f"lacks {key}")
            for key in ("format", "labels", "stages", "files", "channel_names", "precision")
        ),
        (lambda said: said["stages"][0].pop("patch_size"), r"lacks stages\[0\]\.patch_size"),
        (lambda said: said["stages"][0].pop("mirror_axes"), r"lacks stages\[0\]\.mirror_axes"),
        (set_in_stage(patch_size=[16, -1, 16]), r"patch_size is \[16, -1, 16\]"),
        (set_in_stage(patch_size=[10**6, 10**6, 10**6]), "patch_size"),
        (set_in_stage(patch_size="16"), "patch_size is '16'"),
        (set_in_stage(patch_size=[]), "patch_size"),
        (set_in_stage(spacing=[0, 1, 1]), "spacing"),
        (set_in_stage(spacing=[True, 1, 1]), "spacing"),
        (set_in_stage(transpose_forward=[0, 0, 1]), "transpose_forward"),
        (set_in_stage(transpose_forward=[1, 2, 0]), "inverse of transpose_forward"),
        (set_in_stage(step=0), "step"),
        (set_in_stage(step=1e-9), "step"),
        (set_in_stage(mirror_axes=[3]), "mirror_axes"),
        (set_in_stage(mirror_axes=[0] * 40), "mirror_axes"),
        (lambda said: said.update(channel_names={"0": None}), "channel_names"),
        (lambda said: said.update(card=7), "card is 7"),
        (set_in_stage(outputs=7), r"outputs is 7, expected: 3"),
        (set_in_stage(normalization=[]), "normalization is '0 channels'"),
        (set_in_stage(networks=[]), "networks"),
        (set_in_stage(networks=["other.onnx"]), r"other\.onnx', expected: a file that `files` lists"),
        (set_in_stage(networks=["../../etc/passwd"]), "expected: a file that `files` lists"),
        (set_in_stage(resampling_data={"function": "resample_torch_fornnunet"}), "resampling_data.function"),
        (set_in_stage(previous_stage_labels=[1]), "previous_stage_labels"),
        (lambda said: said["files"].update({"../x.onnx": said["files"]["fold_0.onnx"]}), "lists the file"),
        (lambda said: said["files"]["fold_0.onnx"].update(bytes=2**40), "bytes"),
        (lambda said: said["files"].update(gone=said["files"]["fold_0.onnx"]), "lists the file 'gone'"),
        (lambda said: said["files"].update({"gone.onnx": said["files"]["fold_0.onnx"]}), r"lacks gone\.onnx"),
        (lambda said: said["stages"][0]["normalization"][0].update(scheme="os.system"), "scheme is 'os.system'"),
        (lambda said: said.update(labels={"background": 0, "tumour": 2}), "labels"),
        (lambda said: said.update(labels=[1, 2]), "labels is"),
        (lambda said: said.update(image_reader="Tiff3DIO"), "image_reader is 'Tiff3DIO'"),
        (lambda said: said.update(file_ending="/../x"), "file_ending"),
        (lambda said: said.update(format="1"), "format is '1'"),
        (lambda said: said.update(stages=[]), "stages is '0 stages'"),
        (lambda said: said.update(stages=[None]), r"stages\[0\] is None"),
    ],
)
def test_what_bundle_json_lacks_or_has_wrong_is_named(changed, how, says):
    with pytest.raises(ValueError, match=says):
        Bundle(changed(how))


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"format": NaN}', "\xff"])
def test_a_damaged_bundle_json_is_named(changed, text):
    copy = changed()
    (copy / "bundle.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"bundle\.json"):
        Bundle(copy)


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there; give a bundle"):
        Bundle(tmp_path / "missing.zip")
    with pytest.raises(ValueError, match=r"has no bundle\.json"):
        Bundle(tmp_path)


def test_a_network_with_weights_elsewhere_is_refused():
    for key in (b"\n\x08location", b"\n\x88\x00location", b"\x8a\x00\x08location"):
        with pytest.raises(ValueError, match=r"a\.onnx keeps weights in a file of its own"):
            engines.load_network("openvino", b"\x08\x08" + key + b"\x12\x0b/etc/passwd", "a.onnx")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_too_little_memory_is_said_as_such_and_not_called_damage(folder, tmp_path, capsys, monkeypatch, engine):
    write_image(tmp_path / "images/a_0000.nii.gz", VOLUME)
    for error in (MemoryError(), RuntimeError("Exception from core.cpp:1: std::bad_alloc"),
                  RuntimeError("Failed to allocate memory for requested buffer")):  # fmt: skip
        full = _raising(error)
        monkeypatch.setitem(engines._ENGINES, engine, lambda *_, full=full: full)
        assert predict_folder(Bundle(folder, engine=engine), tmp_path / "images", Request(tmp_path / "out")) == ["a"]
        assert re.search(r"a_0000.nii.gz: there is not enough memory .*give --max-memory", capsys.readouterr().err)
        monkeypatch.setitem(engines._ENGINES, engine, full)
        with pytest.raises(MemoryError, match=r"memory to load .*fold_0\.onnx in .*; the bundle is whole"):
            _ = Bundle(folder, engine=engine).networks


def _raising(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (MemoryError(), MemoryError, "too little memory to read"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError, "too little memory to read"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            OSError,
            r"Permission denied\. Mend that \(chmod u\+r FILE",
        ),
        (OSError(errno.EIO, "Input/output error"), OSError, r"Input/output error\. Mend that; the bundle may well be"),
    ],
)
def test_what_is_no_damage_is_not_called_so(folder, tmp_path, monkeypatch, packed, error, kind, says):
    path = zipped(folder, tmp_path / "b.zip") if packed else folder
    bundle = Bundle(path)
    monkeypatch.setattr(Path, "open", _raising(error))
    monkeypatch.setattr(zipfile, "ZipFile", _raising(error))
    for read in (lambda: Bundle(path), lambda: bundle.networks):
        with pytest.raises(kind, match=says) as raised:
            read()
        assert str(path) in str(raised.value) and "anew" not in str(raised.value)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_what_is_no_network_is_named(engine):
    with pytest.raises(
        ValueError, match=f"{engine} cannot load b.zip: a.onnx|b.zip: a.onnx cannot be loaded by {engine}"
    ):
        engines.load_network(engine, b"nothing", "b.zip: a.onnx")


def test_an_engine_that_is_unknown_or_not_installed(folder, monkeypatch):
    with pytest.raises(ValueError, match="no engine 'tensorrt'; choose one of onnxruntime, openvino"):
        Bundle(folder, engine="tensorrt")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime, or take the one that is: --engine openvino"):
        Bundle(folder, engine="onnxruntime")


CLOSE_TWO_BUNDLES = """
import os, signal, sys
from nnunet_sauron_runtime import Bundle
first = Bundle(sys.argv[1]).networks
second = Bundle(sys.argv[1]).networks
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("received"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals on Windows")
def test_a_signal_is_received_after_two_bundles_were_closed(folder):
    """Two cores of OpenVINO, the older one deleted first, leave the signal handlers without a stack."""
    done = subprocess.run([sys.executable, "-c", CLOSE_TWO_BUNDLES, folder], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "received\n"), done.stderr


VOLUME = phantom((8, 9, 10))


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def unpacked_and_cut(file: Path) -> None:
    content = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(content[: len(content) // 2]))


def write_second_channel(file: Path) -> None:
    write_image(file.with_name("bad_0001.nii.gz"), VOLUME)


BAD = {
    "cut short": (VOLUME, cut_short, "cut short"),
    "packed, but its content cut short": (VOLUME, unpacked_and_cut, "cut short"),
    "empty": (VOLUME, lambda file: file.write_bytes(b""), r"is empty \(0 bytes\)"),
    "no image": (VOLUME, lambda file: file.write_text("hello"), "cannot be read"),
    "not a number": (np.where(VOLUME.mean() < VOLUME, np.nan, VOLUME), None, "infinite or not numbers"),
    "infinite": (np.where(VOLUME.mean() < VOLUME, np.inf, VOLUME), None, "infinite or not numbers"),
    "2D": (VOLUME[0], None, "2D image"),
    "4D": (np.stack([VOLUME, VOLUME]), None, "4 axes"),
    "two channels": (VOLUME, write_second_channel, "2 channels; the model takes bad_0000.nii.gz"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_and_the_others_go_on(folder, tmp_path, capsys, kind):
    array, spoil, says = BAD[kind]
    images = tmp_path / "images"
    for name in ("a", "z"):
        write_image(images / f"{name}_0000.nii.gz", VOLUME)
    bad = images / "bad_0000.nii.gz"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array, isVector=False), str(bad))
    if spoil is not None:
        spoil(bad)
    failed = predict_folder(Bundle(folder, threads=1), images, Request(tmp_path / "out", mirroring=False))
    assert failed == ["bad"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.nii.gz", "z.nii.gz"]
    line = next(line for line in capsys.readouterr().err.splitlines() if "FAILED" in line)
    assert "bad_0000.nii.gz" in line
    assert re.search(says, line), line


def test_a_folder_without_images_says_what_it_looked_for(folder, tmp_path):
    manifest = Bundle(folder).manifest
    with pytest.raises(FileNotFoundError, match=r"no images named as nnU-Net has them, such as CASE_0000\.nii\.gz"):
        find_cases(tmp_path, manifest)
    write_image(tmp_path / "scan.nii.gz", VOLUME)
    write_image(tmp_path / "._a_0000.nii.gz", VOLUME)
    with pytest.raises(FileNotFoundError, match=r"it holds \._a_0000\.nii\.gz, scan\.nii\.gz"):
        find_cases(tmp_path, manifest)
    assert [case.name for case in find_cases(tmp_path / "scan.nii.gz", manifest)] == ["scan"]
    with pytest.raises(FileNotFoundError, match="is not there"):
        find_cases(tmp_path / "missing", manifest)


def test_an_output_that_cannot_be_written_is_refused_before_any_work(folder, tmp_path):
    write_image(tmp_path / "images/a_0000.nii.gz", VOLUME)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file; give the name of a folder"):
        predict_folder(Bundle(folder), tmp_path / "images", Request(tmp_path / "file"))
    with pytest.raises(OSError, match="cannot be written"):
        predict_folder(Bundle(folder), tmp_path / "images", Request(tmp_path / "file/below"))


def test_an_image_is_not_replaced_by_its_segmentation(folder, tmp_path, capsys):
    file = write_image(tmp_path / "scan.nii.gz", VOLUME)
    before = file.read_bytes()
    assert predict_folder(Bundle(folder), file, Request(tmp_path)) == ["scan"]
    assert "would be replaced" in capsys.readouterr().err and file.read_bytes() == before


def test_files_in_memory_or_beside_give_the_same(folder, tmp_path):
    image = SimpleITK.GetImageFromArray(phantom((20, 21, 22)))
    alike = [
        SimpleITK.GetArrayFromImage(Bundle(folder, threads=1, max_memory=limit).predict(image, mirroring=False))
        for limit in (None, 1e-6)
    ]
    np.testing.assert_array_equal(*alike)
    assert len(np.unique(alike[0])) > 1


def test_probabilities_are_those_of_the_segmentation(folder, tmp_path):
    write_image(tmp_path / "images/a_0000.nii.gz", VOLUME, (1.0, 1.4, 2.0))
    request = Request(tmp_path / "out", save_probabilities=True)
    assert predict_folder(Bundle(folder, threads=1), tmp_path / "images", request) == []
    chances = np.load(tmp_path / "out/a.npz")["probabilities"]
    np.testing.assert_allclose(chances.sum(0), 1, rtol=1e-5)
    found = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "out/a.nii.gz")))
    assert np.count_nonzero(chances.argmax(0) != found) < 1e-3 * found.size


def test_a_network_that_is_not_what_the_bundle_says_fails_on_its_case_alone(changed, tmp_path, capsys):
    copy = changed(lambda said: (said["stages"][0].update(outputs=4), said["labels"].update(other=3)))
    write_image(tmp_path / "images/a_0000.nii.gz", VOLUME)
    assert predict_folder(Bundle(copy, threads=1), tmp_path / "images", Request(tmp_path / "out")) == ["a"]
    assert "logits of shape (1, 3, 16, 16, 16), the bundle says (1, 4, 16, 16, 16)" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_that_fails_on_a_case_is_named(changed, tmp_path, capsys, engine):
    copy = changed(set_in_stage(patch_size=[12, 13, 14]))
    write_image(tmp_path / "images/a_0000.nii.gz", VOLUME)
    bundle = Bundle(copy, engine=engine, threads=1)
    assert predict_folder(bundle, tmp_path / "images", Request(tmp_path / "out")) == ["a"]
    assert f"fold_0.onnx fails in {engine} on tiles of shape (1, 1, 12, 13, 14)" in capsys.readouterr().err


@pytest.mark.parametrize("image", [np.zeros((8, 8, 8)), "a_0000.nii.gz", []])
def test_what_is_no_image_is_refused_in_python(folder, image):
    with pytest.raises(ValueError, match=r"expected a SimpleITK\.Image|no image in the list"):
        Bundle(folder, threads=1).predict(image)
