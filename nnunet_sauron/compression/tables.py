"""Tables of a compression for people, and the same as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..console.json_output import print_json
from ..console.numbers import duration, with_prefix
from ..console.terminal import PlainTable, plain_console
from ..model.evaluation import CaseScore, mean_score
from .agreement import Measured
from .compressor import Compressed


def print_compressed(
    found: Mapping[str, Compressed],
    measured: Measured,
    output: Path,
    *,
    json_output: bool,
    predict: str,
    network: Mapping,
    remarks: Sequence[str] = (),
) -> None:
    """Print every fold's layers and costs, the scores, and the command that predicts.

    Args:
        found: By fold.
        measured: The scores.
        output: The new model's folder.
        json_output: Print JSON instead of tables; it also holds the remarks.
        predict: The command.
        network: Of `described_network`.
        remarks: Sentences for the JSON, such as which folds were left out.
    """
    if json_output:
        described = {
            "output": output,
            "predict": predict,
            "remarks": remarks,
            "folds": {fold: one.numbers() for fold, one in found.items()},
            "agreement_dice": per_class(measured.agreement, "dice"),
            "network": network,
            **_against_labels(measured),
        }
        if measured.before_recovery:
            described["agreement_dice_before_recovery"] = per_class(measured.before_recovery, "dice")
        print_json(described)
        return

    console = plain_console()
    for fold, one in found.items():
        console.print(_layers(fold, one))
    if measured.agreement:
        count = len(measured.agreement)
        console.print(_scores(measured))
        console.print(
            f"agreement: new against old segmentations; measured on {count} held-out "
            f"{'image' if count == 1 else 'images'}, without mirroring"
        )
    else:
        console.print(
            "No image was held out, since a single one was used. Give more, or a larger --max-images, to have "
            "segmentations compared."
        )
    if network["assumed"]:
        console.print(network["assumed"], soft_wrap=True)
    if network["differs_from_plans"]:
        console.print(
            f"Its network is that of {network['built_by']}: predicting needs this trainer as well.", soft_wrap=True
        )
    console.print(f"Wrote {output}", soft_wrap=True)
    console.print(f"Predict: {predict}", soft_wrap=True)


def print_trade_off(
    points: Sequence[tuple[Compressed, Measured]], *, json_output: bool, remarks: Sequence[str] = ()
) -> None:
    """Print a row for each tolerance; in JSON, each row holds the remarks."""
    if json_output:
        rows = [
            {
                **one.numbers(),
                "agreement_dice": per_class(measured.agreement, "dice"),
                "remarks": remarks,
                **_against_labels(measured),
            }
            for one, measured in points
        ]
        print_json(rows)
        return

    old = points[0][1].old
    table = PlainTable("tolerance", "channels", "parameters", "MACs", "network time", "Dice, new against old")
    if old:
        table.add_column(f"Dice, labels (old: {_mean_dice(old)})")
    for one, measured in points:
        left = [sum(one.after.values()) / sum(one.before.values())]
        left += [after / before for before, after in (one.parameters, one.macs, one.seconds)]
        scores = [measured.agreement, measured.new] if old else [measured.agreement]
        table.add_row(f"{one.tolerance:.3g}", *(f"{part:.0%}" for part in left), *map(_mean_dice, scores))
    plain_console().print(table)


def per_class(scores: Sequence[CaseScore], metric: str) -> dict[str, float]:
    """Mean of a metric over cases, by class; nan where no case has it."""
    classes = scores[0].classes if scores else ()
    return {name: mean_score(scores, metric, name).value for name in classes}


def _layers(fold: str, one: Compressed) -> PlainTable:
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
    return table


def _scores(measured: Measured) -> PlainTable:
    columns = {"before recovery": per_class(measured.before_recovery, "dice")} if measured.before_recovery else {}
    columns["agreement (Dice)"] = per_class(measured.agreement, "dice")
    for metric, title in (("dice", "Dice {}"), ("hd95", "HD95 {} (mm)")):
        for name, scores in (("old", measured.old), ("new", measured.new)):
            if scores:
                columns[title.format(name)] = per_class(scores, metric)
    table = PlainTable("class", *columns)
    for name in columns["agreement (Dice)"]:
        table.add_row(name, *(_number(values[name]) for values in columns.values()))
    return table


def _against_labels(measured: Measured) -> dict:
    return {
        f"{name}_model": {metric: per_class(scores, metric) for metric in ("dice", "hd95")}
        for name, scores in (("old", measured.old), ("new", measured.new))
        if scores
    }


def _mean_dice(scores: Sequence[CaseScore] | None) -> str:
    return _number(mean_score(scores or (), "dice").value)


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.3f}"
