"""The study's table and picture: Dice against multiply-accumulates, every run, mean and range over folds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

BASELINE = "stock"
OURS = ("shrink", "sauron", "compressed")


def read(folder: Path) -> dict[str, list[dict]]:
    """The results of each run, folds in order."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*_fold*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(one["run"], []).append(one)
    return found


def rows(found: dict[str, list[dict]]) -> list[dict]:
    """One row a run, largest network first; differences are to stock's same folds."""
    stock = {one["fold"]: one for one in found.get(BASELINE, [])}
    table = []
    for name, results in found.items():
        compared = [one for one in results if one["fold"] in stock]
        row = {"run": name, "folds": [one["fold"] for one in results]}
        for key in ("dice", "hd95_mm"):
            row[key] = [one[key] for one in results]
            differences = [one[key] - stock[one["fold"]][key] for one in compared]
            row[f"{key}_difference"] = statistics.fmean(differences) if differences else None
        for key in ("macs", "parameters"):
            parts = [one[key] / stock[one["fold"]][key] for one in compared]
            row[key] = statistics.fmean(parts) if parts else None
        table.append(row)
    return sorted(table, key=lambda row: -(row["macs"] or 0))


def write(folder: Path) -> None:
    """Print the table, and write it as table.md beside front.png."""
    table = rows(read(folder))
    lines = ["| run | MACs | parameters | Dice | to stock | HD95, mm | to stock | folds |", "|---" * 8 + "|"]
    for row in table:
        lines.append(
            f"| {row['run']} | {_part(row['macs'])} | {_part(row['parameters'])} | {_values(row['dice'], 3)} | "
            f"{_signed(row['dice_difference'], 3)} | {_values(row['hd95_mm'], 2)} | "
            f"{_signed(row['hd95_mm_difference'], 2)} | {', '.join(map(str, row['folds']))} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw([row for row in table if row["macs"]], folder / "front.png")


def draw(table: list[dict], path: Path) -> None:
    """Dice of each run against its part of stock's MACs; a line from the lowest fold to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for row in table:
        ours = row["run"].startswith(OURS)
        colour = "C0" if ours else "black" if row["run"] == BASELINE else "0.55"
        mean = statistics.fmean(row["dice"])
        axes.plot([row["macs"] * 100] * 2, [min(row["dice"]), max(row["dice"])], color=colour, linewidth=1)
        axes.plot(row["macs"] * 100, mean, "o" if ours else "s", color=colour, markersize=5)
        axes.annotate(row["run"], (row["macs"] * 100, mean), xytext=(5, 0), textcoords="offset points", fontsize=7,
                      color=colour, va="center")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("multiply-accumulates, % of stock nnU-Net's")
    axes.set_ylabel("Dice, validation cases")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _part(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _values(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _signed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"
