"""Numbers as they are shown: with prefixes, as times."""

from __future__ import annotations


def with_prefix(value: float, unit: str = "", digits: int = 3) -> str:
    """A number of a unit with k, M, G or T, such as "1.23 MB".

    Args:
        value: Not negative.
        unit: Its symbol; none for a count.
        digits: Significant ones.
    """
    value = float(f"{value:.{digits}g}")  # before the prefix is chosen: 999.6 million are 1 billion
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.{digits}g} {prefix}{unit}"
    return f"{value:.{digits}g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """A time in seconds, or in milliseconds below one."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
