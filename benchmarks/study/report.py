"""The study's table and picture: Dice against multiply-accumulates, every run, mean and range over folds."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from nnunet_sauron.analysis.report.paired import paired_difference
from nnunet_sauron.files import write_text_atomically

BASELINE = "stock"
OURS = ("shrink", "sauron", "compressed")
LEFT = 0.07  # of stock's MACs: names of smaller networks stand left of their marks, where nothing else does
SCRATCH = "scratch"  # of our widths, by stock nnU-Net
HEAD = (
    "run", "MACs", "parameters", "Dice", "to stock", "95 % of cases", "HD95, mm", "to stock", "epochs", "minutes",
    "folds",
)  # fmt: skip


def write(folder: Path, missing: Sequence[tuple[str, int]] = ()) -> None:
    """Print the table and what is missing in it, and write it as table.md beside front.png.

    Args:
        folder: Of the results.
        missing: Name and fold of runs that have none yet.
    """
    table = rows(read(folder))
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in table:
        cells = (
            row["run"], _part(row["macs"]), _part(row["parameters"]), _values(row["dice"], 3),
            _signed(row["dice_difference"], 3), _interval(row["interval"]),
            _values(row["hd95_mm"], 2), _signed(row["hd95_mm_difference"], 2),
            _sum(row["epochs"], 0), _sum(row["minutes"], 0), ", ".join(map(str, row["folds"])),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    by_run: dict[str, list[int]] = {}
    for name, fold in missing:
        by_run.setdefault(name, []).append(fold)
    if by_run:
        waiting = (f"{name} (fold {', '.join(map(str, folds))})" for name, folds in by_run.items())
        lines += ["", f"Not there yet: {'; '.join(waiting)}."]
    text = "\n".join(lines) + "\n"
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "table.md", text)
    draw([row for row in table if row["macs"]], folder / "front.png")


def read(folder: Path) -> dict[str, list[dict]]:
    """The results of each run, folds in order."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*_fold*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(one["run"], []).append(one)
    return found


def rows(found: dict[str, list[dict]]) -> list[dict]:
    """One row a run, largest network first; differences are to the mean of stock's trainings of the same folds, and
    means over folds of those over a fold's trainings.

    `interval` is the 95 % bootstrap interval of the Dice difference over cases, of the trainings whose cases are known.
    `epochs` and `minutes` of training are means over folds: those of the model that the run starts from or learns from,
    if there is one, then its own. A GPU's minutes are left out, and all of them where a part was trained on one alone.
    """
    stock: dict[int, list[dict]] = {}
    for one in found.get(BASELINE, []):
        stock.setdefault(one["fold"], []).append(one)

    def of_stock(fold: int, key: str) -> float:
        return statistics.fmean(one[key] for one in stock[fold])

    table = []
    for name, results in found.items():
        compared = [one for one in results if one["fold"] in stock]
        row = {"run": name, "folds": [one["fold"] for one in results], "widths": results[0].get("widths")}
        row["interval"] = None if name == BASELINE else _of_cases(results, found.get(BASELINE, []))
        for key in ("dice", "hd95_mm"):
            row[key] = [one[key] for one in results]
            differences = [one[key] - of_stock(one["fold"], key) for one in compared]
            row[f"{key}_differences"] = differences
            of_folds: dict[int, list[float]] = {}
            for one, difference in zip(compared, differences, strict=True):
                of_folds.setdefault(one["fold"], []).append(difference)
            row[f"{key}_difference"] = statistics.fmean(map(statistics.fmean, of_folds.values())) if of_folds else None
        for key in ("macs", "parameters"):
            parts = [one[key] / of_stock(one["fold"], key) for one in compared]
            row[key] = statistics.fmean(parts) if parts else None
        before = results[0]["start"] or results[0].get("teacher")
        stages = [stage for stage in (found.get(before), results) if stage]
        times = [[one["epoch_seconds"] for one in stage] for stage in stages]
        on_cpu = [[one["epoch_seconds"] for one in stage if not one["machine"]["gpu"]] for stage in stages]
        row["epochs"] = [statistics.fmean(map(len, of_folds)) for of_folds in times]
        row["minutes"] = [statistics.fmean(map(sum, of_folds)) / 60 for of_folds in on_cpu] if all(on_cpu) else []
        table.append(row)
    return sorted(table, key=lambda row: -(row["macs"] or 0))


def _of_cases(results: Sequence[dict], stock: Sequence[dict]) -> tuple[float, float] | None:
    """Low and high of the mean difference over cases, each the mean of its trainings; None where a fold is unknown."""
    values, baseline = _cases(results), _cases(stock)
    cases = sorted(values.keys() & baseline.keys())
    if not cases or {fold for fold, _ in cases} != {one["fold"] for one in results}:
        return None
    found = paired_difference([values[case] for case in cases], [baseline[case] for case in cases])
    return found.low, found.high


def _cases(results: Sequence[dict]) -> dict[tuple[int, str], float]:
    dice: dict[tuple[int, str], list[float]] = {}
    for one in results:
        for case, value in one.get("case_dice", {}).items():
            dice.setdefault((one["fold"], case), []).append(value)
    return {case: statistics.fmean(values) for case, values in dice.items()}


def draw(table: list[dict], path: Path) -> None:
    """Each run's Dice above stock's on the same fold, against its part of stock's MACs; lines join the folds.

    Marks of one training alone are hollow.

    Args:
        table: Rows with `run`, `macs`, `dice_difference` and `dice_differences`.
        path: The picture.
    """
    figure, axes = plt.subplots(figsize=(12, 8), layout="constrained")
    axes.axhline(0, color="0.85", linewidth=1, zorder=0)
    for row in table:
        ours = row["run"].lower().startswith(OURS) and not row["run"].endswith(SCRATCH)
        colour = "C0" if ours else "black" if row["run"] == BASELINE else "0.55"
        differences = row["dice_differences"]
        axes.plot([row["macs"] * 100] * 2, [min(differences), max(differences)], color=colour, linewidth=1)
        inside = colour if len(differences) > 1 else "white"
        axes.plot(*_place(row), "o" if ours else "s", color=colour, markerfacecolor=inside, markersize=5)
    axes.set_xscale("log")
    axes.set_xlabel("multiply-accumulates, % of stock nnU-Net's")
    axes.set_ylabel("Dice minus stock nnU-Net's on the same fold")
    axes.set_xticks([1, 2, 5, 10, 25, 50, 100], labels=["1", "2", "5", "10", "25", "50", "100"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    if table:
        _label(figure, axes, table)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _place(row: dict) -> tuple[float, float]:
    return row["macs"] * 100, row["dice_difference"]


def _label(figure, axes, table: list[dict]) -> None:
    """Names beside the marks, moved up or down where they would lie on each other."""
    axes.margins(x=0.2)
    figure.draw_without_rendering()
    taken: list[tuple[float, float]] = []
    for row in sorted(table, key=lambda row: _place(row)[1]):
        place = _place(row)
        x, mark = axes.transData.transform(place)
        height = 11 * figure.dpi / 100
        nearest = (way * step for step in itertools.count() for way in (1, -1))
        own = next(
            own for own in nearest
            if not any(abs(x - other) < 170 and abs(mark + own - at) < height for other, at in taken)
        )  # fmt: skip
        taken.append((x, mark + own))
        left = row["macs"] < LEFT
        axes.annotate(
            row["run"], place, xytext=(-6 if left else 6, own * 72 / figure.dpi), textcoords="offset points",
            fontsize=7, va="center", ha="right" if left else "left",
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": "0.7"} if abs(own) > height else None,
        )  # fmt: skip


def _part(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _values(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _sum(values: list[float], digits: int) -> str:
    return " + ".join(f"{value:.{digits}f}" for value in values) or "-"


def _signed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else " to ".join(_signed(end, 3) for end in ends)
