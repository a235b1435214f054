"""Scores of the segmentations in trained models' folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed

from ...console.errors import first_of, in_words
from ...console.progress import Progress
from ...files import read_json_object
from ...model.checkpoints import BEST, CHECKPOINT, COMPRESSION, fitted_on
from ...model.evaluation import CaseScore, Segmentations, evaluate_folder
from ...model.trained import TrainedModel
from ...plugin.commands import predict_command, train_command

PREDICTIONS = "predictions"  # stands for a fold where scores are of a folder of predictions


def score_model(
    name: str,
    trained: TrainedModel,
    predictions: Path | None,
    labels: Path | None,
    tolerance_mm: float,
    problems: list[str],
    progress: Progress,
) -> dict[str, list[CaseScore]]:
    """Score each fold's validation, or one folder of predictions under the name "predictions".

    Args:
        name: What the model is called in problems.
        trained: The model.
        predictions: A folder to score in place of the folds' own.
        labels: References; None for those that nnU-Net validated with.
        tolerance_mm: Of the surface Dice.
        problems: What is missing, and which command makes it, is added to these.
        progress: Shows a bar a fold.
    """
    validations = {fold: trained.folder / f"fold_{fold}" / "validation" for fold in trained.checkpoints}
    kind, scores = trained.segmentations, {}
    for fold, folder in ({PREDICTIONS: predictions} if predictions else validations).items():
        what = f"{name}, {fold}" if predictions else f"{name}, fold {fold}"
        try:
            references = labels
            if not predictions:
                there = _segmentations(trained, fold, folder)
                validated = _validated(folder, problems)
                if missing := _missing(trained, fold, folder, validated, there):
                    problems.append(f"{what}: {missing}")
                references = labels or _references(trained, validated, there)
            chosen = what, folder, references, kind, tolerance_mm, problems, progress
            scores[fold] = score_folder(*chosen, every_reference=bool(predictions))
            if seen := _fitted_on(trained, fold, scores[fold]):
                problems.append(f"{what}: {seen}")
        except Exception as error:  # whatever is in those folders, the other models are scored
            problems.append(without_quality(what, error))
    if not predictions and scores and trained.checkpoint_name != CHECKPOINT:
        problems.append(
            f"{name}: its costs are of {trained.checkpoint_name}, its quality of nnU-Net's validation, which is "
            f"{CHECKPOINT} but after --val_best. Predict with -chk and give --predictions and --labels to be sure."
        )
    if "all" in scores:
        problems.append(
            f"{name}: fold all is validated on cases that it was trained with; means leave it out beside others."
        )
    return {fold: found for fold, found in scores.items() if found}


def _fitted_on(trained: TrainedModel, fold: str, scores: list[CaseScore]) -> str | None:
    """A remark if `compress` fitted a fold, or one of all, on images of cases that are scored."""
    of = trained.checkpoints.values() if fold == PREDICTIONS else [trained.checkpoints[fold]]
    seen = sorted(set().union(*map(fitted_on, of)).intersection(score.case for score in scores))
    if not seen:
        return None
    return (
        f"compress fitted it on images called as {len(seen)} of the {len(scores)} cases that are scored "
        f"({first_of(seen)}). If "
        f"they are the same, compress it with others (-i) before its scores are compared with those of other models."
    )


def score_folder(
    what: str,
    folder: Path,
    references: Path,
    kind: Segmentations,
    tolerance_mm: float,
    problems: list[str],
    progress: Progress,
    every_reference: bool,
) -> list[CaseScore]:
    """Score a folder of segmentations; cases that cannot be scored are left out, and named in the problems.

    Args:
        what: What the folder is called in problems.
        folder, references, kind, tolerance_mm, problems, progress: As `score_model` and `evaluate_folder` take them.
        every_reference: Whether a reference without a segmentation is a problem.

    Raises:
        FileNotFoundError: It has none.
    """
    cases = [path.name for path in kind.files(folder)]
    if not cases:
        raise FileNotFoundError(f"{folder} holds no segmentations (*{kind.ending}); give another folder.")
    with progress.bar(f"scoring {what}", len(cases)) as step:
        found = evaluate_folder(
            folder, references, kind, tolerance_mm=tolerance_mm, cases=cases,
            on_error=lambda text: problems.append(f"{what}, a case is left out: {text}"),
            after_case=step, on_note=lambda text: text in problems or problems.append(text),
        )  # fmt: skip
    without = {path.name for path in kind.files(references)}.difference(cases)
    if every_reference and without:
        problems.append(f"{len(without)} references in {references} have no segmentation in {folder}.")
    return found


def was_validated(trained: TrainedModel) -> bool:
    """Whether its folds have segmentations of their own."""
    folders = [trained.folder / f"fold_{fold}" / "validation" for fold in trained.checkpoints]
    return any(folder.is_dir() and trained.segmentations.files(folder) for folder in folders)


def _segmentations(trained: TrainedModel, fold: str, folder: Path) -> set[str]:
    """File names of a validation that ended."""
    there = trained.segmentations.files(folder)
    if not there:
        # compress validates nothing, and a training that was stopped before its end has not yet.
        of_fold = trained.folder, [fold], trained.trainer_names, trained.checkpoint_name
        predict = f"{predict_command(*of_fold)} and then give --predictions OUT --labels LABELS."
        if COMPRESSION in trained.checkpoints[fold]:
            raise FileNotFoundError(f"{folder} holds no segmentations. Make some: {predict}")
        raise FileNotFoundError(f"{folder} holds no segmentations. Run: {_validate(trained, fold)} or: {predict}")
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no summary.json: the validation did not end. Run: {_validate(trained, fold)}"
        )
    return {path.name for path in there}


def _validate(trained: TrainedModel, fold: str) -> str:
    """The command that validates a finished training, or else the one that finishes it."""
    trainer, plans = trained.checkpoints[fold]["trainer_name"], trained.plans["plans_name"]
    flags = ["--val"] if (trained.folder / f"fold_{fold}" / CHECKPOINT).is_file() else ["--c"]
    if trained.checkpoint_name == BEST:
        flags.append("--val_best")
    names = trained.plans["dataset_name"], trained.configuration, fold, trainer, plans
    return train_command(*names, *flags, model_folder=trained.folder)


def _references(trained: TrainedModel, validated: list[dict], there: set[str]) -> Path:
    """The folder of references that nnU-Net validated with, of which one at least has the name of a segmentation."""
    files = [Path(case["reference_file"]) for case in validated]
    # A bare name is one of another system, whose folders are separated in another way.
    named = list(dict.fromkeys(file.parent for file in files if file.parent != Path()))
    named.append(Path(nnUNet_preprocessed or "") / trained.plans["dataset_name"] / "gt_segmentations")
    for folder in named:
        if folder.is_dir() and there.intersection(path.name for path in folder.iterdir()):
            return folder
    raise FileNotFoundError(
        f"the references are not where nnU-Net had them ({', '.join(str(folder) for folder in named)}); give "
        f"--labels FOLDER, such as nnUNet_raw{os.sep}{trained.plans['dataset_name']}{os.sep}labelsTr."
    )


def _validated(validation: Path, problems: list[str]) -> list[dict]:
    """The cases of a validation by its summary.json, with their `reference_file`; none after `compress`, or where it
    does not tell."""
    summary = validation / "summary.json"
    try:
        cases = read_json_object(summary, "validate again (nnUNetv2_train ... --val)").get("metric_per_case") or []
        _ = [Path(case["reference_file"]) for case in cases]
    except ValueError as error:  # the segmentations can be scored all the same
        problems.append(str(error))
    except (KeyError, IndexError, TypeError):
        problems.append(f"{summary} is not nnU-Net's: it does not name the references' folder.")
    else:
        return cases
    return []


def _missing(trained: TrainedModel, fold: str, validation: Path, validated: list[dict], there: set[str]) -> str:
    """A sentence on validated cases whose segmentations are gone; nothing where all are there."""
    files = [str(case["prediction_file"]) for case in validated if "prediction_file" in case]
    gone = sorted({re.split(r"[/\\]", file)[-1] for file in files} - there)
    if not gone:
        return ""
    return (
        f"{len(gone)} of {len(files)} validated cases have no segmentation in {validation} any more and are left "
        f"out: {first_of(gone)}. Run: {_validate(trained, fold)}"
    )


def without_quality(what: str, error: Exception) -> str:
    """The problem of segmentations that could not be scored."""
    return f"{what} has no quality in the report: {in_words(error)}"
