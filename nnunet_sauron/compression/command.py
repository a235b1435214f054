"""The verb `compress` from its first check to its last line."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ..console.progress import Progress
from ..model.cases import check_cases, find_cases
from ..model.evaluation import CaseScore, mean_score
from ..plugin.commands import predict_command
from ..pruning.timing import chosen_device
from .compressor import Compressor, Goal, Segmenter, provenance, split
from .display import Trial, plot_trade_off, plot_widths, print_compressed, print_trials
from .images import batches, patches
from .model import CHECKPOINT, STOCK, TRAINER, read_prunable, write_model
from .recovery import STEPS, Recovery, RecoverySettings
from .stages import UniformStages, check_plain, features_per_stage, plain_plans

TOLERANCES = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2)


def compress(
    folder: Path,
    images: Path,
    output: Path,
    goal: Goal | None,
    *,
    dry_run: bool = False,
    folds: list[str] | None = None,
    labels: Path | None = None,
    max_images: int = 20,
    round_to: int = 1,
    recover: int | None = None,
    recover_steps: int | None = None,
    uniform_stages: bool = False,
    device: str | None = None,
    checkpoint: str = CHECKPOINT,
    json_output: bool = False,
) -> None:
    """Write a smaller model, or show what sizes cost what.

    Args:
        folder: A trained model's folder.
        images: Raw images in nnU-Net's naming; part of them is held out to measure on.
        output: The new model's folder. Of a dry run, the trade-off's picture goes beside it, and nothing else.
        goal: What to meet; may be None in a dry run.
        dry_run: Show the trade-off over `TOLERANCES`, and the goal's own, instead of writing a model.
        folds: Only these; None for 0 to 4, or all where it is alone. Each is made smaller by itself, but for uniform
            stages.
        labels: Reference segmentations of the images, to measure both models against.
        max_images: So many are used.
        round_to: Widths are multiples of this, where there are as many channels.
        recover: At most so many epochs of learning from the old model on the images that were fitted on.
        recover_steps: Of such an epoch; None for nnU-Net's 250.
        uniform_stages: Give all layers of a stage, in all folds, one width: the model needs nnU-Net alone then.
        device: As `chosen_device` takes it.
        checkpoint: File name of the checkpoints to read.
        json_output: Print JSON instead of tables.

    Raises:
        FileExistsError: The output folder exists.
        FileNotFoundError, PermissionError, ValueError: The model, the images, the labels, the goal, the device or the
            place to write to do not do; nothing is written then.
    """
    if goal is None and not dry_run:
        raise ValueError("Nothing to meet: give --tolerance, --macs, --params or --latency, or --dry-run to see them.")
    if recover is None and recover_steps is not None:
        raise ValueError("--recover-steps says how long an epoch of --recover is; give --recover EPOCHS as well.")
    if recover is not None and dry_run:
        raise ValueError("--dry-run writes no model, so there is none to --recover; give one of the two.")
    lessons = None if recover is None else RecoverySettings(recover, STEPS if recover_steps is None else recover_steps)
    if os.path.lexists(output):  # also a link that leads nowhere
        raise FileExistsError(f"{output} exists; give the name of a folder that does not.")
    if max_images < 1:
        raise ValueError(f"--max-images must be at least 1; got {max_images}.")
    if round_to < 1:
        raise ValueError(f"--round-to must be at least 1; got {round_to}.")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"{output.absolute().parent} is no folder; make it first, or give another -o.")
    if not os.access(output.absolute().parent, os.W_OK):
        raise PermissionError(f"{output.absolute().parent} cannot be written to; give another -o.")
    on = chosen_device(device)
    model = read_prunable(folder, folds, checkpoint)
    remarks = model.remarks
    if uniform_stages:
        check_plain(model)
    fitted_on, held_out = split(find_cases(images, model), max_images)
    if dry_run:  # one fold shows it, and is compared with itself alone
        model = replace(model, checkpoints=dict([next(iter(model.checkpoints.items()))]))
    progress = Progress()
    segmenter = Segmenter(model, held_out, on, progress, labels)
    check_cases(model, [*fitted_on, *held_out], progress, segmenter.references)
    recovery = None
    if lessons:
        made_with = {"goal": asdict(goal), "round_to": round_to, "uniform_stages": uniform_stages}
        recovery = Recovery(model, output, lessons, fitted_on, held_out, on, progress, made_with)
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net's prediction prints a line a case
        compressors = {fold: Compressor(model, fold, on, round_to) for fold in model.checkpoints}
        cut, fitted_on = patches(model, fitted_on, max(len(fitted_on), *(one.wanted for one in compressors.values())))
        for fold, one in compressors.items():
            if too_few := one.leave_alone(len(cut)):
                remarks.append(f"Fold {fold}: {too_few}")
        for remark in remarks:
            print(remark, file=sys.stderr)
        inputs = batches(cut)
        progress.say(
            f"{len(cut)} patches of {len(fitted_on)} images to fit on, {len(held_out)} images held out to compare "
            f"segmentations"
        )
        segmenter.segment_with_old_model()
        old = segmenter.against_labels("old")
        found = dict(recovery.found) if recovery else {}
        unmade = {} if found else compressors
        for fold, one in unmade.items():
            with progress.bar(f"fold {fold}: ranking channels", one.probes(inputs)) as step:
                one.rank(inputs, after_probe=step)
        uniform = UniformStages(list(compressors.values()), round_to) if uniform_stages and unmade else None
        if uniform and goal:
            tolerances = dict.fromkeys(unmade, uniform.tolerance(goal))
        else:
            tolerances = {fold: one.tolerance(goal) for fold, one in unmade.items()} if goal else {}
        if dry_run:
            ((fold, compressor),) = compressors.items()
            every = sorted({*TOLERANCES, *tolerances.values()})
            trials = _trials(fold, compressor, every, segmenter, progress, uniform)
        else:
            for fold, one in unmade.items():
                with progress.bar(f"fold {fold}: merging", len(one.before)) as step:
                    widths = uniform and uniform.widths(tolerances[fold])
                    found[fold] = one.compress(tolerances[fold], step, widths)
            scores, before = segmenter.agreement([one.weights for one in found.values()]), None
            if recovery:
                before, found = scores, recovery.run(found)
                scores = segmenter.agreement([one.weights for one in found.values()])
            against = {"old": old, "new": segmenter.against_labels("new")}
    agreements = [trial.agreement for trial in trials] if dry_run else [scores]
    if held_out and all(math.isnan(mean_score(one, "dice").value) for one in agreements):
        remarks.append("Neither model finds any class in the images held out, so how they agree is not known.")
        progress.say(f"WARNING: {remarks[-1]}")
    if dry_run:
        picture = output.with_name(f"{output.name}_trade_off.png")
        print_trials(trials, old, json_output=json_output, remarks=remarks)
        plot_trade_off(trials, picture)
        progress.say(f"Wrote {picture} and nothing else. Choose with --tolerance, --macs, ...")
        return
    notes = provenance(model, goal, round_to, fitted_on, found)
    notes["uniform_stages"] = uniform_stages
    notes["summary"] = _summary(scores, against["new"])
    if recovery:
        notes["recovery"] = recovery.notes(before, scores)
    plans = None
    if uniform_stages:
        one = next(iter(found.values()))
        notes["features_per_stage"] = features_per_stage(compressors[next(iter(found))].network, one.after)
        plans = plain_plans(model, notes["features_per_stage"])
        notes["plans"] = plans["plans_name"]
    with tempfile.TemporaryDirectory() as pictures:
        drawn = {fold: plot_widths(one, Path(pictures) / f"{fold}.png") for fold, one in found.items()}
        write_model(model, output, {fold: one.weights for fold, one in found.items()}, notes, drawn, plans)
    if recovery:
        recovery.finish()
    for fold, one in found.items():
        if goal.latency is not None and one.seconds[1] > goal.latency * one.seconds[0]:
            left = one.seconds[1] / one.seconds[0]
            remarks.append(f"Fold {fold}: measured again, {left:.0%} of the time is left; this machine is busy.")
            progress.say(f"WARNING: {remarks[-1]}")
    needed = [STOCK] if plans else [TRAINER, *([model.builder.trainer_name] if model.builder.differs else [])]
    predict = predict_command(output, found, needed)
    print_compressed(
        found, scores, against, output,
        json_output=json_output, predict=predict, network=notes["network"], remarks=remarks, before_recovery=before,
    )  # fmt: skip
    if plans:
        shared = f", shared by {len(found)} folds" if len(found) > 1 else ""
        progress.say(
            f"A plain nnU-Net model, which predicts without this package: trainer {STOCK}, plans "
            f"{plans['plans_name']}, {'-'.join(map(str, notes['features_per_stage']))} channels{shared}"
        )


def _trials(
    fold: str,
    compressor: Compressor,
    tolerances: Sequence[float],
    segmenter: Segmenter,
    progress: Progress,
    uniform: UniformStages | None,
) -> list[Trial]:
    trials = []
    for tolerance in tolerances:
        with progress.bar(f"fold {fold}: tolerance {tolerance:.3g}", len(compressor.before)) as step:
            one = compressor.compress(tolerance, step, uniform and uniform.widths(tolerance))
        trials.append(Trial(one, segmenter.agreement([one.weights]), segmenter.against_labels("new")))
    return trials


def _summary(agreement: Sequence[CaseScore], against_labels: Sequence[CaseScore] | None) -> dict:
    """In the form of nnU-Net's validation/summary.json, whose Dice is always one against references."""
    summary = {
        "agreement_with_the_old_model": {"Dice": mean_score(agreement, "dice").value},
        "foreground_mean": {"Dice": math.nan},
        "metric_per_case": [],
    }
    if against_labels:
        summary["foreground_mean"]["Dice"] = mean_score(against_labels, "dice").value
        summary["metric_per_case"] = [asdict(score) for score in against_labels]
    return summary
