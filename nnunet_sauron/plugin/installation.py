"""The shim through which nnU-Net finds our trainers: where ours lies, and putting a copy into nnU-Net's own folder."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal

SHIM_NAME = "nnunet_sauron_trainers.py"
MARKER = "# nnunet_sauron shim"

# nnU-Net imports module after module, in alphabetical order, until one has the trainer. Of its trainer packages this is
# the last one, and our module the last in it: the search for a stock trainer ends before it ever imports our package.
SHIM_PLACE = Path("training", "nnUNetTrainer", "variants", "training_length")

ShimState = Literal["absent", "current", "outdated", "foreign"]


def trainer_folder() -> Path:
    """The folder to name in the environment variable `nnUNet_extTrainer`; it holds the shim and nothing else.

    Raises:
        RuntimeError: If the shim is missing there, so that nnU-Net would search an empty folder.
    """
    folder = Path(__file__).resolve().parent / "shims"
    if not (folder / SHIM_NAME).is_file():
        raise RuntimeError(
            f"{folder / SHIM_NAME} is missing from this installation of nnunet-sauron. "
            "Reinstall it: pip install --force-reinstall --no-deps nnunet-sauron"
        )
    return folder


def trainer_names() -> list[str]:
    """The names of the trainers that the shim shows nnU-Net, read without importing them."""
    tree = ast.parse((trainer_folder() / SHIM_NAME).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports if node.module == "nnunet_sauron.trainers" for alias in node.names]


def install(nnunet_folder: Path | None = None) -> Path:
    """Put the shim into an nnU-Net installation, or bring the one that is there up to date.

    Where it is up to date nothing is written, so a second call is fine in an installation that is read-only by then.

    Args:
        nnunet_folder: The package folder `nnunetv2`; by default that of this Python.

    Returns:
        The shim's path.

    Raises:
        RuntimeError: If there is no nnU-Net, its folders are not as expected, they cannot be written, or a file of the
            shim's name is there that is not ours.
    """
    nnunet_folder = _require_nnunet(nnunet_folder)
    shim = _shim_path(nnunet_folder)
    state = shim_state(nnunet_folder)
    if state == "foreign":
        raise RuntimeError(
            f"{shim} exists and is not ours: its first lines lack '{MARKER}'. It is left alone. Move it away and "
            f"install again. {_way_around(nnunet_folder)}"
        )
    if state == "current":
        return shim
    if not shim.parent.is_dir():
        raise RuntimeError(
            f"{shim.parent} is not a folder; every nnU-Net v2 known to us has it, and the shim goes there. "
            f"Is {nnunet_folder} the package folder nnunetv2? {_way_around(nnunet_folder)}"
        )
    try:
        _write_beside_and_replace(shim, (trainer_folder() / SHIM_NAME).read_bytes())
    except OSError as error:
        raise RuntimeError(
            f"The folder {shim.parent} cannot be written ({error.strerror or error}), so nnU-Net stays as it was. "
            f"Run this as the user who owns it. {_way_around(nnunet_folder)}"
        ) from error
    return shim


def uninstall(nnunet_folder: Path | None = None) -> Path | None:
    """Take the shim and what Python compiled of it out of an nnU-Net installation.

    Args:
        nnunet_folder: The package folder `nnunetv2`; by default that of this Python.

    Returns:
        The path of the shim that was removed; None if there was none.

    Raises:
        RuntimeError: If there is no nnU-Net, the file of the shim's name is not ours, or it cannot be removed.
    """
    nnunet_folder = _require_nnunet(nnunet_folder)
    shim = _shim_path(nnunet_folder)
    state = shim_state(nnunet_folder)
    if state == "foreign":
        raise RuntimeError(
            f"{shim} is not ours: its first lines lack '{MARKER}'. It is left alone; remove it yourself if you like."
        )
    try:
        shim.unlink(missing_ok=True)
        _remove_leftovers(shim)
    except OSError as error:
        raise RuntimeError(
            f"{shim} cannot be removed ({error.strerror or error}). Run this as the user who owns {shim.parent}."
        ) from error
    return None if state == "absent" else shim


def shim_state(nnunet_folder: Path | None = None) -> ShimState:
    """What is in the shim's place: nothing, today's shim, one of another version of ours, or a file that is not ours.

    Raises:
        RuntimeError: If there is no nnU-Net.
    """
    shim = _shim_path(_require_nnunet(nnunet_folder))
    # Not `exists`, which is False for a link that leads nowhere: somebody put it there all the same.
    if not os.path.lexists(shim):
        return "absent"
    try:
        content = shim.read_bytes()
    except OSError:
        return "foreign"
    if MARKER.encode() not in [line.strip() for line in content.splitlines()[:5]]:
        return "foreign"
    return "current" if content == (trainer_folder() / SHIM_NAME).read_bytes() else "outdated"


def find_nnunet() -> Path | None:
    """The package folder `nnunetv2` of this Python, found without importing it; None if it is not installed."""
    specification = importlib.util.find_spec("nnunetv2")
    if specification is None or not specification.submodule_search_locations:
        return None
    return Path(next(iter(specification.submodule_search_locations)))


def reads_external_trainers(nnunet_folder: Path) -> bool:
    """Whether this nnU-Net heeds `nnUNet_extTrainer`, as it does since 2.8.0."""
    try:
        return "nnUNet_extTrainer" in (nnunet_folder / "paths.py").read_text(encoding="utf-8")
    except OSError:
        return False


def _require_nnunet(nnunet_folder: Path | None) -> Path:
    nnunet_folder = nnunet_folder or find_nnunet()
    if nnunet_folder is None:
        raise RuntimeError(f"nnU-Net is not installed for {sys.executable}. Install it there: pip install nnunetv2")
    return Path(nnunet_folder)


def _shim_path(nnunet_folder: Path) -> Path:
    return nnunet_folder / SHIM_PLACE / SHIM_NAME


def _way_around(nnunet_folder: Path) -> str:
    if reads_external_trainers(nnunet_folder):
        return (
            "Or leave nnU-Net as it is and let it find the trainers by its environment variable: "
            "export nnUNet_extTrainer=$(nnUNetv2_sauron path)"
        )
    return (
        "This nnU-Net does not read the environment variable nnUNet_extTrainer either (2.8.0 and later do): "
        "upgrade nnunetv2, or install both packages into a virtual environment that you own."
    )


def _write_beside_and_replace(shim: Path, content: bytes) -> None:
    # Every nnU-Net process imports this file, so none may ever see half of it. The name is no module's: an interrupted
    # install must not leave something that nnU-Net imports.
    handle, temporary = tempfile.mkstemp(dir=shim.parent, prefix=f".{shim.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes it readable for its owner only: in a shared installation everyone else's look-up would fail.
        shutil.copymode(shim.parent / "__init__.py", temporary)
        os.replace(temporary, shim)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _remove_leftovers(shim: Path) -> None:
    compiled_folder = Path(importlib.util.cache_from_source(str(shim))).parent
    for leftover in [*shim.parent.glob(f".{shim.stem}.*.tmp"), *compiled_folder.glob(f"{shim.stem}.*.pyc")]:
        leftover.unlink(missing_ok=True)
    if compiled_folder.is_dir() and not any(compiled_folder.iterdir()):
        compiled_folder.rmdir()
