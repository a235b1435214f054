"""What nnU-Net's own search finds of ours, in a real nnU-Net, and what the doctor says of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nnunet_sauron.plugin import (
    Check,
    find_nnunet,
    install,
    planner_names,
    trainer_folder,
    trainer_names,
    uninstall,
)
from nnunet_sauron.plugin.installation import MARKER, PLANNERS, SHIMS, TRAINERS

# Runs for this whole module, since importing PyTorch and every trainer of nnU-Net takes seconds. A line it reads is a
# program and its environment, a line it prints is what the program calls `told`. It forgets the modules that tests put
# there or take away.
WARD = """
import importlib, json, os, sys
for line in sys.stdin:
    program, environment = json.loads(line)
    os.environ.pop("nnUNet_extTrainer", None)
    os.environ.update(environment)
    for name in list(sys.modules):
        if name.endswith((".nnunet_sauron_trainers", ".nnunet_sauron_planners", ".find_objects")):
            del sys.modules[name]
    importlib.invalidate_caches()
    names = {}
    exec(program, names)
    print(json.dumps(names["told"]), flush=True)
"""

EXAMINE = """
from nnunet_sauron.plugin import examine
told = {check.name: [check.ok, check.detail, check.remedy] for check in examine()}
"""

# Where nnU-Net finds its own last classes, and a function of its very last module; whether that search imports our
# package, which is forgotten first; and whether nnU-Net finds ours.
FIND = """
import sys
import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

def find(name, where="training.nnUNetTrainer"):
    return recursive_find_python_class(folder + "/" + where.replace(".", "/"), name, "nnunetv2." + where)

for name in [name for name in sys.modules if name.partition(".")[0] == "nnunet_sauron"]:
    del sys.modules[name]
folder = nnunetv2.__path__[0]
own = [find("nnUNetTrainer_250epochs_NoMirroring")]
for name in ("nnUNetPlannerResEncXL", "nnUNetPlanner_torchres", "entry_point_move_plans_between_datasets"):
    own.append(find(name, "experiment_planning"))
told = {"folder": folder, "own": [one.__module__ for one in own], "imported": "nnunet_sauron" in sys.modules}
import nnunet_sauron.planning.planners
import nnunet_sauron.trainers
told["trainer"] = find("SauronTrainer") is nnunet_sauron.trainers.SauronTrainer
told["planner"] = find("LUnet16Planner", "experiment_planning") is nnunet_sauron.planning.planners.LUnet16Planner
"""

Ask = Callable[..., dict]
Examine = Callable[..., dict[str, Check]]


@pytest.fixture(scope="module")
def copied_nnunet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole nnU-Net to install into: the tests must not touch the real one, nor depend on what is installed there."""
    copy = tmp_path_factory.mktemp("site-packages") / "nnunetv2"
    shims = [f"{Path(shim.file).stem}.*" for shim in SHIMS]  # and what Python compiled of them
    shutil.copytree(find_nnunet(), copy, ignore=shutil.ignore_patterns(*shims))
    return copy


@pytest.fixture(scope="module")
def ask(copied_nnunet: Path) -> Iterator[Ask]:
    """Runs a program in a Python whose nnU-Net is the copy."""
    search = os.pathsep.join([str(copied_nnunet.parent), str(trainer_folder().parents[2])])
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    ) as process:

        def ask(program: str, **environment: str) -> dict:
            process.stdin.write(json.dumps([program, environment]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.kill()  # to end by itself takes it more than a second


@pytest.fixture(scope="module")
def examine_copy(ask: Ask) -> Examine:
    """`examine` in a Python whose nnU-Net is the copy."""
    return lambda **environment: {name: Check(name, *rest) for name, rest in ask(EXAMINE, **environment).items()}


@pytest.fixture
def nnunet(copied_nnunet: Path) -> Iterator[Path]:
    """The copy, with whatever shim a test puts there taken out again."""
    yield copied_nnunet
    uninstall(copied_nnunet)


def test_real_nnunet_finds_ours_last_and_its_own_as_before(ask: Ask, nnunet: Path) -> None:
    def files() -> set[str]:
        return {str(path.relative_to(nnunet)) for path in nnunet.rglob("*") if "__pycache__" not in path.parts}

    before = files()
    install(nnunet)
    found = ask(FIND)
    assert found["folder"] == str(nnunet)
    assert len(found["own"]) == 4 and all(module.startswith("nnunetv2.") for module in found["own"])
    assert not found["imported"], "the search for a class of nnU-Net's own imported our package"
    assert found["trainer"] and found["planner"]
    uninstall(nnunet)
    assert files() == before
    assert not [*nnunet.rglob("*sauron*")]


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
