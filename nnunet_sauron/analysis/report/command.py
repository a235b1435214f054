"""The verb `report`: measure, write, print."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from ...console.json_output import print_json
from ...console.progress import Progress
from ...console.terminal import plain_console
from ...files import check_writable, write_texts_atomically
from .compare import make_report
from .contents import Report
from .data import as_json, data_files
from .page import page
from .table import print_report


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
    files = {**data_files(made), "report.txt": text.getvalue(), "report.html": page(made)}
    write_texts_atomically(output, files)
    if json_output:
        print_json(as_json(made))
    else:
        console = plain_console()
        print_report(made, console)
        for name in files:
            console.print(f"Wrote {output / name}", soft_wrap=True)
    return made
