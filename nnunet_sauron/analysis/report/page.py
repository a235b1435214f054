"""`report.html`: the report as one file that opens in any browser and fetches nothing."""

from __future__ import annotations

from datetime import date
from html import escape

from ... import __version__
from .contents import Report
from .plots import pictures
from .table import (
    COST,
    EMPTY,
    QUALITY,
    class_rows,
    comparison_rows,
    fold_rows,
    notes,
    rows,
    stage_rows,
    target_rows,
    width_rows,
)

# Okabe and Ito's colour-blind-safe palette; on white its light colours are darkened, on black its dark ones lightened.
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1a1a1a; --faint: #c4c4c4; --band: #f3f4f6;
  --series-0: #111111; --series-1: #0072b2; --series-2: #c85000; --series-3: #007d5c; --series-4: #b0568c;
  --series-5: #a87000; --series-6: #6a4fb3; --series-7: #777777; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e8e8e8; --faint: #4a4f57; --band: #1f2329;
  --series-0: #ffffff; --series-1: #56b4e9; --series-2: #ff8c42; --series-3: #2fc79b; --series-4: #e79bc4;
  --series-5: #f0c040; --series-6: #b9a3ff; --series-7: #aaaaaa; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.25rem 0.8rem 0.25rem 0; text-align: right; border-bottom: 1px solid var(--faint);
  white-space: nowrap; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  white-space: normal; min-width: 17rem; }
figure { margin: 1.5rem 0; } figcaption { margin-bottom: 0.4rem; }
svg { width: 100%; max-width: var(--width); height: auto; display: block; } svg text { font-family: inherit; }
.problems { background: var(--band); border-left: 4px solid var(--series-2); padding: 0.5rem 1rem; }
.problems li, li { overflow-wrap: anywhere; white-space: pre-wrap; }
thead th { white-space: normal; max-width: 16rem; overflow-wrap: anywhere; } tbody th { font-weight: normal; }
@media (max-width: 40rem) { body { padding: 0.6rem; } th:first-child, td:first-child { min-width: 8rem; }
  svg { min-width: min(40rem, var(--width)); } }
@media print { :root { --paper: #ffffff; --ink: #000000; --faint: #c4c4c4; --band: #ffffff;
  --series-0: #111111; --series-1: #0072b2; --series-2: #c85000; --series-3: #007d5c; --series-4: #b0568c;
  --series-5: #a87000; --series-6: #6a4fb3; --series-7: #777777; } figure { break-inside: avoid; }
  .wide { overflow-x: visible; } table { font-size: 9pt; }
  th, td { white-space: normal; padding-right: 0.4rem; }
  th:first-child, td:first-child { position: static; min-width: 0; } }
"""


def page(report: Report) -> str:
    """The text of a self-contained page in HTML."""
    names = [model.name for model in report.models]
    heads = [name.replace("__", " ") for name in names]
    parts = [f"<h1>Trained models compared</h1><p>{len(names)} models, {date.today().isoformat()}, nnunet-sauron "
             f"{__version__}. The baseline is {escape(report.baseline)}.</p>"]  # fmt: skip
    if report.problems:
        items = "".join(f"<li>{escape(problem)}</li>" for problem in report.problems)
        parts.append(f'<div class="problems"><strong>What is missing</strong><ul>{items}</ul></div>')
    parts.append("<h2>Mean over folds</h2>")
    for caption, found in (
        ("Cost", rows(report, COST) + target_rows(report)),
        ("Quality", rows(report, QUALITY) + rows(report, EMPTY)),
        ("Quality by class", class_rows(report)),
        ("Channels of each stage", stage_rows(report)),
    ):
        if found:
            parts.append(_table(caption, ["", *heads], [[title, *cells] for title, cells in found]))
    for model in report.models:
        if model.differences:
            caption = f"{model.name} minus {report.baseline}"
            heading = ["", "mean [95 % interval]", "p (Wilcoxon)", "cases"]
            parts.append(_table(caption, heading, [list(row) for row in comparison_rows(model)]))
    parts.append("<h2>Pictures</h2>")
    for one in pictures(report):
        caption = f"<strong>{escape(one.title)}.</strong> {escape(one.caption)}"
        parts.append(f'<figure><figcaption>{caption}</figcaption><div class="wide">{one.svg}</div></figure>')
    parts.append("<h2>Every fold</h2>")
    for model in report.models:
        folds, found = fold_rows(model)
        caption = f"{model.name} ({model.trainer}, {model.plans}, {model.configuration}, patch " + " x ".join(
            str(length) for length in model.patch_size
        )
        parts.append(_table(f"{caption})", ["", *folds], [[title, *cells] for title, cells in found]))
        folds, found = width_rows(model)
        if found:
            table = _table("Channels of each layer", ["", *folds], [[title, *cells] for title, cells in found])
            parts.append(f"<details><summary>Channels of each layer</summary>{table}</details>")
    items = "".join(f"<li>{escape(note)}</li>" for note in notes(report))
    parts.append(f"<h2>What the numbers mean</h2><ul>{items}</ul>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Trained models compared</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>' + "\n".join(parts) + "</body></html>\n"
    )


def _table(caption: str, heads: list[str], body: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in body
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
