"""Whether nnU-Net finds our trainers and planners and can train, and if not, why not and what to do."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import platform
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import __version__
from ..console.json_output import print_json
from .installation import (
    PLANNERS,
    SHIMS,
    TRAINERS,
    Shim,
    find_nnunet,
    planner_names,
    reads_external_trainers,
    shim_state,
    trainer_names,
)

DISTRIBUTION = "nnunet-sauron"
EXTERNAL = "nnUNet_extTrainer"
INSTALL = "Run: nnUNetv2_sauron install"
INSTALL_PLANNERS = "To use them by -pl, which looks into nnU-Net's own folder only, run: nnUNetv2_sauron install"
ANOTHER_CLASS = "nnU-Net finds another class of this name first, in "
EXPORT = 'export nnUNet_extTrainer="$(nnUNetv2_sauron path)"'
EXPORT_TOO = f'export nnUNet_extTrainer="$(nnUNetv2_sauron path){os.pathsep}$nnUNet_extTrainer"'


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        ok: True if it is as training needs it, False if it stops training with our trainers, None if it only informs.
        detail: What was found.
        remedy: What to do about it; empty if nothing.
    """

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def examine() -> list[Check]:
    """Look at everything that training with our trainers needs; what goes wrong on the way is reported, not raised."""
    # nnU-Net talks while it searches, and dependencies warn; neither belongs into a report or into its JSON.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            *_versions(),
            _cuda(),
            # Raw data is needed before training; preprocessed data is only read once a dataset's splits are written.
            _data_folder("nnUNet_raw", "planning and preprocessing", needed=False, written=False),
            _data_folder("nnUNet_preprocessed", "training", needed=True, written=False),
            _data_folder("nnUNet_results", "training and prediction", needed=True, written=True),
            *(_installed_shim(shim) for shim in SHIMS),
            Check(EXTERNAL, None, os.environ.get(EXTERNAL) or "not set"),
            *_trainers(),
            *_planners(),
        ]


def print_checks(checks: list[Check], *, json_output: bool = False) -> None:
    """Print checks as a table followed by what to do, or as one JSON object `{"ok": ..., "checks": [...]}`."""
    failed = [check for check in checks if check.ok is False]
    if json_output:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
        return

    from rich.table import Table
    from rich.text import Text

    from ..console.terminal import plain_console

    states = {True: Text("ok", "green"), False: Text("FAILS", "bold red"), None: Text("")}
    table = Table("what", "", "found")
    for check in checks:
        table.add_row(Text(check.name), states[check.ok], Text(check.detail, overflow="fold"))
    console = plain_console()
    console.print(table)

    # Outside the table, where no border cuts a command that is to be copied.
    needed_first = sorted(checks, key=lambda check: check.ok is not False)
    for remedy in dict.fromkeys(check.remedy for check in needed_first if check.remedy):
        names = ", ".join(check.name for check in needed_first if check.remedy == remedy)
        console.print(Text(f"{names}: {remedy}"), soft_wrap=True)
    if failed:
        verdict = Text(f"Training is not possible yet: {', '.join(check.name for check in failed)}.", "bold red")
    else:
        verdict = Text("Ready: nnUNetv2_train DATASET CONFIGURATION FOLD -tr SauronTrainer", "bold green")
    console.print(verdict, soft_wrap=True)


def _versions() -> Iterator[Check]:
    yield Check("nnunet_sauron", None, f"{__version__} in {Path(__file__).parents[1]}")
    yield Check("python", None, f"{platform.python_version()} in {sys.executable}")
    for distribution in ("torch", "torchvision", "dynamic_network_architectures"):
        yield Check(distribution, None, _version(distribution) or "not installed")
    yield _nnunet_version()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nnunet_version() -> Check:
    folder = find_nnunet()
    if folder is None:
        return Check("nnunetv2", False, f"not installed for {sys.executable}", "Run: pip install nnunetv2")
    found = _version("nnunetv2")
    if found is None:
        return Check("nnunetv2", None, f"of unknown version, not installed by pip, in {folder}")
    detail = f"{found} in {folder}"
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return Check("nnunetv2", None, f"{detail}; which versions are supported is unknown here")
    supported = next((one.specifier for one in requirements if one.name == "nnunetv2"), None)
    if not supported:
        return Check("nnunetv2", True, detail)
    if supported.contains(found, prereleases=True):
        return Check("nnunetv2", True, f"{detail}; supported: {supported}")
    remedy = f"Run: pip install --upgrade 'nnunetv2{supported}'"
    return Check("nnunetv2", False, f"{detail}; supported: {supported}", remedy)


def _cuda() -> Check:
    try:
        import torch

        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except Exception as error:  # whatever a broken PyTorch raises is what the user has to know
        return Check("CUDA", False, f"PyTorch fails: {_describe(error)}", "Repair PyTorch or the GPU driver.")
    if devices:
        return Check("CUDA", True, ", ".join(devices))
    return Check("CUDA", None, "no device", "Add -device cpu (or -device mps on a Mac) to nnU-Net's commands.")


def _data_folder(variable: str, purpose: str, *, needed: bool, written: bool) -> Check:
    value = os.environ.get(variable)
    if not value:
        remedy = f"Set it for {purpose}: export {variable}=FOLDER"
        return Check(variable, False if needed else None, "not set", remedy)
    folder = Path(value)
    if not folder.exists():
        return Check(
            variable,
            None,
            f"{folder} does not exist yet",
            f"If this is the right one: mkdir -p {shlex.quote(value)}",
        )
    if not folder.is_dir():
        remedy = f"Name a folder: export {variable}=FOLDER"
        return Check(variable, False if needed else None, f"{folder} is not a folder", remedy)
    try:
        # Tried rather than asked: permission bits say nothing of a file system mounted read-only.
        with tempfile.TemporaryFile(dir=folder):
            return Check(variable, True, str(folder))
    except OSError as error:
        detail = f"{folder} cannot be written ({error.strerror})"
        if written:
            return Check(variable, False, detail, f"Make it writable, or name another: export {variable}=FOLDER")
        return Check(variable, None, detail, "Needs writing only for a new dataset.")


def _installed_shim(shim: Shim) -> Check:
    folder = find_nnunet()
    state = "absent" if folder is None else shim_state(folder, shim)
    details = {
        "absent": "not in nnU-Net's folder",
        "current": "in nnU-Net's folder",
        "outdated": "in nnU-Net's folder, of another version of nnunet-sauron",
        "foreign": f"a {shim.file} that is not ours is in nnU-Net's folder",
    }
    return Check(f"installed shim of the {shim.kind}", None, details[state], INSTALL if state == "outdated" else "")


def _trainers() -> Iterator[Check]:
    broken = _importing_fails()
    for trainer_name in trainer_names():
        if broken is None:
            try:
                yield _judge(trainer_name, _look_up(trainer_name))
                continue
            # SystemExit: a script among the folders nnU-Net searches ends nnU-Net without a word.
            except (Exception, SystemExit) as error:
                # Of use only the first time: modules that failed half-way fail with other words when imported again.
                broken = f"nnU-Net's search for trainers stops at {_describe(error)}", _remedy(error)
        yield Check(trainer_name, False, *broken)


def _importing_fails() -> tuple[str, str] | None:
    if find_nnunet() is None:
        return "nnU-Net is not installed", "Run: pip install nnunetv2"
    try:
        importlib.import_module("nnunet_sauron.trainers")
    except Exception as error:
        return f"importing nnunet_sauron.trainers stops at {_describe(error)}", _remedy(error)
    return None


def _look_up(trainer_name: str) -> type | None:
    """What nnU-Net's commands get for a trainer's name; None if they would say that there is no such trainer."""
    try:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    except ModuleNotFoundError as error:
        if error.name != "nnunetv2.utilities.find_objects":
            raise
        # nnU-Net before 2.8 searches its own folder only, by this call in nnUNetv2_train and nnUNetv2_predict.
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        searched = Path(find_nnunet(), "training", "nnUNetTrainer")
        return recursive_find_python_class(str(searched), trainer_name, "nnunetv2.training.nnUNetTrainer")
    try:
        return recursive_find_trainer_class_by_name(trainer_name)
    except RuntimeError as error:
        # The search's own "could not find", not a RuntimeError out of a module that it imported.
        if traceback.extract_tb(error.__traceback__)[-1].name == recursive_find_trainer_class_by_name.__name__:
            return None
        raise


def _judge(trainer_name: str, found: type | None) -> Check:
    if found is None:
        return Check(trainer_name, False, *_why_not_found())
    if not _is_ours(found):
        remedy = "Rename or remove that class, or name our folder first: " + EXPORT_TOO
        return Check(trainer_name, False, ANOTHER_CLASS + _source(found), remedy)
    through_shim = shim_state() in ("current", "outdated")
    return Check(trainer_name, True, "found through " + ("the installed shim" if through_shim else EXTERNAL))


def _is_ours(found: type) -> bool:
    # By name: nnU-Net imports what it finds in external folders anew, as another class of the same name.
    return found.__module__.split(".")[0] == "nnunet_sauron"


def _source(found: type) -> str:
    return getattr(sys.modules.get(found.__module__), "__file__", None) or f"the module {found.__module__}"


def _planners() -> Iterator[Check]:
    """Planners only inform: trainers and `nnUNetv2_sauron plan` work without them."""
    folder = find_nnunet()
    state = "absent" if folder is None else shim_state(folder, PLANNERS)
    for planner_name in planner_names():
        if state in ("absent", "foreign"):
            yield Check(planner_name, None, "not found, its shim is not installed", INSTALL_PLANNERS)
        else:
            yield _judge_planner(planner_name, folder)


def _judge_planner(planner_name: str, folder: Path) -> Check:
    try:
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        searched = str(folder / "experiment_planning")
        found = recursive_find_python_class(searched, planner_name, "nnunetv2.experiment_planning")
    except (Exception, SystemExit) as error:
        detail = f"nnU-Net's search for planners stops at {_describe(error)}"
        return Check(planner_name, None, detail, _remedy(error))
    if found is None:
        detail = "not found, the installed shim of another version of nnunet-sauron does not have it"
        return Check(planner_name, None, detail, INSTALL)
    if not _is_ours(found):
        return Check(planner_name, None, ANOTHER_CLASS + _source(found), "Rename or remove that class.")
    return Check(planner_name, True, "found through the installed shim")


def _why_not_found() -> tuple[str, str]:
    folder = find_nnunet()
    if shim_state(folder) == "outdated":
        return "the installed shim, of another version of nnunet-sauron, does not have it", INSTALL
    missing = "no shim is installed in nnU-Net's folder"
    if not reads_external_trainers(folder):
        return f"{missing}, and nnU-Net reads {EXTERNAL} only since 2.8.0", INSTALL
    external = os.environ.get(EXTERNAL)
    if not external:
        return f"{missing}, and {EXTERNAL} is not set", f"{INSTALL}   or: {EXPORT}"
    folders = [Path(one) for one in external.split(os.pathsep) if one.strip()]
    if not any(one.exists() for one in folders):
        return f"{missing}, and {EXTERNAL}={external} does not exist", f"{INSTALL}   or: {EXPORT}"
    if not any((one / TRAINERS.file).is_file() for one in folders):
        return f"{missing}, and {EXTERNAL}={external} lacks {TRAINERS.file}", f"{INSTALL}   or: {EXPORT_TOO}"
    return f"the {TRAINERS.file} in {EXTERNAL}={external} does not have it", f"Run: {EXPORT}"


def _describe(error: BaseException) -> str:
    message = " ".join(str(error).split())
    place = _place(error)
    return f"{type(error).__name__}: {message}" + (f" (in {place})" if place else "")


def _place(error: BaseException) -> str:
    """The line that fails, in the file that fails, which is not the import system's file nor this one."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    ours = (__file__, importlib.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    frames = [frame for frame in frames if not frame.filename.startswith("<")]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _remedy(error: BaseException) -> str:
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if "torchvision" in f"{error} {files}":
        return (
            f"torch {_version('torch')} and torchvision {_version('torchvision')} do not fit together, as when one is "
            "made for the CPU and the other for CUDA. Reinstall both from the same index: "
            "pip install --force-reinstall torch torchvision"
        )
    if files and Path(files[-1]).name in [shim.file for shim in SHIMS]:
        return f"{INSTALL}   and if that does not help, reinstall nnunet-sauron."
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"Install the package that has the module {error.name}."
    return "Repair or remove the file named here; nnU-Net imports every file in the folders it searches."
