"""Model folders and checkpoints that something is wrong with."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import sys
import types
import zipfile

import pytest
import torch

from nnunet_sauron.cli import main
from nnunet_sauron.model.checkpoints import DamagedFileError, load, read_checkpoint
from nnunet_sauron.model.trained import TrainedModel

from ..compression.small_model import write_images, write_model


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch):
    monkeypatch.setenv("nnunet_sauron_debug", "0")


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "a b" / "modèle [1].d" / "checkpoint_final.pth"
    path.parent.mkdir(parents=True)
    torch.save({"network_weights": {"a": torch.rand(1000)}, "epoch": 1}, path)
    return path


def foreign(path, monkeypatch, module="somebodys_trainer", attribute=True):
    """A whole checkpoint that holds an object of a module which is not there."""
    made = types.ModuleType(module)
    made.Thing = type("Thing", (), {"__module__": module})
    monkeypatch.setitem(sys.modules, module, made)
    torch.save({**load(path), "thing": made.Thing()}, path)
    if attribute:
        del made.Thing
    else:
        monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_missing_module_is_named_and_nothing_is_to_be_deleted(checkpoint, monkeypatch, legacy):
    if legacy:
        torch.save(load(checkpoint), checkpoint, _use_new_zipfile_serialization=False)
    foreign(checkpoint, monkeypatch, attribute=False)
    with pytest.raises(ValueError, match=r"is whole, .*The module somebodys_trainer is missing: install") as raised:
        read_checkpoint(checkpoint)
    assert not isinstance(raised.value, DamagedFileError)
    assert str(checkpoint) in str(raised.value)
    assert not any(word in str(raised.value).lower() for word in ("delete", "truncated", "damaged"))


def test_a_missing_attribute_is_named(checkpoint, monkeypatch):
    foreign(checkpoint, monkeypatch)
    with pytest.raises(ValueError, match=r"is whole, .*Thing.*somebodys_trainer.*install the version"):
        read_checkpoint(checkpoint)


def test_another_numpy_is_named(checkpoint, monkeypatch):
    error = ModuleNotFoundError("No module named 'numpy._core'", name="numpy._core")
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match=r"is whole, .*NumPy 2 or later.*pip install 'numpy>=2'"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_too_little_memory_is_said_as_such(checkpoint, monkeypatch, error, capsys):
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(MemoryError, match=r"too little memory to read .*checkpoint_final.pth .*not damaged"):
        read_checkpoint(checkpoint)
    assert main(["densify", str(checkpoint), "-o", str(checkpoint.with_name("new.pth"))]) == 2
    assert "too little memory" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_no_permission_is_said_as_such(checkpoint, monkeypatch, number):
    error = OSError(number, "words of the system")
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match=r"checkpoint_final.pth cannot be opened: words of the system") as raised:
        read_checkpoint(checkpoint)
    assert "elete" not in str(raised.value)


def test_what_cannot_be_unpickled_is_whole(checkpoint, monkeypatch):
    error = pickle.UnpicklingError("of another version")
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match=r"is whole, but cannot be unpickled here .*of another version.* Keep it"):
        read_checkpoint(checkpoint)


DAMAGE = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "cut at its end": lambda whole: whole[:-10],
    "empty": lambda whole: b"",
    "text": lambda whole: b"content that begins like a pickle\nof a module\n",
    "pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_damage(checkpoint, damage):
    checkpoint.write_bytes(DAMAGE[damage](checkpoint.read_bytes()))
    with pytest.raises(DamagedFileError, match=r"checkpoint_final.pth cannot be read: truncated") as raised:
        read_checkpoint(checkpoint)
    assert ("Delete it" in str(raised.value)) == (damage in ("cut", "cut at its end", "empty"))


def test_another_zip_is_no_checkpoint_and_not_to_be_deleted(checkpoint):
    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("nnUNetTrainer__nnUNetPlans__2d/plans.json", "{}")
    with pytest.raises(DamagedFileError, match="no PyTorch checkpoint .*Move it away"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "verb", ["compress", "report", "benchmark", "feature_maps", "clusterability", "plan", "densify"]
)
def test_every_verb_names_the_missing_module(tmp_path, monkeypatch, capsys, verb):
    folder = write_model(tmp_path / "model")
    path = folder / "fold_0" / "checkpoint_final.pth"
    foreign(path, monkeypatch, attribute=False)
    images = write_images(tmp_path / "images", 1)
    out = str(tmp_path / "out")
    (tmp_path / "preprocessed" / "Dataset001_Random").mkdir(parents=True)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    words = {
        "compress": ["-m", str(folder), "-i", str(images), "-o", out, "--macs", "0.5"],
        "report": [str(folder), "-o", out],
        "benchmark": ["-m", str(folder)],
        "feature_maps": ["-m", str(folder), "-i", str(images / "case_0_0000.nii.gz"), "-o", out],
        "clusterability": ["-m", str(folder), "-i", str(images), "-o", out],
        "plan": ["-d", "1", "--widths-from", str(path)],
        "densify": [str(path), "-o", out],
    }
    assert main([verb, *words[verb]]) == 2
    said = capsys.readouterr().err
    assert "The module somebodys_trainer is missing" in said and "elete" not in said
    assert path.is_file()


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    folder = write_model(tmp_path / "model", folds=(0, 1))
    for name in ("._plans.json", "._dataset.json", "._fold_0", "fold_0/._checkpoint_final.pth"):
        (folder / name).write_text("of macOS")
    assert list(TrainedModel.read(folder).checkpoints) == ["0", "1"]


@pytest.mark.parametrize("name", ["mod el.v2.1 [a] $x$ 模型", "ä'\"&<b>"])
def test_a_folder_may_have_any_name_and_be_linked(tmp_path, name):
    folder = write_model(tmp_path / name)
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        model = TrainedModel.read(path)
        assert model.network("0") is not None and model.input_channels == 1
    shutil.move(folder / "fold_0", tmp_path / "elsewhere")
    (folder / "fold_0").symlink_to(tmp_path / "elsewhere")
    assert list(TrainedModel.read(folder).checkpoints) == ["0"]


@pytest.mark.parametrize("architecture", ["plain", "resenc"])
def test_plans_of_nnunets_older_versions(tmp_path, capsys, architecture):
    folder = write_model(tmp_path / "model", architecture=architecture, widths=(4, 8, 16))
    plans = json.loads((folder / "plans.json").read_text())
    (configuration,) = plans["configurations"].values()
    architecture = configuration.pop("architecture")
    arguments = architecture["arch_kwargs"]
    configuration.update(
        UNet_class_name=architecture["network_class_name"].rpartition(".")[2],
        UNet_base_num_features=arguments["features_per_stage"][0],
        unet_max_num_features=arguments["features_per_stage"][-1],
        n_conv_per_stage_encoder=arguments.get("n_conv_per_stage") or arguments["n_blocks_per_stage"],
        n_conv_per_stage_decoder=arguments["n_conv_per_stage_decoder"],
        pool_op_kernel_sizes=arguments["strides"],
        conv_kernel_sizes=arguments["kernel_sizes"],
        num_pool_per_axis=[2, 2],
    )
    (folder / "plans.json").write_text(json.dumps(plans))
    model = TrainedModel.read(folder)
    assert model.network("0") and model.segmentations.values == {0, 1, 2}
    assert main(["report", str(folder), "-o", str(tmp_path / "report"), "--timing", "0"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_plans_without_a_patch_size_are_those_of_no_model(tmp_path):
    folder = write_model(tmp_path / "model")
    plans = json.loads((folder / "plans.json").read_text())
    del plans["configurations"]["2d"]["patch_size"]
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ValueError, match=r"plans\.json .*patch_size.* Copy them anew"):
        TrainedModel.read(folder)


def test_an_error_of_somebody_else_is_no_traceback(tmp_path, monkeypatch, capsys):
    folder = write_model(tmp_path / "model")
    for error, said in (
        (AssertionError("of nnU-Net"), "AssertionError: of nnU-Net"),
        (RuntimeError(), "RuntimeError ("),
    ):
        monkeypatch.setattr(TrainedModel, "network", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert main(["benchmark", "-m", str(folder)]) == 2
        captured = capsys.readouterr().err
        assert said in captured and "Traceback" not in captured


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("trainer_name", "does not name its trainer"),
        ("init_args", "no 'init_args'"),
        ("plans", "'init_args' without plans"),
        ("configuration", "'init_args' without configuration"),
    ],
)
def test_what_a_checkpoint_does_not_tell_is_said_and_the_other_models_are_reported(tmp_path, capsys, key, said):
    good, other = write_model(tmp_path / "good"), write_model(tmp_path / "other")
    path = other / "fold_0" / "checkpoint_final.pth"
    checkpoint = load(path)
    del (checkpoint if key in checkpoint else checkpoint["init_args"])[key]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=rf"{path} .*{said}"):
        TrainedModel.read(other)
    assert main(["report", str(good), str(other), "-o", str(tmp_path / "out"), "--timing", "0", "--json"]) == 1
    (problem,) = [one for one in json.loads(capsys.readouterr().out)["problems"] if said in one]
    assert str(path) in problem


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    folder = write_model(tmp_path / "model")
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = load(path)
    checkpoint["network_weights"]["decoder.stages.0.convs.0.conv.bias"][1] = value
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=rf"{path} has weights that are nan or infinite .*decoder.stages.0.convs.0"):
        TrainedModel.read(folder).network("0")


@pytest.mark.parametrize("name", ["../fold_1/checkpoint_final.pth", "/checkpoint_final.pth", "."])
def test_a_checkpoints_name_is_no_path(tmp_path, name):
    with pytest.raises(ValueError, match=r"-chk .* is no file name"):
        TrainedModel.read(write_model(tmp_path / "model", folds=(0, 1)), ["0"], name)


@pytest.mark.parametrize("weights", [[1], None])
def test_weights_that_are_no_dictionary_are_no_checkpoint(tmp_path, weights):
    torch.save({"network_weights": weights}, tmp_path / "a.pth")
    with pytest.raises(DamagedFileError, match=r"a.pth is no checkpoint of nnU-Net"):
        read_checkpoint(tmp_path / "a.pth")


def test_densify_names_plans_whose_network_cannot_be_built(tmp_path, capsys):
    path = write_model(tmp_path / "model") / "fold_0" / "checkpoint_final.pth"
    for plans in ({}, {"configurations": {"2d": {"architecture": {}}}}):
        checkpoint = load(path)
        checkpoint["init_args"]["plans"] = plans
        torch.save(checkpoint, tmp_path / "other.pth")
        assert main(["densify", str(tmp_path / "other.pth"), "-o", str(tmp_path / "new.pth")]) == 2
        assert f"{tmp_path / 'other.pth'}: its plans' network cannot be built" in capsys.readouterr().err


def test_densify_names_a_place_that_is_not_there(tmp_path, capsys):
    path = write_model(tmp_path / "model") / "fold_0" / "checkpoint_final.pth"
    assert main(["densify", str(path), "-o", str(tmp_path / "none" / "new.pth")]) == 2
    assert f"{tmp_path / 'none'} is no folder; make it first" in capsys.readouterr().err


def test_a_bundle_is_no_checkpoint_and_told_as_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "small.zip", "w") as archive:
        archive.writestr("bundle.json", "{}")
    with pytest.raises(ValueError, match="small.zip is a bundle for machines without PyTorch"):
        read_checkpoint(tmp_path / "small.zip")


def test_a_checkpoint_that_is_not_there_beside_the_final_one(tmp_path):
    folder = write_model(tmp_path / "model")
    with pytest.raises(FileNotFoundError) as error:
        TrainedModel.read(folder, None, "checkpoint_best.pth")
    assert str(error.value).endswith("Read another one with -chk checkpoint_final.pth.")
