"""The verb `compress` from its first check to its last line."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..analysis.cases import find_cases
from ..analysis.evaluation import CaseScore, mean_score
from ..analysis.progress import Progress
from .compress import Compressor, Goal, Segmenter, provenance, split
from .display import Trial, plot_trade_off, plot_widths, print_compressed, print_trials
from .images import patches
from .model import read_prunable, write_model

TOLERANCES = (0.003, 0.01, 0.02, 0.03, 0.05, 0.08)


def compress(
    folder: Path,
    images: Path,
    output: Path,
    goal: Goal | None,
    *,
    folds: list[str] | None = None,
    labels: Path | None = None,
    max_images: int = 20,
    round_to: int = 1,
    device: str = "cpu",
    json_output: bool = False,
) -> None:
    """Write a smaller model, or show what sizes cost what.

    Args:
        folder: A trained model's folder.
        images: Raw images in nnU-Net's naming; part of them is held out to measure on.
        output: The new model's folder. Without a goal, the trade-off's picture goes beside it, and nothing else.
        goal: What to meet; None shows the trade-off over `TOLERANCES`.
        folds: Only these; None for all. Each is made smaller by itself.
        labels: Reference segmentations of the images, to measure both models against.
        max_images: So many are used.
        round_to: Widths are multiples of this, where there are as many channels.
        device: "cpu" or "cuda".
        json_output: Print JSON instead of tables.

    Raises:
        FileExistsError: The output folder exists.
        FileNotFoundError, ValueError: The model, the images or the goal do not do; nothing is written then.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists; give the name of a folder that does not.")
    if max_images < 1:
        raise ValueError(f"--max-images must be at least 1; got {max_images}.")
    if round_to < 1:
        raise ValueError(f"--round-to must be at least 1; got {round_to}.")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"{output.absolute().parent} is no folder; make it first, or give another -o.")
    model = read_prunable(folder, folds)
    fitted_on, held_out = split(find_cases(images, model), max_images)
    on = torch.device(device)
    if goal is None:  # one fold shows it, and is compared with itself alone
        model = replace(model, checkpoints=dict([next(iter(model.checkpoints.items()))]))
    progress = Progress(quiet=json_output)
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net's prediction prints a line a case
        progress.say(f"{len(fitted_on)} images to fit on, {len(held_out)} held out to compare segmentations")
        segmenter = Segmenter(model, held_out, on, progress, labels)
        compressors = {fold: Compressor(model, fold, on, round_to) for fold in model.checkpoints}
        cut, fitted_on = patches(model, fitted_on, max(one.wanted for one in compressors.values()))
        for fold, one in compressors.items():
            progress.say(f"fold {fold}: ranking channels on {len(cut)} patches")
            one.rank(cut)
        if goal is None:
            trials = _trials(next(iter(compressors.items())), segmenter, progress)
        else:
            tolerances = {fold: one.tolerance(goal) for fold, one in compressors.items()}
            found = {}
            for fold, one in compressors.items():
                with progress.bar(f"fold {fold}: merging", len(one.before)) as step:
                    found[fold] = one.compress(tolerances[fold], step)
            scores = segmenter.agreement([one.weights for one in found.values()])
            against = {name: segmenter.against_labels(name) for name in ("old", "new")}
    if goal is None:
        picture = output.with_name(f"{output.name}_trade_off.png")
        print_trials(trials, json_output=json_output)
        plot_trade_off(trials, picture)
        progress.say(f"Wrote {picture} and nothing else. Choose with --tolerance, --macs, ...")
        return
    notes = provenance(model, goal, round_to, fitted_on, found)
    notes["summary"] = _summary(scores, against["new"])
    with tempfile.TemporaryDirectory() as pictures:
        drawn = {fold: plot_widths(one, Path(pictures) / f"{fold}.png") for fold, one in found.items()}
        write_model(model, output, {fold: one.weights for fold, one in found.items()}, notes, drawn)
    for fold, one in found.items():
        if goal.latency is not None and one.seconds[1] > goal.latency * one.seconds[0]:
            left = one.seconds[1] / one.seconds[0]
            progress.say(f"WARNING: fold {fold}: measured again, {left:.0%} of the time is left; this machine is busy")
    print_compressed(found, scores, against, output, json_output=json_output)


def _trials(first: tuple[str, Compressor], segmenter: Segmenter, progress: Progress) -> list[Trial]:
    fold, compressor = first
    trials = []
    for tolerance in TOLERANCES:
        with progress.bar(f"fold {fold}: tolerance {tolerance:g}", len(compressor.before)) as step:
            one = compressor.compress(tolerance, step)
        trials.append(Trial(one, segmenter.agreement([one.weights])))
    return trials


def _summary(scores: Sequence[CaseScore], against_labels: Sequence[CaseScore] | None) -> dict:
    """In the form of nnU-Net's validation/summary.json; it says what it was measured against."""
    measured = against_labels or scores
    return {
        "foreground_mean": {"Dice": mean_score(measured, "dice").value},
        "reference": "labels" if against_labels else "segmentations of the model that was compressed",
        "metric_per_case": [asdict(score) for score in measured],
    }
