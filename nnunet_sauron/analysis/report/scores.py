"""Scores of the segmentations in trained models' folders."""

from __future__ import annotations

import os
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed

from ...console.progress import Progress
from ...files import read_json_object
from ...model.evaluation import CaseScore, Segmentations, evaluate_folder
from ...model.trained import CHECKPOINT, COMPRESSION, TrainedModel
from ...plugin.commands import predict_command, train_command

BEST = "checkpoint_best.pth"
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
            if not predictions:
                _check_validation(trained, fold, folder)
            references = labels or _references(trained, folder, problems)
            chosen = what, folder, references, kind, tolerance_mm, problems, progress
            scores[fold] = score_folder(*chosen, every_reference=bool(predictions))
        except Exception as error:  # whatever is in those folders, the other models are scored
            problems.append(without_quality(what, error))
    if not predictions and scores and trained.checkpoint_name != CHECKPOINT:
        problems.append(
            f"{name}: its costs are of {trained.checkpoint_name}, its quality of nnU-Net's validation, which is "
            f"{CHECKPOINT} but after --val_best. Predict with -chk and give --predictions and --labels to be sure."
        )
    if "all" in scores:
        problems.append(f"{name}: fold all is validated on cases that it was trained with.")
    return {fold: found for fold, found in scores.items() if found}


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


def _check_validation(trained: TrainedModel, fold: str, folder: Path) -> None:
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


def _validate(trained: TrainedModel, fold: str) -> str:
    """The command that validates a finished training, or else the one that finishes it."""
    trainer, plans = trained.checkpoints[fold]["trainer_name"], trained.plans["plans_name"]
    flags = ["--val"] if (trained.folder / f"fold_{fold}" / CHECKPOINT).is_file() else ["--c"]
    if trained.checkpoint_name == BEST:
        flags.append("--val_best")
    return train_command(trained.plans["dataset_name"], trained.configuration, fold, trainer, plans, *flags)


def _references(trained: TrainedModel, validation: Path, problems: list[str]) -> Path:
    """The folder of references that nnU-Net validated with."""
    named, summary = [], validation / "summary.json"
    try:
        cases = read_json_object(summary, "validate again (nnUNetv2_train ... --val)").get("metric_per_case")
        if cases:  # compress knows none
            named.append(Path(cases[0]["reference_file"]).parent)
    except ValueError as error:  # the segmentations can be scored all the same
        problems.append(str(error))
    except (KeyError, IndexError, TypeError):
        problems.append(f"{summary} is not nnU-Net's: it does not name the references' folder.")
    named.append(Path(nnUNet_preprocessed or "") / trained.plans["dataset_name"] / "gt_segmentations")
    for folder in named:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"the references are not where nnU-Net had them ({', '.join(str(folder) for folder in named)}); give "
        f"--labels FOLDER, such as nnUNet_raw{os.sep}{trained.plans['dataset_name']}{os.sep}labelsTr."
    )


def without_quality(what: str, error: Exception) -> str:
    """The problem of segmentations that could not be scored."""
    why = error if isinstance(error, (ValueError, OSError, RuntimeError)) else repr(error)
    return f"{what} has no quality in the report: {why}"
