"""The command line that all conversions share: read the download, check all of it, then write."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from pathlib import Path

from ... import __version__
from ...console.progress import Progress
from ...files import check_writable, new_folder
from ...plugin.environment import prepare_for_nnunet
from .cases import Dataset, Problems
from .checks import check_dataset
from .splits import FOLDS, SEED, grouped_folds
from .writing import write_dataset

Read = Callable[[Path, argparse.Namespace, Problems], Dataset]


def main(
    description: str,
    read: Read,
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run one conversion.

    Args:
        description: For `--help`: where the data is to be had, its licence, and its layout.
        read: Finds the cases in SOURCE. What it adds to the problems is shown together with all others; what it
            raises ends the conversion at once.
        add_options: Adds options of this data set.
        arguments: Those of the command line by default.

    Returns:
        The exit code: 0, 2 after an error, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of the download")
    parser.add_argument("-d", dest="number", metavar="ID", type=int, help="number of the data set, 1 to 999")
    parser.add_argument("--link", action="store_true", help="links to files of SOURCE that need no change, no copies")
    parser.add_argument("--overwrite", action="store_true", help="replace this data set if it is there")
    parser.add_argument("--allow-empty", action="store_true", help="take segmentations that are all background")
    parser.add_argument("--seed", type=int, default=SEED, help="of the folds; default %(default)s, which is nnU-Net's")
    parser.add_argument("--exclude", metavar="NAME", nargs="+", default=[], help="cases or patients to leave out")
    parser.add_argument(
        "-np", dest="processes", metavar="N", type=int, help="processes (default: nnU-Net's, at most one a core)"
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    return exit_code(lambda: convert(read, options, Progress()))


def exit_code(work: Callable[[], object]) -> int:
    """Do the work, and say in a line on standard error what ended it: 0, 2 after an error, 130 if interrupted."""
    try:
        work()
        return 0
    except KeyboardInterrupt:
        print("Interrupted; nothing was written. Give the same command again.", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print("A process was ended from outside, for want of memory most likely; try -np 1.", file=sys.stderr)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        text = f"{error}" or type(error).__name__
        print(text.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return 2


PARTS = {"train": "training", "val": "validation"}


def convert(read: Read, options: argparse.Namespace, progress: Progress) -> Path:
    """Convert a data set; its folder.

    Raises:
        ValueError: Options, the environment or the download are wrong; all problems of the download are named.
        OSError: SOURCE is not there, or the data set is there already or could not be written.
    """
    prepare_for_nnunet()
    from nnunetv2.configuration import default_num_processes

    if options.processes is None:
        options.processes = min(default_num_processes, os.cpu_count() or 1)
    if options.processes < 1 or not 0 <= options.seed < 2**32:
        raise ValueError(
            f"-np is {options.processes} and --seed {options.seed}; expected are 1 or more, and 0 or more."
        )
    options.source = Path(os.path.abspath(options.source))  # a link keeps its name
    raw = _raw_folder()
    problems = Problems(options.exclude)
    dataset = read(options.source, options, problems)
    _exclude(dataset, problems)
    folder = _target(raw, dataset, options)
    dataset.empty_masks |= options.allow_empty
    check_dataset(dataset, problems, options.processes, progress)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(
            f"{count} in {options.source}, and nothing was written:\n{listed}\n"
            "Copy damaged files anew, mend what else is named, or leave cases out with --exclude NAME."
        )
    splits = dataset.splits or _folds(dataset, options.seed)
    stale = _stale_splits(folder.name, splits, options.overwrite)
    record = {
        "converter": read.__module__ if read.__module__ != "__main__" else Path(sys.argv[0]).stem,
        "version": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": str(options.source),
        "options": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
    }
    with new_folder(folder, replace=options.overwrite) as beside:
        counts = write_dataset(
            dataset, beside, splits, record, link=options.link, processes=options.processes, progress=progress
        )
    if stale is not None:
        stale.unlink()
    _tell(dataset, folder, splits, counts, options, progress)
    return folder


def _raw_folder() -> Path:
    given = os.environ.get("nnUNet_raw")
    if not given:
        raise ValueError(
            "The environment variable nnUNet_raw is not set; it names the folder that nnU-Net's data sets are in: "
            "export nnUNet_raw=/path/to/nnUNet_raw"
        )
    return Path(given)


def _exclude(dataset: Dataset, problems: Problems) -> None:
    """Leave out what the user wants to be left out; a name that is not there is a problem."""
    kept = [case for case in dataset.cases if not problems.passes_over(*case.names)]
    such = " and ".join(sorted(dataset.cases[0].names)) if dataset.cases else "those of the files"
    for name in sorted(problems.excluded - problems.passed_over):
        problems.append(f"--exclude {name}: there is no case and no patient of this name; names are such as {such}")
    left = {case.name for case in kept}
    if out := sorted({case.name for case in dataset.cases} - left):
        dataset.notes.append(f"Left out with --exclude: {', '.join(out)}.")
    dataset.cases = kept
    for number, fold in enumerate(dataset.splits or ()):
        fold.update({part: [name for name in of_part if name in left] for part, of_part in fold.items()})
        for part, of_part in fold.items():
            if not of_part:
                problems.append(f"--exclude leaves fold {number} of the split without {PARTS[part]} cases")


def _target(raw: Path, dataset: Dataset, options: argparse.Namespace) -> Path:
    """The folder to write; raise unless it may be written."""
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    number = dataset.number if options.number is None else options.number
    if number is None or not 1 <= number <= 999:
        told = "none was given" if number is None else f"got {number}"
        raise ValueError(f"The data set needs a number from 1 to 999, {told}: -d 27")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", dataset.name):
        raise ValueError(f"The name '{dataset.name}' is none for a folder; expected letters, digits, _ and -.")
    folder = raw / f"Dataset{number:03d}_{dataset.name}"
    others = [str(name) for name in find_candidate_datasets(number) if name != folder.name]
    if others:
        raise FileExistsError(
            f"Number {number} is taken by {', '.join(others)} (in nnUNet_raw, nnUNet_preprocessed or nnUNet_results); "
            f"choose another with -d."
        )
    if os.path.lexists(folder) and not options.overwrite:
        raise FileExistsError(f"{folder} is there already; replace it with --overwrite or choose another -d.")
    source, target = options.source.resolve(), folder.resolve()
    if source == target or target in source.parents:
        raise ValueError(f"{folder} would be written over SOURCE {options.source}; move one of them.")
    check_writable(folder, remedy="choose another folder as nnUNet_raw")
    return folder


def _folds(dataset: Dataset, seed: int) -> list[dict[str, list[str]]] | None:
    groups = {case.group or case.name for case in dataset.training}
    if len(groups) < FOLDS:
        made = f"there are {len(groups)} folds" if len(groups) > 1 else "there are no folds; train fold all"
        dataset.notes.append(f"{len(groups)} patients are too few for {FOLDS} folds: {made}.")
    return grouped_folds(dataset.training, seed) if len(groups) > 1 else None


def _stale_splits(name: str, splits: list[dict[str, list[str]]] | None, overwrite: bool) -> Path | None:
    """Other folds of an earlier conversion, which nnU-Net's planner would stumble over.

    Raises:
        FileExistsError: There are some, and they must not be removed.
    """
    preprocessed = os.environ.get("nnUNet_preprocessed")
    old = Path(preprocessed) / name / "splits_final.json" if preprocessed else None
    if old is None or not old.is_file():
        return None
    try:
        if json.loads(old.read_text("utf-8")) == splits:
            return None
    except ValueError:
        pass
    if not overwrite:
        raise FileExistsError(f"{old} holds other folds; --overwrite removes it, and you should preprocess anew.")
    return old


def _tell(
    dataset: Dataset,
    folder: Path,
    splits: list[dict[str, list[str]]] | None,
    counts: dict[str, int],
    options: argparse.Namespace,
    progress: Progress,
) -> None:
    for note in dataset.notes:
        progress.say(note)
    if options.link:
        progress.say(f"{counts['linked']} files are links; {counts['copied']} had to be written, since they change.")
    training = len(dataset.training)
    print(f"{folder}: {training} training and {len(dataset.cases) - training} test cases")
    if splits:
        print(f"splits_final.json has {len(splits)} folds; planning puts it where training reads it. Next:")
    preprocessed = os.environ.get("nnUNet_preprocessed")
    anew = " --clean" if preprocessed and (Path(preprocessed) / folder.name).is_dir() else ""  # else it keeps the old
    print(f"    nnUNetv2_plan_and_preprocess -d {int(folder.name[7:10])} --verify_dataset_integrity{anew}")
