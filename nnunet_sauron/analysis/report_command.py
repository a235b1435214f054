"""The verb `report`: measure, write, print."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from ..json_output import print_json
from ..output_folder import check_writable
from ..terminal import plain_console
from ..trainers.checkpoints import write_atomically
from .progress import Progress
from .report import Report, make_report
from .report_data import TEXT, as_json, write_data
from .report_html import write_html
from .report_table import print_report


def report(folders: Sequence[Path], output: Path, *, json_output: bool = False, **options) -> Report:
    """Compare trained models and write report.json, report.csv, cases.csv, report.txt and report.html into a folder.

    Args:
        folders: The models'.
        output: Made if it is missing; what an earlier report wrote there is replaced.
        json_output: Print JSON instead of tables.
        options: Of `make_report`.

    Returns:
        What was found.

    Raises:
        FileNotFoundError, ValueError: As `make_report`; nothing is written then.
        OSError: The folder cannot be written, which is found out before anything is measured.
    """
    check_writable(output)
    made = make_report(folders, progress=Progress(), **options)
    output.resolve().mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    print_report(made, plain_console(file=text, width=120))
    written = [*write_data(made, output), output / "report.txt", output / "report.html"]
    write_atomically(output / "report.txt", lambda path: Path(path).write_text(text.getvalue(), **TEXT))
    write_html(made, output / "report.html")
    if json_output:
        print_json(as_json(made))
    else:
        console = plain_console()
        print_report(made, console)
        for path in written:
            console.print(f"Wrote {path}", soft_wrap=True)
    return made
