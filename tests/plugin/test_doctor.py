from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nnunet_sauron.plugin import (
    Check,
    examine,
    find_nnunet,
    install,
    planner_names,
    print_checks,
    trainer_folder,
    trainer_names,
    uninstall,
)
from nnunet_sauron.plugin.installation import MARKER, PLANNERS, SHIMS, TRAINERS

# Runs for this whole module, since importing PyTorch and every trainer of nnU-Net takes seconds. A line it reads is an
# environment, a line it prints is what the doctor found. It forgets the modules that tests put there or take away.
WARD = """
import importlib, json, os, sys
from nnunet_sauron.plugin import examine
for line in sys.stdin:
    os.environ.pop("nnUNet_extTrainer", None)
    os.environ.update(json.loads(line))
    for name in list(sys.modules):
        if name.endswith((".nnunet_sauron_trainers", ".nnunet_sauron_planners", ".find_objects")):
            del sys.modules[name]
    importlib.invalidate_caches()
    print(json.dumps({check.name: [check.ok, check.detail, check.remedy] for check in examine()}), flush=True)
"""

Examine = Callable[..., dict[str, Check]]


@pytest.fixture(scope="module")
def copied_nnunet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole nnU-Net to install into: the tests must not touch the real one, nor depend on what is installed there."""
    copy = tmp_path_factory.mktemp("site-packages") / "nnunetv2"
    shutil.copytree(find_nnunet(), copy, ignore=shutil.ignore_patterns("__pycache__", *(shim.file for shim in SHIMS)))
    return copy


@pytest.fixture(scope="module")
def examine_copy(copied_nnunet: Path) -> Iterator[Examine]:
    """`examine` in a Python whose nnU-Net is the copy."""
    search = os.pathsep.join([str(copied_nnunet.parent), str(trainer_folder().parents[2])])
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    ) as process:

        def ask(**environment: str) -> dict[str, Check]:
            process.stdin.write(json.dumps(environment) + "\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            return {name: Check(name, *rest) for name, rest in found.items()}

        yield ask
        process.stdin.close()


@pytest.fixture
def nnunet(copied_nnunet: Path) -> Iterator[Path]:
    """The copy, with whatever shim a test puts there taken out again."""
    yield copied_nnunet
    uninstall(copied_nnunet)


@pytest.fixture
def without_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the search for trainers fail at once, which saves time in tests of other checks."""
    monkeypatch.setitem(sys.modules, "nnunet_sauron.trainers", None)


def found_here() -> dict[str, Check]:
    return {check.name: check for check in examine()}


def test_trainers_are_found_through_the_environment_variable(examine_copy: Examine) -> None:
    checks = examine_copy(nnUNet_extTrainer=str(trainer_folder()))
    for name in trainer_names():
        assert checks[name] == Check(name, True, "found through nnUNet_extTrainer")


def test_trainers_are_found_through_the_installed_shim(examine_copy: Examine, nnunet: Path) -> None:
    install(nnunet)
    checks = examine_copy()
    for name in trainer_names():
        assert checks[name] == Check(name, True, "found through the installed shim")


def test_planners_are_found_once_they_are_installed(examine_copy: Examine, nnunet: Path) -> None:
    install(nnunet)
    checks = examine_copy()
    for name in planner_names():
        assert checks[name] == Check(name, True, "found through the installed shim")


def test_planners_that_are_not_installed_are_a_note(examine_copy: Examine) -> None:
    checks = examine_copy(nnUNet_extTrainer=str(trainer_folder()))
    assert checks["SauronTrainer"].ok is True
    for name in planner_names():
        assert (checks[name].ok, checks[name].detail) == (None, "not found, its shim is not installed")
        assert checks[name].remedy.endswith("run: nnUNetv2_sauron install")


def test_planner_shim_of_another_version_is_to_be_updated(examine_copy: Examine, nnunet: Path) -> None:
    (nnunet / PLANNERS.place / PLANNERS.file).write_text(f"{MARKER}\n")
    planner = examine_copy()["LUnetPlanner"]
    assert (planner.ok, planner.remedy) == (None, "Run: nnUNetv2_sauron install")
    assert "another version" in planner.detail


def test_another_planner_of_the_same_name_is_located(examine_copy: Examine, nnunet: Path) -> None:
    install(nnunet)
    theirs = nnunet / "experiment_planning" / "theirs.py"
    theirs.write_text("class LUnetPlanner: ...\n")
    try:
        checks = examine_copy()
    finally:
        theirs.unlink()
    assert checks["LUnetPlanner"].ok is None
    assert f"another class of this name first, in {theirs}" in checks["LUnetPlanner"].detail
    assert checks["LUnet8Planner"].ok is True


def test_module_that_breaks_the_search_for_planners_is_named(examine_copy: Examine, nnunet: Path) -> None:
    install(nnunet)
    broken = nnunet / "experiment_planning" / "broken.py"
    broken.write_text("raise ValueError('half of a module')\n")
    try:
        planner = examine_copy()["LUnetPlanner"]
    finally:
        broken.unlink()
    assert planner.ok is None
    assert f"ValueError: half of a module (in {broken}, line 1)" in planner.detail
    assert planner.remedy.startswith("Repair or remove the file")


def test_without_shim_and_variable_both_ways_are_offered(examine_copy: Examine) -> None:
    sauron = examine_copy()["SauronTrainer"]
    assert sauron.ok is False
    assert sauron.detail == "no shim is installed in nnU-Net's folder, and nnUNet_extTrainer is not set"
    assert "nnUNetv2_sauron install" in sauron.remedy
    assert 'export nnUNet_extTrainer="$(nnUNetv2_sauron path)"' in sauron.remedy


def test_folder_of_somebody_elses_trainers_is_kept_beside_ours(examine_copy: Examine, tmp_path: Path) -> None:
    sauron = examine_copy(nnUNet_extTrainer=str(tmp_path))["SauronTrainer"]
    assert sauron.ok is False
    assert f"nnUNet_extTrainer={tmp_path} lacks {TRAINERS.file}" in sauron.detail
    assert f"$(nnUNetv2_sauron path){os.pathsep}$nnUNet_extTrainer" in sauron.remedy


def test_folder_that_does_not_exist_is_named(examine_copy: Examine, tmp_path: Path) -> None:
    sauron = examine_copy(nnUNet_extTrainer=str(tmp_path / "gone"))["SauronTrainer"]
    assert sauron.ok is False
    assert f"{tmp_path / 'gone'} does not exist" in sauron.detail


def test_another_class_of_the_same_name_is_located(examine_copy: Examine, tmp_path: Path) -> None:
    theirs = tmp_path / "their_trainers.py"
    theirs.write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class SauronTrainer(nnUNetTrainer): ...\n"
    )
    checks = examine_copy(nnUNet_extTrainer=f"{tmp_path}{os.pathsep}{trainer_folder()}")
    assert checks["SauronTrainer"].ok is False
    assert "another class" in checks["SauronTrainer"].detail
    assert "their_trainers" in checks["SauronTrainer"].detail
    assert checks["StockTrainer"].ok is True


@pytest.mark.parametrize(
    ("source", "detail", "remedy"),
    [
        ("raise ValueError('half of\\na module')", "ValueError: half of a module", "Repair or remove the file"),
        ("import a_missing_dependency", "No module named 'a_missing_dependency'", "Install .* a_missing_dependency"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision::nms", "torch .*do not fit"),
        ("class Trainer(:", "SyntaxError: ", "Repair or remove the file"),
        ("import sys; sys.exit('usage: ...')", "SystemExit: usage: ...", "Repair or remove the file"),
    ],
)
def test_module_that_breaks_the_search_is_named_with_its_line(
    examine_copy: Examine, tmp_path: Path, source: str, detail: str, remedy: str
) -> None:
    (tmp_path / "broken.py").write_text("'''Some trainer.'''\n" + source)
    checks = examine_copy(nnUNet_extTrainer=f"{tmp_path}{os.pathsep}{trainer_folder()}")
    for name in trainer_names():
        assert checks[name].ok is False
        assert detail in checks[name].detail
        assert f"{tmp_path / 'broken.py'}, line 2" in checks[name].detail
        assert re.search(remedy, checks[name].remedy)


def test_shim_of_another_version_is_to_be_updated(examine_copy: Examine, nnunet: Path) -> None:
    (nnunet / TRAINERS.place / TRAINERS.file).write_text(f"{MARKER}\n")
    checks = examine_copy()
    assert checks["SauronTrainer"].ok is False
    assert "another version" in checks["SauronTrainer"].detail
    assert checks["SauronTrainer"].remedy == "Run: nnUNetv2_sauron install"


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
