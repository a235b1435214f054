"""A terminal that shows the user's text as it is: names may have [brackets] and :words:."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text


def plain_console(**options) -> Console:
    """A console without markup, emoji codes and highlighting.

    Args:
        options: Of rich's Console.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


class PlainTable(Table):
    """A table without markup and emoji codes on any console, which folds long names rather than cutting them."""

    def add_column(self, header: str = "", *args, **options) -> None:
        super().add_column(Text(header), *args, **{"overflow": "fold", "min_width": 3, **options})

    def add_row(self, *cells: str, **options) -> None:
        super().add_row(*(Text(cell) for cell in cells), **options)
