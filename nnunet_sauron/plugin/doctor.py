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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import __version__
from ..console.json_output import print_json
from .commands import EXTERNAL, SETTINGS
from .environment import PROCESSES, wrong_number
from .installation import PLANNERS, SHIMS, TRAINERS, Shim, find_nnunet, shim_state, trainer_names

DISTRIBUTION, RUNTIME = "nnunet-sauron", "nnunet-sauron-runtime"
INSTALL = "Run: nnUNetv2_sauron install"
INSTALL_PLANNERS = "To use them with -pl, which looks into nnU-Net's own folder only, run: nnUNetv2_sauron install"
EXPORT = f'export {EXTERNAL}="$(nnUNetv2_sauron path)"'
EXPORT_TOO = f'export {EXTERNAL}="$(nnUNetv2_sauron path){os.pathsep}${EXTERNAL}"'
STATES = {
    "absent": "not in nnU-Net's folder",
    "current": "in nnU-Net's folder",
    "outdated": "in nnU-Net's folder, of another version of nnunet-sauron",
    "foreign": "not in nnU-Net's folder, where another file has its name",
}


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: Its name.
        ok: True if training can rely on it, False if it stops training with our trainers, None if it only informs.
        detail: What was found.
        remedy: What to do about it; empty if nothing.
    """

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def examine() -> list[Check]:
    """Check all that training with our trainers needs; errors on the way are reported, not raised."""
    # nnU-Net talks while it searches, and dependencies warn; neither belongs into a report or into its JSON.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            Check("nnunet_sauron", None, f"{__version__} in {Path(__file__).parents[1]}"),
            Check("python", None, f"{platform.python_version()} in {sys.executable}"),
            *(
                Check(name, None, _version(name) or "not installed")
                for name in ("torch", "torchvision", "dynamic_network_architectures")
            ),
            _nnunet_version(),
            *_runtime(),
            _cuda(),
            # Raw data is needed before training; preprocessed data is only read once a dataset's splits are written.
            _data_folder("nnUNet_raw", "planning and preprocessing", needed=False, written=False),
            _data_folder("nnUNet_preprocessed", "training", needed=True, written=False),
            _data_folder("nnUNet_results", "training and prediction", needed=True, written=True),
            *(Check(f"installed shim of the {shim.kind}", None, STATES[_state(shim)], _update(shim)) for shim in SHIMS),
            Check(EXTERNAL, None, os.environ.get(EXTERNAL) or "not set"),
            _settings(),
            *(_number_of_processes(name) for name in PROCESSES),
            *_classes(TRAINERS, _find_trainer, _why_no_trainer, missing=False),
            # Trainers and `nnUNetv2_sauron plan` work without the planners.
            *_classes(PLANNERS, _find_planner, _why_no_planner, missing=None),
        ]


def print_checks(checks: list[Check], *, json_output: bool = False) -> None:
    """Print checks as a table followed by what to do, or as one JSON object `{"ok": ..., "checks": [...]}`."""
    failed = [check for check in checks if check.ok is False]
    if json_output:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
        return

    from ..console.terminal import PlainTable, plain_console

    table = PlainTable("check", "", "found")
    for check in checks:
        table.add_row(check.name, {True: "ok", False: "FAILS", None: ""}[check.ok], check.detail)
    console = plain_console(soft_wrap=True)
    console.print(table, soft_wrap=False)

    # Outside the table, where no border cuts a command that is to be copied.
    needed_first = sorted(checks, key=lambda check: check.ok is not False)
    for remedy in dict.fromkeys(check.remedy for check in needed_first if check.remedy):
        names = ", ".join(check.name for check in needed_first if check.remedy == remedy)
        console.print(f"{names}: {remedy}")
    if failed:
        console.print(f"Training is not possible yet: {', '.join(check.name for check in failed)}.", style="bold red")
    else:
        console.print("Ready: nnUNetv2_train DATASET CONFIGURATION FOLD -tr SauronTrainer", style="bold green")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nnunet_version() -> Check:
    folder, found = find_nnunet(), _version("nnunetv2")
    if folder is None:
        return Check("nnunetv2", False, f"not installed for {sys.executable}", "Run: pip install nnunetv2")
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]
        supported = next(one.specifier for one in requirements if one.name == "nnunetv2")
    except (ImportError, importlib.metadata.PackageNotFoundError, StopIteration):  # run from a source folder
        supported = None
    if found is None or supported is None:
        return Check("nnunetv2", None, f"{found or 'of unknown version'} in {folder}")
    fits = supported.contains(found, prereleases=True)
    remedy = "" if fits else f"Run: pip install --upgrade 'nnunetv2{supported}'"
    return Check("nnunetv2", fits, f"{found} in {folder}; supported: {supported}", remedy)


def _runtime() -> Iterator[Check]:
    """Nothing, but where the runtime is installed by itself as well: both distributions own the same files."""
    if alone := _version(RUNTIME):
        detail = f"{alone}, installed beside {DISTRIBUTION}, which holds the same files: removing one breaks the other"
        yield Check(RUNTIME, None, detail, f"Run: pip uninstall {RUNTIME}   and install {DISTRIBUTION} again.")


def _cuda() -> Check:
    try:
        import torch

        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except Exception as error:  # a broken PyTorch may raise anything, and the user has to know it
        return Check("CUDA", False, f"PyTorch fails: {_describe(error)}", "Repair PyTorch or the GPU driver.")
    if devices:
        return Check("CUDA", True, ", ".join(devices))
    return Check("CUDA", None, "no device", "Add -device cpu (or -device mps on a Mac) to nnU-Net's commands.")


def _data_folder(variable: str, purpose: str, *, needed: bool, written: bool) -> Check:
    value, stops = os.environ.get(variable), False if needed else None
    if not value:
        return Check(variable, stops, "not set", f"Set it for {purpose}: export {variable}=FOLDER")
    if value.startswith("~"):  # as quotes leave it
        whole = shlex.quote(os.path.expanduser(value))
        return Check(variable, stops, f"{value}, whose ~ nnU-Net takes for a name", f"export {variable}={whole}")
    folder = Path(value)
    if not folder.exists():
        remedy = f"If this is the right one: mkdir -p {shlex.quote(value)}"
        return Check(variable, None, f"{folder} does not exist yet", remedy)
    if not folder.is_dir():
        return Check(variable, stops, f"{folder} is not a folder", f"Name a folder: export {variable}=FOLDER")
    try:
        # Tried rather than asked: permission bits say nothing of a file system mounted read-only.
        with tempfile.TemporaryFile(dir=folder):
            return Check(variable, True, str(folder))
    except OSError as error:
        detail = f"{folder} cannot be written ({error.strerror})"
        if written:
            return Check(variable, False, detail, f"Make it writable, or name another: export {variable}=FOLDER")
        return Check(variable, None, detail, "Needs writing only for a new dataset.")


def _settings() -> Check:
    name = f"settings ({SETTINGS})"
    try:
        trainers = importlib.import_module("nnunet_sauron.trainers")
        check_variable = importlib.import_module("nnunet_sauron.trainers.settings").check_variable
    except Exception as error:  # which the search for trainers explains
        return Check(name, None, f"not looked at: {_describe(error)}")
    try:
        check_variable([getattr(trainers, trainer) for trainer in trainer_names()])
    except (OSError, ValueError) as error:
        return Check(name, False, str(error), f"Mend the variable, or: unset {SETTINGS}")
    return Check(name, None, os.environ.get(SETTINGS) or "not set")


def _number_of_processes(variable: str) -> Check:
    if wrong := wrong_number(variable):
        return Check(variable, False, *wrong)
    value = os.environ.get(variable)
    if value is not None and int(value) == 0:
        return Check(variable, None, "0: for training alone, nnU-Net's planning stops at it")
    return Check(variable, None, value or "not set")


def _state(shim: Shim) -> str:
    return "absent" if find_nnunet() is None else shim_state(shim=shim)


def _update(shim: Shim) -> str:
    return INSTALL if _state(shim) == "outdated" else ""


def _classes(
    shim: Shim, find: Callable[[str], type | None], why_not: Callable[[], tuple[str, str]], *, missing: bool | None
) -> Iterator[Check]:
    """A check for each class of a shim: whether nnU-Net finds ours under its name.

    Args:
        shim: The shim.
        find: What nnU-Net does to find a class; None if there is none.
        why_not: What to say where there is none.
        missing: `ok` of a class that is not found.
    """
    broken = None
    for name in shim.class_names():
        try:
            found = None if broken else find(name)
        # SystemExit: a script among the folders that nnU-Net searches ends nnU-Net without a word.
        except (Exception, SystemExit) as error:
            # Kept for the other classes: modules that failed half-way fail with other words when imported again.
            broken = f"nnU-Net's search for {shim.kind} stops at {_describe(error)}", _remedy(error)
        if broken or found is None:
            yield Check(name, missing, *(broken or why_not()))
        # By name: nnU-Net imports the files of external folders anew, so the class object differs.
        elif found.__module__.split(".")[0] != "nnunet_sauron":
            source = getattr(sys.modules.get(found.__module__), "__file__", None) or f"the module {found.__module__}"
            other = f"nnU-Net finds another class of this name first, in {source}"
            yield Check(name, missing, other, f"Rename or remove that class, or name our folder first: {EXPORT_TOO}")
        else:
            through = "the installed shim" if _shows(shim, name) else EXTERNAL
            yield Check(name, True, f"found through {through}")


def _shows(shim: Shim, name: str) -> bool:
    """Whether the installed shim, which may be of another version, names a class."""
    state, nnunet = _state(shim), find_nnunet()
    return state == "current" or (state == "outdated" and name in (nnunet / shim.place / shim.file).read_text("utf-8"))


def _find_trainer(name: str) -> type | None:
    importlib.import_module("nnunet_sauron.trainers")  # where this fails, it says more than nnU-Net's search
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        return recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        # The search's own "could not find", not a RuntimeError out of a module that it imported.
        if traceback.extract_tb(error.__traceback__)[-1].name == recursive_find_trainer_class_by_name.__name__:
            return None
        raise


def _find_planner(name: str) -> type | None:
    if _state(PLANNERS) in ("absent", "foreign"):
        return None
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    return recursive_find_python_class(str(find_nnunet() / "experiment_planning"), name, "nnunetv2.experiment_planning")


def _why_no_trainer() -> tuple[str, str]:
    if _state(TRAINERS) == "outdated":
        return "the installed shim, of another version of nnunet-sauron, does not have it", INSTALL
    external = os.environ.get(EXTERNAL)
    if not external:
        return f"no shim is installed in nnU-Net's folder, and {EXTERNAL} is not set", f"{INSTALL}   or: {EXPORT}"
    folders = [Path(one) for one in external.split(os.pathsep) if one.strip()]
    if any((one / TRAINERS.file).is_file() for one in folders):
        return f"the {TRAINERS.file} in {EXTERNAL}={external} does not have it", f"Run: {EXPORT}"
    lacks = f"lacks {TRAINERS.file}" if any(one.exists() for one in folders) else "does not exist"
    found = f"no shim is installed in nnU-Net's folder, and {EXTERNAL}={external} {lacks}"
    return found, f"{INSTALL}   or: {EXPORT_TOO}"


def _why_no_planner() -> tuple[str, str]:
    if _state(PLANNERS) == "outdated":
        return "not found, the installed shim of another version of nnunet-sauron does not have it", INSTALL
    return "not found, its shim is not installed", INSTALL_PLANNERS


def _describe(error: BaseException) -> str:
    message = " ".join(str(error).split())
    place = _place(error)
    return f"{type(error).__name__}: {message}" + (f" (in {place})" if place else "")


def _place(error: BaseException) -> str:
    """The file and line that fail."""
    file, line = _failing(error)
    return f"{file}, line {line}" if file else ""


def _failing(error: BaseException) -> tuple[str, int | None]:
    """The file and line that fail, other than those of the import system and of this module; "" without one."""
    if isinstance(error, SyntaxError):
        return error.filename or "", error.lineno
    ours = (__file__, importlib.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    frames = [frame for frame in frames if not frame.filename.startswith("<")]
    return (frames[-1].filename, frames[-1].lineno) if frames else ("", None)


def _remedy(error: BaseException) -> str:
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if "torchvision" in f"{error} {files}":
        return (
            f"torch {_version('torch')} and torchvision {_version('torchvision')} do not fit together, as when one is "
            "made for the CPU and the other for CUDA. Reinstall both from the same index: "
            "pip install --force-reinstall torch torchvision"
        )
    file = _failing(error)[0]
    if Path(file).name in [shim.file for shim in SHIMS]:
        return f"{INSTALL}   and if that does not help, reinstall nnunet-sauron."
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"Install the package that has the module {error.name}."
    if "MPLBACKEND" in os.environ and "backend" in str(error):
        return "Run: unset MPLBACKEND   (a notebook sets it for its own environment)"
    folder = find_nnunet()
    searched = [Path(one).resolve() for one in os.environ.get(EXTERNAL, "").split(os.pathsep) if one]
    searched += [folder.resolve() / name for name in ("training", "experiment_planning")] if folder else []
    if file and not any(one in Path(file).resolve().parents for one in searched):
        return "Mend what the error tells of, such as a variable; if a package is damaged, reinstall it."
    return "Repair or remove the file named here; nnU-Net imports every file in the folders it searches."
