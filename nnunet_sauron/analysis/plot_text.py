"""Text of the user's in matplotlib's pictures, as it is."""

from __future__ import annotations

from matplotlib import font_manager

# Fonts with the alphabets that matplotlib's own, DejaVu Sans, lacks, on Linux, Windows and macOS.
MORE_ALPHABETS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "WenQuanYi Micro Hei", "Microsoft YaHei", "Yu Gothic",
    "Malgun Gothic", "Nirmala UI", "PingFang SC", "Hiragino Sans", "Arial Unicode MS", "Noto Sans Devanagari",
    "Noto Sans Thai",
)  # fmt: skip


def as_is(text: str) -> str:
    """Text for matplotlib: $ begins no formula, a legend shows it even if it begins with an _, and bytes that are no
    text, as a file's name may hold, are escaped."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text  # a space without width


def font_families() -> list[str]:
    """For the setting font.family: matplotlib's own font, and those for other alphabets that are installed."""
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in MORE_ALPHABETS if name in installed)]
