"""What compressing did: progress while it runs, a table and pictures after it, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..console.json_output import print_json
from ..console.numbers import duration, with_prefix
from ..console.terminal import PlainTable, plain_console
from ..model.evaluation import CaseScore, mean_score
from ..model.history import draw_widths
from .compressor import Compressed

Scores = Sequence[CaseScore]


@dataclass(frozen=True)
class Trial:
    """What one tolerance gives: the network, how its segmentations agree with the old ones, and with labels if any."""

    compressed: Compressed
    agreement: Scores
    against_labels: Scores | None = None


def print_compressed(
    found: Mapping[str, Compressed],
    agreement: Scores,
    against_labels: Mapping[str, Scores | None],
    output: Path,
    *,
    json_output: bool,
    predict: str,
    network: Mapping,
    remarks: Sequence[str] = (),
    before_recovery: Scores | None = None,
) -> None:
    """Every fold's layers, what they cost, how far the segmentations changed, by then and before a recovery, and the
    command that predicts; as JSON also what has been remarked, such as folds left out."""
    if json_output:
        described = {
            "output": output,
            "predict": predict,
            "remarks": remarks,
            "folds": {fold: described_fold(one) for fold, one in found.items()},
            "agreement_dice": per_class(agreement, "dice"),
            "network": network,
            **_against_labels(against_labels),
        }
        if before_recovery:
            described["agreement_dice_before_recovery"] = per_class(before_recovery, "dice")
        print_json(described)
        return

    console = plain_console()
    for fold, one in found.items():
        table = PlainTable(f"fold {fold}", "before", "after", "left", title=f"tolerance {one.tolerance:.4g}")
        for name, width in one.before.items():
            left = "left alone" if name in one.left_alone else f"{one.after[name] / width:.0%}"
            table.add_row(name, str(width), str(one.after[name]), left)
        table.add_section()
        for label, (before, after), show in (
            ("parameters", one.parameters, with_prefix),
            ("MACs of one patch", one.macs, with_prefix),
            ("network time of one patch", one.seconds, duration),
        ):
            table.add_row(label, show(before), show(after), f"{after / before:.0%}")
        console.print(table)
    if agreement:
        columns = {"before recovery": per_class(before_recovery, "dice")} if before_recovery else {}
        columns["agreement (Dice)"] = per_class(agreement, "dice")
        for metric, unit in (("dice", ""), ("hd95", " (mm)")):
            for name, scores in against_labels.items():
                if scores:
                    columns[f"{'Dice' if metric == 'dice' else 'HD95'} {name}{unit}"] = per_class(scores, metric)
        table = PlainTable("class", *columns)
        for name in columns["agreement (Dice)"]:
            table.add_row(name, *(_number(values[name]) for values in columns.values()))
        console.print(table)
        console.print(
            f"agreement: new against old segmentations; measured on {len(agreement)} held-out "
            f"{'image' if len(agreement) == 1 else 'images'}, without mirroring"
        )
    else:
        console.print("No image was held out: a single one was given. Give more to have segmentations compared.")
    if network["assumed"]:
        console.print(network["assumed"], soft_wrap=True)
    if network["differs_from_plans"]:
        console.print(
            f"Its network is that of {network['built_by']}: predicting needs this trainer as well.", soft_wrap=True
        )
    console.print(f"Wrote {output}", soft_wrap=True)
    console.print(f"Predict: {predict}", soft_wrap=True)


def print_trials(
    trials: Sequence[Trial], old: Scores | None, *, json_output: bool, remarks: Sequence[str] = ()
) -> None:
    """One row a tolerance; `old` is the old model against labels, if any. In JSON, each row has the remarks."""
    if json_output:
        rows = [
            {
                **described_fold(trial.compressed),
                "agreement_dice": per_class(trial.agreement, "dice"),
                "remarks": remarks,
                **_against_labels({"old": old, "new": trial.against_labels}),
            }
            for trial in trials
        ]
        print_json(rows)
        return

    table = PlainTable("tolerance", "channels", "parameters", "MACs", "network time", "Dice, new against old")
    if old:
        table.add_column(f"Dice, labels (old: {_number(_mean_dice(old))})")
    for trial in trials:
        one = trial.compressed
        shares = [sum(one.after.values()) / sum(one.before.values())]
        shares += [after / before for before, after in (one.parameters, one.macs, one.seconds)]
        scores = [trial.agreement, trial.against_labels] if old else [trial.agreement]
        table.add_row(
            f"{one.tolerance:.3g}", *(f"{share:.0%}" for share in shares), *(_number(_mean_dice(s)) for s in scores)
        )
    plain_console().print(table)


def plot_trade_off(trials: Sequence[Trial], path: Path) -> None:
    """Agreement against what is left of MACs and parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    dice = [_mean_dice(trial.agreement) for trial in trials]
    for label, attribute, marker in (("MACs", "macs", "o"), ("parameters", "parameters", "s")):
        left = [100 * getattr(t.compressed, attribute)[1] / getattr(t.compressed, attribute)[0] for t in trials]
        axes.plot(left, dice, marker=marker, label=label)
        if attribute == "macs":
            for x, y, trial in zip(left, dice, trials, strict=True):
                axes.annotate(f"{trial.compressed.tolerance:.3g}", (x, y), (-5, 4), textcoords="offset points",
                              fontsize=8, ha="right")  # fmt: skip
    axes.set(xlabel="left of the old model (%)", ylabel="Dice, new against old segmentations")
    axes.margins(0.1)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_widths(one: Compressed, path: Path) -> Path:
    """Channels of every layer, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.22 * len(one.before) + 1), layout="constrained")
    axes = figure.subplots()
    draw_widths(axes, one.before, one.after, ("before", "after"), ("0.85", "C0"))
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def described_fold(one: Compressed) -> dict:
    """A compressed network in numbers."""
    return {key: value for key, value in vars(one).items() if key != "weights"}


def per_class(scores: Scores, metric: str) -> dict[str, float]:
    """Mean of a metric over cases, by class; nan where no case has it."""
    classes = scores[0].classes if scores else ()
    return {name: mean_score(scores, metric, name).value for name in classes}


def _against_labels(by_model: Mapping[str, Scores | None]) -> dict:
    return {
        f"{name}_model": {metric: per_class(scores, metric) for metric in ("dice", "hd95")}
        for name, scores in by_model.items()
        if scores
    }


def _mean_dice(scores: Scores | None) -> float:
    return mean_score(scores, "dice").value if scores else math.nan


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.3f}"
