"""Cost and quality of trained models, measured from their folders, and compared with a baseline's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...console.errors import in_words
from ...console.progress import Progress
from ...model.checkpoints import CHECKPOINT
from ...model.evaluation import TOLERANCE_MM
from ...model.trained import TrainedModel, is_bundle
from ...plugin.commands import checkpoint_flag, command
from .bundles import open_bundle, score_bundle
from .contents import COMPARED, ModelReport, Report
from .measure import NetworksToTime, measure_bundle, measure_model
from .paired import PairedDifference, paired_difference
from .scores import score_model, was_validated

SECONDS_OF_TIMING = 60.0  # for all networks of a report together


def make_report(
    folders: Sequence[Path],
    *,
    baseline: Path | None = None,
    predictions: Sequence[Path | None] = (),
    labels: Path | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    timing_seconds: float = SECONDS_OF_TIMING,
    checkpoint: str = CHECKPOINT,
    folds: list[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read models' folders, count, time, score and compare; nothing is trained and no folder is changed.

    Args:
        folders: nnU-Net's `Trainer__Plans__configuration` folders, or what `compress` or `export` wrote.
        baseline: One of them; None for the first that can be read.
        predictions: A folder of segmentations for each model, in the same order, to be scored in place of its
            `validation` folders (None: those all the same); needs `labels`.
        labels: Reference segmentations; None for those that nnU-Net validated with.
        tolerance_mm: Of the surface Dice.
        timing_seconds: About how long networks are timed, all together; 0 times none.
        checkpoint: File name of the checkpoints to read.
        folds: Of each model or bundle; None for all that are there.
        progress: Shows what is being done; None: nothing is shown.

    Raises:
        FileNotFoundError: No model can be read, or there is no such folder of segmentations.
        ValueError: The arguments do not fit each other.
    """
    _check_arguments(folders, baseline, predictions, labels, tolerance_mm, timing_seconds)
    progress = progress or Progress(quiet=True)
    problems: list[str] = []
    left_out: list[Path] = []
    models: list[ModelReport] = []
    to_time = NetworksToTime()
    for name, folder, of_folder in zip(
        short_names(folders), folders, predictions or [None] * len(folders), strict=True
    ):
        progress.say(f"reading {folder}")
        try:
            if is_bundle(folder):
                bundle = open_bundle(folder)
                model, networks = measure_bundle(name, bundle, folds)
                scores = score_bundle(name, bundle, of_folder, labels, tolerance_mm, problems, progress)
                models.append(replace(model, scores=scores))
                if timing_seconds:
                    to_time.add(model, networks)
                if of_folder and not scores:
                    left_out.append(of_folder)
                continue
            trained = TrainedModel.read(folder, folds, checkpoint, problems.append, every_fold=True)
        except Exception as error:  # one bad folder must not stop the report of the others
            problems.append(f"{folder} is not in the report: {in_words(error)}")
            left_out.append(folder)
            continue
        model, networks = measure_model(name, trained, problems)
        if timing_seconds:
            to_time.add(model, networks)
        scores = score_model(name, trained, of_folder, labels, tolerance_mm, problems, progress)
        models.append(replace(model, scores=scores))
        if not scores and (of_folder or was_validated(trained) or not model.folds):
            left_out.append(of_folder or trained.folder)
    if not models:
        raise FileNotFoundError(" ".join(problems))

    of_models = [model.folder for model in models if not is_bundle(model.folder)]
    again = command("nnUNetv2_sauron", "benchmark", "-m", *of_models, *checkpoint_flag(checkpoint))
    to_time.time(timing_seconds, again, problems, progress)
    wanted = [model for model in models if baseline is None or model.folder.resolve() == baseline.resolve()]
    if not wanted:
        problems.append(f"The baseline {baseline} could not be read; {models[0].name} takes its place.")
    reference = (wanted or models)[0]
    for model in models:
        if model is not reference:
            model.differences.update(_differences(model, reference))
            problems += _unequal(model, reference)
    return Report(models, reference.name, problems, tolerance_mm, torch.get_num_threads(), left_out)


def _check_arguments(
    folders: Sequence[Path],
    baseline: Path | None,
    predictions: Sequence[Path | None],
    labels: Path | None,
    tolerance_mm: float,
    timing_seconds: float,
) -> None:
    if predictions and (len(predictions) != len(folders) or labels is None):
        raise ValueError(
            f"--predictions takes a folder, or the word validation, for each of the {len(folders)} models, in their "
            f"order, and --labels the references; got {len(predictions)} and {'no ' if labels is None else ''}--labels."
        )
    if baseline is not None and baseline.resolve() not in [folder.resolve() for folder in folders]:
        raise ValueError(f"--baseline {baseline} is none of the models; give one of them.")
    for flag, folder in (*(("--predictions", one) for one in predictions if one), ("--labels", labels)):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder} is no folder; give one of segmentations.")
    if not (0 <= tolerance_mm < math.inf and 0 <= timing_seconds < math.inf):
        raise ValueError(f"Tolerance ({tolerance_mm:g} mm) and timing ({timing_seconds:g} s) must be 0 or more.")


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many as distinguish them.

    Raises:
        ValueError: A folder is there twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(len(part) for part in parts) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(folder for i, folder in enumerate(folders) if parts[i] in parts[:i])
    raise ValueError(f"The model {twice} was given twice; give it once.")


def common_values(model: ModelReport, baseline: ModelReport, metric: str) -> dict[str, tuple[float, float]]:
    """A case's mean of a metric in both models, over the classes where both have one; nan where no class has.

    So a class that one of the two missed is left out of both: a distance must not get better by what is not there.
    """
    found = {}
    for case in sorted(model.cases.keys() & baseline.cases.keys()):
        pairs = [
            (getattr(of_class, metric), getattr(baseline.cases[case].classes[name], metric))
            for name, of_class in model.cases[case].classes.items()
            if model.classes[name] == baseline.classes.get(name)
        ]
        defined = [pair for pair in pairs if not any(map(math.isnan, pair))]
        found[case] = tuple(statistics.fmean(values) for values in zip(*defined, strict=True)) or (math.nan, math.nan)
    return found


def _differences(model: ModelReport, baseline: ModelReport) -> dict[str, PairedDifference]:
    if model.dataset != baseline.dataset:
        return {}
    found = {metric: common_values(model, baseline, metric) for metric in COMPARED}
    return {
        metric: paired_difference(*zip(*values.values(), strict=True)) for metric, values in found.items() if values
    }


def _unequal(model: ModelReport, baseline: ModelReport) -> list[str]:
    """What makes two models' means no fair comparison."""
    both = f"{model.name} and {baseline.name}"
    found = []
    if model.dataset != baseline.dataset:
        found.append(f"{both} are of different data sets, {model.dataset} and {baseline.dataset}: no case is compared.")
    elif model.scores and baseline.scores and model.cases.keys() != baseline.cases.keys():
        common = len(model.cases.keys() & baseline.cases.keys())
        found.append(
            f"{both}: the means are over different cases, {len(model.cases)} and {len(baseline.cases)}; the "
            f"differences are over the {common} in common."
        )
    other = [name for name, values in model.classes.items() if values != baseline.classes.get(name)]
    if other and model.dataset == baseline.dataset:
        found.append(f"{both}: {', '.join(other)} are not the same classes, and not in the differences.")
    if (model.configuration, model.patch_size) != (baseline.configuration, baseline.patch_size):
        found.append(
            f"{both}: their patches differ, so the cost of a patch is not the cost of an image; no ratios are given."
        )
    return found
