from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nnunet_sauron.plugin import (
    Check,
    examine,
    print_checks,
    trainer_names,
)


@pytest.fixture
def without_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the search for trainers fail at once, which saves time in tests of other checks."""
    monkeypatch.setitem(sys.modules, "nnunet_sauron.trainers", None)


def found_here() -> dict[str, Check]:
    return {check.name: check for check in examine()}


@pytest.mark.usefixtures("without_trainers")
def test_trainers_that_cannot_be_imported_are_said_to_be_so() -> None:
    checks = found_here()
    for name in trainer_names():
        assert checks[name].ok is False
        assert checks[name].detail.startswith("nnU-Net's search for trainers stops at ModuleNotFoundError")


@pytest.mark.usefixtures("without_trainers")
def test_pytorch_that_does_not_import_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert found_here()["CUDA"].ok is False


@pytest.mark.usefixtures("without_trainers")
def test_the_runtime_as_a_distribution_of_its_own_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nnunet-sauron-runtime" not in found_here()
    metadata = tmp_path / "nnunet_sauron_runtime-0.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: nnunet-sauron-runtime\nVersion: 0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    check = found_here()["nnunet-sauron-runtime"]
    assert check.ok is None and "holds the same files" in check.detail and "pip uninstall" in check.remedy


@pytest.mark.usefixtures("without_trainers")
@pytest.mark.parametrize(("requirement", "ok"), [(">=99.1", False), (">=2.0", True)])
def test_nnunet_older_than_our_metadata_asks_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requirement: str, ok: bool
) -> None:
    metadata = tmp_path / "nnunet_sauron-0.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(
        f"Metadata-Version: 2.1\nName: nnunet-sauron\nVersion: 0.0\nRequires-Dist: nnunetv2{requirement}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check = found_here()["nnunetv2"]
    assert check.ok is ok
    assert f"supported: {requirement}" in check.detail
    assert ("pip install --upgrade 'nnunetv2>=99.1'" in check.remedy) is not ok


@pytest.mark.usefixtures("without_trainers")
def test_unset_folders_stop_training_but_not_for_raw_data(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    checks = found_here()
    assert checks["nnUNet_raw"].ok is None
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        assert checks[name].ok is False
        assert f"export {name}=" in checks[name].remedy


@pytest.mark.usefixtures("without_trainers")
def test_folders_that_are_there_and_writable_are_fine_and_stay_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    checks = found_here()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert checks[name] == Check(name, True, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_trainers")
def test_results_folder_that_cannot_be_written_stops_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        # The superuser writes in spite of the mode, so the attempt has to fail as on a disk mounted read-only.
        def read_only(*args: object, **kwargs: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    checks = found_here()
    assert checks["nnUNet_results"].ok is False
    assert f"{tmp_path} cannot be written" in checks["nnUNet_results"].detail
    # Training only reads what is preprocessed, which may well be shared and protected.
    assert checks["nnUNet_preprocessed"].ok is None


@pytest.mark.usefixtures("without_trainers")
def test_folder_that_does_not_exist_yet_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # nnU-Net makes it when it first writes.
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    check = found_here()["nnUNet_results"]
    assert check.ok is None
    assert check.detail == f"{tmp_path / 'results'} does not exist yet"
    assert f"mkdir -p {shlex.quote(str(tmp_path / 'results'))}" in check.remedy


@pytest.mark.usefixtures("without_trainers")
@pytest.mark.parametrize("name", ["nnUNet_preprocessed", "nnUNet_results"])
def test_file_in_place_of_a_folder_stops_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, str(tmp_path / "file"))
    check = found_here()[name]
    assert check.ok is False
    assert check.detail == f"{tmp_path / 'file'} is not a folder"


def test_remedies_are_printed_whole_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    remedy = "Run: " + "a_very_long_command " * 10 + "[with brackets]"
    print_checks(
        [Check("one", False, "found", remedy), Check("other", False, "found", remedy), Check("fine", True, "yes")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert f"one, other: {remedy}" in lines
    assert lines[-1] == "Training is not possible yet: one, other."


def test_json_says_whether_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Check("a", None, "1"), Check("b", False, "2", "3")
    print_checks([good, bad], json_output=True)
    assert json.loads(capsys.readouterr().out) == {
        "ok": False,
        "checks": [
            {"name": "a", "ok": None, "detail": "1", "remedy": ""},
            {"name": "b", "ok": False, "detail": "2", "remedy": "3"},
        ],
    }
    print_checks([good], json_output=True)
    assert json.loads(capsys.readouterr().out)["ok"] is True


@pytest.mark.parametrize(
    ("variable", "value", "check", "said"),
    [
        ("nnUNet_sauron", "num_epochs=3", "settings (nnunet_sauron)", "nnUNet_sauron is not read: it is spelled"),
        ("nnunet_sauron", "num_epochs=x", "settings (nnunet_sauron)", "num_epochs must be a whole number"),
        ("nnunet_sauron", "num_epochs", "settings (nnunet_sauron)", "'num_epochs' is not a setting of"),
        ("nnunet_sauron", "target_macs=2", "settings (nnunet_sauron)", "target_macs must be the fraction that stays"),
        ("nnunet_sauron", "target_macs=0.2,foo=3", "settings (nnunet_sauron)", "'foo=3' is not a setting of"),
        ("nnunet_sauron", "@/not/there.json", "settings (nnunet_sauron)", "'/not/there.json', which is not there"),
        ("nnUNet_def_n_proc", "abc", "nnUNet_def_n_proc", "'abc' is no whole number"),
        ("nnUNet_n_proc_DA", "1.5", "nnUNet_n_proc_DA", "'1.5' is no whole number"),
        ("nnUNet_n_proc_DA", "-1", "nnUNet_n_proc_DA", "-1 is below 0"),
        ("nnUNet_def_n_proc", "0", "nnUNet_def_n_proc", "0 is below 1"),
        ("nnUNet_results", "~/results", "nnUNet_results", "~/results, whose ~ nnU-Net takes for a name"),
    ],
)
def test_a_variable_that_stops_every_training_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, check: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("nnunet_sauron.plugin.doctor._classes", lambda *_, **__: ())
    found = found_here()[check]
    assert found.ok is False and said in found.detail and found.remedy
    monkeypatch.delenv(variable)
    assert found_here()["settings (nnunet_sauron)"].ok is None


def test_no_processes_are_enough_for_training_alone(monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr("nnunet_sauron.plugin.doctor._classes", lambda *_, **__: ())
    found = found_here()["nnUNet_n_proc_DA"]
    assert found.ok is None and "planning stops at it" in found.detail


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("nnUNet_def_n_proc", "abc", "Mend what the error tells of"),
        ("MPLBACKEND", "of another environment", "unset MPLBACKEND"),
    ],
)
def test_a_file_of_others_is_not_to_be_removed_for_a_variables_value(variable: str, value: str, remedy: str) -> None:
    command = [sys.executable, "-m", "nnunet_sauron.cli", "doctor", "--json"]
    environment = {**os.environ, variable: value}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    checks = {check["name"]: check for check in json.loads(said.stdout)["checks"]}
    assert remedy in checks["SauronTrainer"]["remedy"] and checks["SauronTrainer"]["ok"] is False
    assert checks["settings (nnunet_sauron)"]["ok"] is None  # that variable is not at fault
    assert not any("remove the file" in check["remedy"] for check in checks.values())
