"""Errors of others, and lists, in words."""

from __future__ import annotations

from collections.abc import Sequence


def in_words(error: BaseException) -> str:
    """What an error says; with its class, where the words alone may tell nothing."""
    return f"{error}" if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {error}"


def first_of(names: Sequence[str], most: int = 5) -> str:
    """The names with commas, and dots in place of those beyond so many."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
