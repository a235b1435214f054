"""The verb `compress`, from its first check to its last line."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..console.progress import Progress
from ..files import check_new
from ..model.cases import check_cases, find_cases
from ..model.checkpoints import CHECKPOINT
from ..model.device import chosen_device
from ..plugin.commands import predict_command
from ..pruning.timing import SCATTER
from .agreement import Measured, Segmenter, split
from .compressor import Compressed
from .goal import Goal
from .images import batches, patches
from .model_compressor import ModelCompressor
from .model_folder import STOCK, TRAINER, notes_of, read_prunable, write_model
from .plots import plot_trade_off
from .recovery import Recovery, recovery_folder
from .stages import check_plain, plain_plans
from .student import RecoverySettings
from .tables import print_compressed, print_trade_off

TOLERANCES = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Options:
    """What to compress, with which images, and where to write it.

    Attributes:
        folder: A trained model's folder.
        images: Raw images in nnU-Net's naming; some of them are held out to measure on.
        output: The new model's folder. It must not exist.
        folds: Only these; None for the numbered ones, or all where it is alone. Each is compressed by itself, but for
            uniform stages.
        labels: Reference segmentations of the images, to score both models against.
        max_images: Use at most this number of images.
        round_to: Widths are multiples of this, up to the channels that there are.
        uniform_stages: Give all layers of a stage, in all folds, one width: the model then needs nnU-Net alone.
        device: As `chosen_device` takes it.
        checkpoint: File name of the checkpoints to read.
    """

    folder: Path
    images: Path
    output: Path
    folds: list[str] | None = None
    labels: Path | None = None
    max_images: int = 20
    round_to: int = 1
    uniform_stages: bool = False
    device: str | None = None
    checkpoint: str = CHECKPOINT

    def check(self) -> None:
        """Raise ValueError or OSError unless the numbers are valid and the output can be written."""
        for flag, number in (("--max-images", self.max_images), ("--round-to", self.round_to)):
            if number < 1:
                raise ValueError(f"{flag} must be at least 1; got {number}.")
        left, hint = recovery_folder(self.output), ""
        if os.path.lexists(self.output) and left.is_dir():
            hint = f" ({left} is the rest of an interrupted --recover and can be removed)"
        check_new(self.output, "a folder", hint)


def compress(
    options: Options, goal: Goal, recovery: RecoverySettings | None = None, *, json_output: bool = False
) -> None:
    """Write a compressed model, and print what it costs and how its segmentations agree with the old ones.

    Args:
        options: The model, the images and the output.
        goal: What to meet.
        recovery: How to train the compressed network with the old one as teacher; None for no training.
        json_output: Print JSON instead of tables.

    Raises:
        OSError, ValueError: The model, the images, the labels, the goal, the device or the output is invalid; nothing
            is written then.
    """
    work = _Work(options)
    recover: Recovery | None = recovery and Recovery(
        work.model, options.output, recovery, work.fitted_on, work.held_out, work.device, work.progress,
        made_with={"goal": asdict(goal), "round_to": options.round_to, "uniform_stages": options.uniform_stages},
    )  # fmt: skip
    with recover or contextlib.nullcontext():
        _compress(work, options, goal, recover, json_output=json_output)


def _compress(work: _Work, options: Options, goal: Goal, recover: Recovery | None, *, json_output: bool) -> None:
    with _nnunet_is_silent():
        inputs = work.begin()
        merged = recover.merged if recover else {}  # of an interrupted run
        if not merged:
            work.compressor.rank(inputs)
            tolerances = work.compressor.tolerances(goal)
            merged = work.compressor.merge(tolerances)
        found, measured = merged, work.measure(merged)
        if recover:
            found = recover.run(merged)
            measured = work.measure(found, before_recovery=measured)
    notes, plans = _notes(work, options, goal, found, measured)
    if recover:
        notes["recovery"] = recover.notes(measured)
    write_model(work.model, options.output, found, notes, plans)
    if recover:
        recover.finish()
    work.remark_undefined([measured])
    work.remark_times(found, goal)
    print_compressed(
        found, measured, options.output, json_output=json_output, network=notes["network"], remarks=work.remarks,
        predict=predict_command(options.output, found, [STOCK] if plans else [TRAINER, *work.own_builder]),
    )  # fmt: skip
    if plans:
        shared = f", shared by {len(found)} folds" if len(found) > 1 else ""
        work.progress.say(
            f"A plain nnU-Net model, which predicts without this package: trainer {STOCK}, plans "
            f"{plans['plans_name']}, {'-'.join(map(str, notes['features_per_stage']))} channels{shared}"
        )


def show_trade_off(options: Options, goal: Goal | None = None, *, json_output: bool = False) -> None:
    """Print what the tolerances of `TOLERANCES`, and the goal's own, cost and keep, for the first fold.

    The trade-off's picture is written beside the output, and nothing else.

    Args:
        options: The model, the images and the output.
        goal: A goal to show as well.
        json_output: Print JSON instead of a table.

    Raises:
        OSError, ValueError: As `compress`.
    """
    work = _Work(options, first_fold_only=True)
    (fold,) = work.model.checkpoints
    with _nnunet_is_silent():
        inputs = work.begin()
        work.compressor.rank(inputs)
        points = []
        for one in dict.fromkeys([*(Goal(tolerance=tolerance) for tolerance in TOLERANCES), *([goal] if goal else [])]):
            tolerances = work.compressor.tolerances(one)
            found = work.compressor.merge(tolerances, f"tolerance {tolerances[fold]:.3g}")
            points.append((found[fold], work.measure(found)))
    points.sort(key=lambda point: point[0].macs[1], reverse=True)
    work.remark_undefined([measured for _, measured in points])
    picture = options.output.with_name(f"{options.output.name}_trade_off.png")
    wrote = f"Wrote {picture} and nothing else"
    try:  # before the table, whose JSON holds the remarks
        plot_trade_off(points, picture)
    except OSError as error:
        work.warn(str(error))
        wrote = "Nothing was written"
    print_trade_off(points, json_output=json_output, remarks=work.remarks)
    work.progress.say(f"{wrote}. Choose with --tolerance, --macs, ...")


def _notes(
    work: _Work, options: Options, goal: Goal, found: dict[str, Compressed], measured: Measured
) -> tuple[dict, dict | None]:
    """For compression.json, and the plans of a model with uniform stages."""
    notes = notes_of(work.model, goal, options.round_to, work.fitted_on, found, measured)
    notes["uniform_stages"] = options.uniform_stages
    if not options.uniform_stages:
        return notes, None
    features = work.compressor.features_per_stage(found)
    plans = plain_plans(work.model, features)
    return {**notes, "features_per_stage": features, "plans": plans["plans_name"]}, plans


class _Work:
    """The model and the images, checked before anything that takes long.

    Attributes:
        model: The model.
        fitted_on, held_out: Images to fit on, and to measure on.
        compressor: Of the model.
        remarks: What the user should know, for the end.
    """

    def __init__(self, options: Options, *, first_fold_only: bool = False):
        options.check()
        self.device, self.progress = chosen_device(options.device), Progress()
        self.model = read_prunable(options.folder, options.folds, options.checkpoint, first_only=first_fold_only)
        self.remarks = self.model.remarks
        if options.uniform_stages:
            check_plain(self.model)
        self.own_builder = [self.model.builder.trainer_name] if self.model.builder.differs else []
        self.fitted_on, self.held_out = split(find_cases(options.images, self.model), options.max_images)
        self._segmenter = Segmenter(self.model, self.held_out, self.device, self.progress, options.labels)
        every_case, references = [*self.fitted_on, *self.held_out], self._segmenter.references
        check_cases(self.model, every_case, self.progress, references, segmented=True)
        with _nnunet_is_silent():
            self.compressor = ModelCompressor(
                self.model, self.device, options.round_to, options.uniform_stages, self.progress
            )

    def begin(self) -> list:
        """Say the remarks so far, and segment the held-out images with the old model, to compare with later.

        Returns:
            Patches to fit on, (B, channels, *patch) each; layers for which they are too few are left alone.
        """
        cut = patches(self.model, self.fitted_on, max(len(self.fitted_on), self.compressor.wanted))
        self.remarks += self.compressor.leave_alone(len(cut))
        self.progress.say(
            f"{len(cut)} patches of {len(self.fitted_on)} images to fit on, {len(self.held_out)} images held out to "
            f"compare segmentations"
        )
        for remark in self.remarks:
            print(remark, file=sys.stderr)
        self._segmenter.segment_with_old_model()
        return batches(cut)

    def measure(self, found: dict[str, Compressed], before_recovery: Measured | None = None) -> Measured:
        """Score networks on the held-out images."""
        weights = [one.weights for one in found.values()]
        return self._segmenter.measure(weights, before_recovery and before_recovery.agreement)

    def remark_undefined(self, measured: Iterable[Measured]) -> None:
        """Say that there was nothing to compare, where that is so."""
        if all(one.undefined for one in measured):
            self.warn("Neither model finds any class in the images held out, so how they agree is not known.")

    def remark_times(self, found: dict[str, Compressed], goal: Goal) -> None:
        """Say that times scatter, and which folds miss a goal of time when they are timed again."""
        if any(one.busy for one in found.values()):
            self.warn(
                f"Network times scatter by more than {SCATTER:.0%}: this machine was busy, and they tell little. Time "
                f"both models with nnUNetv2_sauron benchmark when it is not."
            )
        for fold, one in found.items():
            before, after = one.seconds
            if goal.latency is not None and after > goal.latency * before:
                self.warn(
                    f"Fold {fold}: measured again, {after / before:.0%} of the time is left; this machine is busy."
                )

    def warn(self, text: str) -> None:
        """Say a remark now, and keep it for the end."""
        self.remarks.append(text)
        self.progress.say(f"WARNING: {text}")


def _nnunet_is_silent() -> contextlib.redirect_stdout:
    """nnU-Net prints what it preprocesses, and how."""
    return contextlib.redirect_stdout(io.StringIO())
