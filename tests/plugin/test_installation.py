from __future__ import annotations

import errno
import os
import pkgutil
import py_compile
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nnunet_sauron.plugin import (
    install,
    planner_names,
    shim_state,
    trainer_names,
    uninstall,
)
from nnunet_sauron.plugin.installation import MARKER, PLANNERS, SHIMS, TRAINERS, Shim


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    """As much of nnU-Net's package folder as an installation touches."""
    folder = tmp_path / "nnunetv2"
    for shim, module in ((TRAINERS, "nnUNetTrainer_Xepochs.py"), (PLANNERS, "move_plans_between_datasets.py")):
        (folder / shim.place).mkdir(parents=True)
        (folder / shim.place / "__init__.py").touch(mode=0o644)
        (folder / shim.place / module).write_text("")
    (folder / "paths.py").write_text("nnUNet_extTrainer = None\n")
    return folder


def installed(nnunet: Path, shim: Shim) -> Path:
    return nnunet / shim.place / shim.file


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refuse_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        # The superuser writes in spite of the mode, so for this user the first write has to fail the way it would fail
        # in an installation mounted read-only.
        def read_only(*args: object, **kwargs: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(tempfile, "mkstemp", read_only)


def test_install_adds_two_files_as_readable_as_nnunets_own(nnunet: Path) -> None:
    before = tree(nnunet)
    paths = install(nnunet)
    assert paths == [installed(nnunet, TRAINERS), installed(nnunet, PLANNERS)]
    added = {str(installed(nnunet, shim).relative_to(nnunet)): shim.source.read_bytes() for shim in SHIMS}
    assert tree(nnunet) == {**before, **added}
    for path in paths:
        assert path.stat().st_mode == (path.parent / "__init__.py").stat().st_mode


def test_second_install_writes_nothing(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [path.stat() for path in install(nnunet)]
    for shim in SHIMS:
        refuse_writing(nnunet / shim.place, monkeypatch)
    again = [path.stat() for path in install(nnunet)]
    assert [(s.st_ino, s.st_mtime_ns) for s in again] == [(s.st_ino, s.st_mtime_ns) for s in written]


@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.kind)
def test_install_updates_the_shim_of_another_version(nnunet: Path, shim: Shim) -> None:
    install(nnunet)
    installed(nnunet, shim).write_text(f"{MARKER}\n# what an earlier version wrote\n")
    assert [shim_state(nnunet, one) for one in SHIMS] == ["outdated" if one is shim else "current" for one in SHIMS]
    install(nnunet)
    assert [shim_state(nnunet, one) for one in SHIMS] == ["current", "current"]


def test_install_adds_the_planners_where_only_the_trainers_are(nnunet: Path) -> None:
    install(nnunet)
    installed(nnunet, PLANNERS).unlink()
    assert [shim_state(nnunet, shim) for shim in SHIMS] == ["current", "absent"]
    install(nnunet)
    assert [shim_state(nnunet, shim) for shim in SHIMS] == ["current", "current"]


@pytest.mark.parametrize("kind", ["file", "folder", "link to nowhere"])
@pytest.mark.parametrize("act", [install, uninstall])
@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.kind)
def test_what_is_not_ours_is_refused_by_name_and_left_alone(nnunet: Path, kind: str, act: object, shim: Shim) -> None:
    theirs = installed(nnunet, shim)
    if kind == "file":
        theirs.write_text("class SauronTrainer: ...\n")
        py_compile.compile(str(theirs))
    elif kind == "folder":
        (theirs / "inside").mkdir(parents=True)
    else:
        theirs.symlink_to(nnunet / "gone.py")
    before = tree(nnunet)
    with pytest.raises(RuntimeError, match="not ours") as raised:
        act(nnunet)
    assert str(theirs) in str(raised.value)
    assert tree(nnunet) == before
    assert theirs.is_symlink() == (kind == "link to nowhere")


@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.kind)
def test_read_only_installation_is_named_with_the_way_out(
    nnunet: Path, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(nnunet)
    refuse_writing(nnunet / shim.place, monkeypatch)
    with pytest.raises(RuntimeError, match=r'export nnUNet_extTrainer="\$\(nnUNetv2_sauron path\)"') as raised:
        install(nnunet)
    assert str(nnunet / shim.place) in str(raised.value)
    assert tree(nnunet) == before


def test_way_out_is_not_a_variable_that_this_nnunet_does_not_read(
    nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nnunet / "paths.py").write_text("nnUNet_raw = None\n")
    refuse_writing(nnunet / TRAINERS.place, monkeypatch)
    with pytest.raises(RuntimeError, match=r"does not read .* upgrade nnunetv2"):
        install(nnunet)


@pytest.mark.parametrize("step", ["mkstemp", "copymode", "replace"])
def test_interrupted_install_leaves_nothing_behind(nnunet: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = tree(nnunet), []
    module = {"mkstemp": tempfile, "copymode": shutil, "replace": os}[step]
    genuine = getattr(module, step)

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        # Beside the second shim, or before the first is put in its place.
        if len(calls) == (1 if step == "replace" else 2):
            raise KeyboardInterrupt
        return genuine(*args, **kwargs)

    monkeypatch.setattr(module, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        install(nnunet)
    assert tree(nnunet) == before


def test_folder_that_is_not_nnunet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="training_length is not a folder"):
        install(tmp_path)
    assert tree(tmp_path) == {}


def test_uninstall_leaves_no_trace(nnunet: Path) -> None:
    before = tree(nnunet)
    paths = install(nnunet)
    for path in paths:
        py_compile.compile(str(path))
        py_compile.compile(str(path), optimize=1)
        # As left by an install that was killed before it could clear up.
        (path.parent / f".{path.stem}.abc.tmp").touch()
    assert uninstall(nnunet) == paths
    assert tree(nnunet) == before


def test_uninstall_keeps_what_python_compiled_of_nnunet(nnunet: Path) -> None:
    py_compile.compile(str(nnunet / TRAINERS.place / "nnUNetTrainer_Xepochs.py"))
    py_compile.compile(str(nnunet / PLANNERS.place / "move_plans_between_datasets.py"))
    before = tree(nnunet)
    for path in install(nnunet):
        py_compile.compile(str(path))
    uninstall(nnunet)
    assert tree(nnunet) == before


@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.kind)
def test_uninstall_removes_what_an_earlier_version_left(nnunet: Path, shim: Shim) -> None:
    before = tree(nnunet)
    installed(nnunet, shim).write_text(f"{MARKER}\n")
    assert uninstall(nnunet) == [installed(nnunet, shim)]
    assert tree(nnunet) == before


def test_uninstall_of_nothing_says_so_and_changes_nothing(nnunet: Path) -> None:
    before = tree(nnunet)
    assert uninstall(nnunet) == []
    assert tree(nnunet) == before


@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.kind)
def test_folder_of_a_shim_holds_it_and_nothing_else(shim: Shim) -> None:
    assert [module.name for module in pkgutil.iter_modules([str(shim.source.parent)])] == [Path(shim.file).stem]
    assert shim.source.parent != TRAINERS.source.parent or shim is TRAINERS


def test_names_are_those_that_the_shims_show() -> None:
    assert "SauronTrainer" in trainer_names()
    assert sorted(planner_names()) == ["LUnet16Planner", "LUnet8Planner", "LUnetPlanner", "ResEncLUnetPlanner"]


def run_shim(shim: Shim, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Import a shim in a Python that has the standard library and `folders`, hence not the real nnunet_sauron."""
    search = [str(folder) for folder in (shim.source.parent, *folders)]
    program = f"import sys; sys.path[:0] = {search}; import {Path(shim.file).stem}"
    return subprocess.run([sys.executable, "-I", "-S", "-B", "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.kind)
def test_shim_is_harmless_once_our_package_is_gone(shim: Shim) -> None:
    result = run_shim(shim)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.kind)
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a_missing_dependency", "No module named 'a_missing_dependency'"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision::nms"),
        ("another_name = 1", "cannot import name '"),
    ],
)
def test_shim_hides_no_other_error(tmp_path: Path, shim: Shim, source: str, expected: str) -> None:
    module = (tmp_path / Path(*shim.module.split("."))).with_suffix(".py")
    module.parent.mkdir(parents=True)
    module.write_text(source)
    result = run_shim(shim, tmp_path)
    assert result.returncode == 1
    assert expected in result.stderr
