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

from nnunet_sauron.plugin import find_nnunet, install, shim_state, trainer_folder, trainer_names, uninstall
from nnunet_sauron.plugin.installation import MARKER, SHIM_NAME, SHIM_PLACE


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    """As much of nnU-Net's package folder as an installation touches."""
    folder = tmp_path / "nnunetv2"
    (folder / SHIM_PLACE).mkdir(parents=True)
    (folder / "paths.py").write_text("nnUNet_extTrainer = None\n")
    (folder / SHIM_PLACE / "__init__.py").touch(mode=0o644)
    (folder / SHIM_PLACE / "nnUNetTrainer_Xepochs.py").write_text("")
    return folder


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


def test_install_adds_one_file_as_readable_as_nnunets_own(nnunet: Path) -> None:
    before = tree(nnunet)
    shim = install(nnunet)
    assert shim == nnunet / SHIM_PLACE / SHIM_NAME
    assert tree(nnunet) == {**before, str(shim.relative_to(nnunet)): (trainer_folder() / SHIM_NAME).read_bytes()}
    assert shim.stat().st_mode == (shim.parent / "__init__.py").stat().st_mode


def test_second_install_writes_nothing(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = install(nnunet).stat()
    refuse_writing(nnunet / SHIM_PLACE, monkeypatch)
    again = install(nnunet).stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_install_updates_the_shim_of_another_version(nnunet: Path) -> None:
    (nnunet / SHIM_PLACE / SHIM_NAME).write_text(f"{MARKER}\n# what an earlier version wrote\n")
    assert shim_state(nnunet) == "outdated"
    install(nnunet)
    assert shim_state(nnunet) == "current"


@pytest.mark.parametrize("kind", ["file", "folder", "link to nowhere"])
@pytest.mark.parametrize("act", [install, uninstall])
def test_what_is_not_ours_is_refused_by_name_and_left_alone(nnunet: Path, kind: str, act: object) -> None:
    theirs = nnunet / SHIM_PLACE / SHIM_NAME
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


def test_read_only_installation_is_named_with_the_way_out(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(nnunet)
    refuse_writing(nnunet / SHIM_PLACE, monkeypatch)
    with pytest.raises(RuntimeError, match=r"export nnUNet_extTrainer=\$\(nnUNetv2_sauron path\)") as raised:
        install(nnunet)
    assert str(nnunet / SHIM_PLACE) in str(raised.value)
    assert tree(nnunet) == before


def test_way_out_is_not_a_variable_that_this_nnunet_does_not_read(
    nnunet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nnunet / "paths.py").write_text("nnUNet_raw = None\n")
    refuse_writing(nnunet / SHIM_PLACE, monkeypatch)
    with pytest.raises(RuntimeError, match=r"does not read .* upgrade nnunetv2"):
        install(nnunet)


def test_interrupted_install_leaves_nothing_behind(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(nnunet)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install(nnunet)
    assert tree(nnunet) == before


def test_folder_that_is_not_nnunet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="training_length is not a folder"):
        install(tmp_path)
    assert tree(tmp_path) == {}


def test_uninstall_leaves_no_trace(nnunet: Path) -> None:
    before = tree(nnunet)
    shim = install(nnunet)
    py_compile.compile(str(shim))
    py_compile.compile(str(shim), optimize=1)
    # As left by an install that was killed before it could clear up.
    (shim.parent / f".{shim.stem}.abc.tmp").touch()
    assert uninstall(nnunet) == shim
    assert tree(nnunet) == before


def test_uninstall_keeps_what_python_compiled_of_nnunet(nnunet: Path) -> None:
    py_compile.compile(str(nnunet / SHIM_PLACE / "nnUNetTrainer_Xepochs.py"))
    before = tree(nnunet)
    py_compile.compile(str(install(nnunet)))
    uninstall(nnunet)
    assert tree(nnunet) == before


def test_uninstall_of_nothing_says_so_and_changes_nothing(nnunet: Path) -> None:
    before = tree(nnunet)
    assert uninstall(nnunet) is None
    assert tree(nnunet) == before


def test_folder_that_nnunet_scans_holds_the_shim_and_nothing_else() -> None:
    assert [module.name for module in pkgutil.iter_modules([str(trainer_folder())])] == [Path(SHIM_NAME).stem]
    assert "SauronTrainer" in trainer_names()


def run_shim(*folders: Path) -> subprocess.CompletedProcess[str]:
    """Import the shim in a Python that has the standard library and `folders`, hence not the real nnunet_sauron."""
    program = f"import sys; sys.path[:0] = {[str(folder) for folder in (trainer_folder(), *folders)]}; import {{}}"
    command = [sys.executable, "-I", "-S", "-B", "-c", program.format(Path(SHIM_NAME).stem)]
    return subprocess.run(command, capture_output=True, text=True)


def test_shim_is_harmless_once_our_package_is_gone() -> None:
    result = run_shim()
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a_missing_dependency", "No module named 'a_missing_dependency'"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision::nms"),
        ("SauronTrainer = 1", "cannot import name 'StockTrainer'"),
    ],
)
def test_shim_hides_no_other_error(tmp_path: Path, source: str, expected: str) -> None:
    (tmp_path / "nnunet_sauron").mkdir()
    (tmp_path / "nnunet_sauron" / "trainers.py").write_text(source)
    result = run_shim(tmp_path)
    assert result.returncode == 1
    assert expected in result.stderr


def test_real_nnunet_finds_ours_last_and_its_own_as_before(tmp_path: Path) -> None:
    copy = tmp_path / "nnunetv2"
    shutil.copytree(find_nnunet(), copy, ignore=shutil.ignore_patterns("__pycache__", SHIM_NAME))
    before = {name for name in tree(copy) if "__pycache__" not in name}
    install(copy)
    program = """
import sys
import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

folder = nnunetv2.__path__[0]
assert folder == sys.argv[1], folder

def find(name):
    return recursive_find_python_class(folder + "/training/nnUNetTrainer", name, "nnunetv2.training.nnUNetTrainer")

# A class of the last module among nnU-Net's own.
assert find("nnUNetTrainer_250epochs_NoMirroring").__module__.startswith("nnunetv2.")
assert "nnunet_sauron" not in sys.modules, "the search for a stock trainer imported our package"
import nnunet_sauron.trainers
assert find("SauronTrainer") is nnunet_sauron.trainers.SauronTrainer
"""
    package_root = str(trainer_folder().parents[2])
    result = subprocess.run(
        [sys.executable, "-c", program, str(copy)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), package_root])},
    )
    assert result.returncode == 0, result.stderr
    uninstall(copy)
    after = tree(copy)
    assert {name for name in after if "__pycache__" not in name} == before
    assert not [name for name in after if "sauron" in name]
