"""The verb `report`: measure, write, print."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..trainers.checkpoints import write_atomically
from .report import make_report
from .report_data import as_json, write_data
from .report_html import write_html
from .report_table import print_report


def report(folders: Sequence[Path], output: Path, *, json_output: bool = False, **options) -> list[Path]:
    """Compare trained models and write report.html, report.txt, report.json, report.csv and cases.csv into a folder.

    Args:
        folders: The models'.
        output: Made if it is missing; what an earlier report wrote there is replaced.
        json_output: Print JSON instead of tables.
        options: Of `make_report`.

    Returns:
        What was written.

    Raises:
        FileNotFoundError, ValueError: As `make_report`; nothing is written then.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; give the name of a folder with -o.")
    made = make_report(folders, say=lambda text: print(text, file=sys.stderr), **options)
    output.mkdir(parents=True, exist_ok=True)
    page = output / "report.html"
    write_html(made, page)
    text = io.StringIO()
    print_report(made, Console(file=text, width=120))
    write_atomically(output / "report.txt", lambda path: Path(path).write_text(text.getvalue(), encoding="utf-8"))
    written = [page, output / "report.txt", *write_data(made, output)]
    if json_output:
        print(json.dumps(as_json(made), indent=1))
    else:
        console = Console()
        print_report(made, console)
        for path in written:
            console.print(f"Wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return written
