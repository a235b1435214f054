"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_folds_and_device(
    verb: argparse.ArgumentParser, *, folds: str = "default 0 to 4, or all where it is alone", device: bool = True
) -> None:
    """What every verb that reads trained models takes, as nnU-Net's own commands spell it."""
    verb.add_argument("-f", dest="folds", metavar="FOLD", nargs="+", help=f"only these, such as 0 1, or all; {folds}")
    name = "checkpoint_final.pth"
    verb.add_argument("-chk", dest="checkpoint", default=name, metavar="NAME", help=f"file in fold_*; default {name}")
    if device:
        verb.add_argument(
            "-device", metavar="DEVICE", help="cpu, cuda, cuda:1 or mps; default cuda where there is a GPU, else cpu"
        )


def whole_numbers(words: Sequence[str], flag: str) -> tuple[int, ...]:
    """Numbers separated by spaces, commas or both."""
    try:
        return tuple(int(word) for word in " ".join(words).replace(",", " ").split())
    except ValueError:
        given = " ".join(words)
        raise ValueError(f"{flag} takes whole numbers, such as 64 64 64 or 64,64,64; got '{given}'.") from None
