"""Errors of others, in words."""

from __future__ import annotations


def in_words(error: BaseException) -> str:
    """What an error says; with its class, where the words alone may tell nothing."""
    return f"{error}" if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {error}"
