"""The shims through which nnU-Net finds our classes: their places, and copying them into nnU-Net's folders."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MARKER = "# nnunet_sauron shim"

ShimState = Literal["absent", "current", "outdated", "foreign"]


@dataclass(frozen=True)
class Shim:
    """A file of ours that shows nnU-Net some of our classes.

    nnU-Net imports module after module of a folder, in alphabetical order, then of the packages in it, until one has
    the class that it looks for. A shim's place is the last of those packages, and its name comes last there: the search
    for a class of nnU-Net's own ends before it ever imports our package.

    Attributes:
        kind: What it shows, in the plural.
        file: Its name, here and there.
        folder: Where it lies, beside this module; nnU-Net may scan that folder, so it holds nothing else.
        place: The folder it goes into, in nnU-Net's package folder.
        module: The module that it imports the classes from.
    """

    kind: str
    file: str
    folder: str
    place: Path
    module: str

    @property
    def source(self) -> Path:
        """Its path here.

        Raises:
            RuntimeError: If it is missing.
        """
        path = Path(__file__).resolve().parent / self.folder / self.file
        if not path.is_file():
            raise RuntimeError(
                f"{path} is missing from this installation of nnunet-sauron. "
                "Reinstall it: pip install --force-reinstall --no-deps nnunet-sauron"
            )
        return path

    def class_names(self) -> list[str]:
        """The names of the classes that it shows, read without importing them."""
        tree = ast.parse(self.source.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        return [alias.name for node in imports if node.module == self.module for alias in node.names]


TRAINERS = Shim(
    "trainers",
    "nnunet_sauron_trainers.py",
    "shims",
    Path("training", "nnUNetTrainer", "variants", "training_length"),
    "nnunet_sauron.trainers",
)
PLANNERS = Shim(
    "planners",
    "nnunet_sauron_planners.py",
    "planner_shim",
    Path("experiment_planning", "plans_for_pretraining"),
    "nnunet_sauron.planning.planners",
)
SHIMS = (TRAINERS, PLANNERS)


def trainer_folder() -> Path:
    """The folder to name in the environment variable `nnUNet_extTrainer`; it holds the shim and nothing else.

    Raises:
        RuntimeError: If the shim is missing there, so that nnU-Net would search an empty folder.
    """
    return TRAINERS.source.parent


def trainer_names() -> list[str]:
    """The names of the trainers that nnU-Net is shown."""
    return TRAINERS.class_names()


def planner_names() -> list[str]:
    """The names of the experiment planners that nnU-Net is shown once they are installed."""
    return PLANNERS.class_names()


def install(nnunet_folder: Path | None = None) -> list[Path]:
    """Put the shims into an nnU-Net installation, or bring those that are there up to date.

    Where all is up to date nothing is written, so a second call is fine in an installation that is read-only by then.

    Args:
        nnunet_folder: The package folder `nnunetv2`; by default that of this Python.

    Returns:
        The shims' paths: the trainers', the planners'.

    Raises:
        RuntimeError: If there is no nnU-Net, its folders are not as expected, they cannot be written, or a file of a
            shim's name is there that is not ours. Nothing is changed then; only where the second of two whole files
            cannot be put in its place, the first one stays.
    """
    nnunet_folder = _require_nnunet(nnunet_folder)
    new = {}
    for shim in SHIMS:
        path, state = nnunet_folder / shim.place / shim.file, shim_state(nnunet_folder, shim)
        if state == "foreign":
            raise RuntimeError(
                f"{path} exists and is not ours: its first lines lack '{MARKER}'. It is left alone. Move it away and "
                f"install again. {_way_around(nnunet_folder)}"
            )
        if not path.parent.is_dir():
            raise RuntimeError(
                f"{path.parent} is not a folder; every nnU-Net v2 known to us has it, and the shim goes there. "
                f"Is {nnunet_folder} the package folder nnunetv2? {_way_around(nnunet_folder)}"
            )
        if state != "current":
            new[path] = shim.source.read_bytes()
    try:
        _write_beside_and_replace(new)
    except OSError as error:
        raise RuntimeError(
            f"The folders {' and '.join(str(path.parent) for path in new)} cannot be written "
            f"({error.strerror or error}), so nnU-Net stays as it was. Run this as the user who owns them. "
            f"{_way_around(nnunet_folder)}"
        ) from error
    return [nnunet_folder / shim.place / shim.file for shim in SHIMS]


def uninstall(nnunet_folder: Path | None = None) -> list[Path]:
    """Remove the shims and their compiled files from an nnU-Net installation.

    Args:
        nnunet_folder: The package folder `nnunetv2`; by default that of this Python.

    Returns:
        The paths of the shims that were removed.

    Raises:
        RuntimeError: If there is no nnU-Net, a file of a shim's name is not ours, or one cannot be removed.
    """
    nnunet_folder = _require_nnunet(nnunet_folder)
    states = {nnunet_folder / shim.place / shim.file: shim_state(nnunet_folder, shim) for shim in SHIMS}
    for path, state in states.items():
        if state == "foreign":
            raise RuntimeError(
                f"{path} is not ours: its first lines lack '{MARKER}'. It is left alone; move it away and uninstall "
                f"again, so that nothing of ours stays."
            )
    for path in states:
        try:
            path.unlink(missing_ok=True)
            _remove_leftovers(path)
        except OSError as error:
            raise RuntimeError(
                f"{path} cannot be removed ({error.strerror or error}). Run this as the user who owns {path.parent}."
            ) from error
    return [path for path, state in states.items() if state != "absent"]


def shim_state(nnunet_folder: Path | None = None, shim: Shim = TRAINERS) -> ShimState:
    """What is in a shim's place: nothing, today's shim, one of another version of ours, or a file that is not ours.

    Raises:
        RuntimeError: If there is no nnU-Net.
    """
    path = _require_nnunet(nnunet_folder) / shim.place / shim.file
    # Not `exists`, which is False for a link that leads nowhere: that is a foreign file as well.
    if not os.path.lexists(path):
        return "absent"
    try:
        content = path.read_bytes()
    except OSError:
        return "foreign"
    if MARKER.encode() not in [line.strip() for line in content.splitlines()[:5]]:
        return "foreign"
    return "current" if content == shim.source.read_bytes() else "outdated"


def find_nnunet() -> Path | None:
    """The package folder `nnunetv2` of this Python, found without importing it; None if it is not installed."""
    specification = importlib.util.find_spec("nnunetv2")
    if specification is None or not specification.submodule_search_locations:
        return None
    return Path(next(iter(specification.submodule_search_locations)))


def reads_external_trainers(nnunet_folder: Path) -> bool:
    """Whether this nnU-Net reads `nnUNet_extTrainer`, as it does since 2.8.0."""
    try:
        return "nnUNet_extTrainer" in (nnunet_folder / "paths.py").read_text(encoding="utf-8")
    except OSError:
        return False


def _require_nnunet(nnunet_folder: Path | None) -> Path:
    nnunet_folder = nnunet_folder or find_nnunet()
    if nnunet_folder is None:
        raise RuntimeError(f"nnU-Net is not installed for {sys.executable}. Install it there: pip install nnunetv2")
    return Path(nnunet_folder)


def _way_around(nnunet_folder: Path) -> str:
    if reads_external_trainers(nnunet_folder):
        return (
            "Or leave nnU-Net as it is and let it find the trainers by its environment variable: "
            'export nnUNet_extTrainer="$(nnUNetv2_sauron path)"'
        )
    return (
        "This nnU-Net does not read the environment variable nnUNet_extTrainer either (2.8.0 and later do): "
        "upgrade nnunetv2, or install both packages into a virtual environment that you own."
    )


def _write_beside_and_replace(contents: Mapping[Path, bytes]) -> None:
    # Every nnU-Net process imports these files, so none may ever see half of one. The names are no modules': an
    # interrupted install must not leave something that nnU-Net imports. All are written before the first is replaced.
    temporaries: dict[Path, str] = {}
    try:
        for path, content in contents.items():
            handle, temporaries[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            # mkstemp makes it readable for its owner only: in a shared installation everyone else's look-up would fail.
            shutil.copymode(path.parent / "__init__.py", temporaries[path])
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries.values():
            Path(temporary).unlink(missing_ok=True)
        raise


def _remove_leftovers(shim: Path) -> None:
    compiled_folder = Path(importlib.util.cache_from_source(str(shim))).parent
    for leftover in [*shim.parent.glob(f".{shim.stem}.*.tmp"), *compiled_folder.glob(f"{shim.stem}.*.pyc")]:
        leftover.unlink(missing_ok=True)
    if compiled_folder.is_dir() and not any(compiled_folder.iterdir()):
        compiled_folder.rmdir()
