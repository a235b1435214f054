"""How verbs and the options that they share are described, and how values are read."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence

WIDTH = 79  # of help


def add_verb(
    verbs: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], summary: str,
    description: str, example: str,
) -> argparse.ArgumentParser:  # fmt: skip
    """Add a verb, for its options to be added.

    Args:
        verbs: The verbs so far.
        name: Its name.
        run: Does it; returns the exit code.
        summary: A line for the list of verbs.
        description: Sentences for the verb's own help.
        example: Words after the verb, which can be pasted.
    """
    verb = verbs.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, WIDTH, break_on_hyphens=False),
        epilog=f"example:\n  {' '.join(['nnUNetv2_sauron', name, example]).rstrip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(run=run, parser=verb)
    return verb


def add_model_options(
    verb: argparse.ArgumentParser,
    *,
    folds: str = "the numbered ones, or all where it is alone",
    checkpoint: str | None = "checkpoint_final.pth",
    device: bool = True,
) -> None:
    """Options of every verb that reads trained models, as nnU-Net's own commands spell them.

    Args:
        verb: Gets the options.
        folds: What is read without -f, in words.
        checkpoint: What is read without -chk; None for the last that a training has written.
        device: Whether the verb runs networks where the user says.
    """
    verb.add_argument(
        "-f", dest="folds", metavar="FOLD", nargs="+", help=f"folds, such as 0 1, or all (default: {folds})"
    )
    verb.add_argument(
        "-chk", dest="checkpoint", default=checkpoint, metavar="NAME",
        help=f"checkpoint in fold_* (default: {checkpoint or 'final, else latest, else best'})",
    )  # fmt: skip
    if device:
        verb.add_argument(
            "-device", metavar="DEVICE", help="cpu, cuda, cuda:1 or mps (default: cuda if there is a GPU, else cpu)"
        )


def add_json(verb: argparse.ArgumentParser) -> None:
    """The option --json."""
    verb.add_argument("--json", action="store_true", help="print JSON instead of a table")


def whole_numbers(words: Sequence[str], flag: str) -> tuple[int, ...]:
    """Numbers separated by spaces, commas or both."""
    try:
        return tuple(int(word) for word in " ".join(words).replace(",", " ").split())
    except ValueError:
        given = " ".join(words)
        raise ValueError(f"{flag} takes whole numbers, such as 64 64 64 or 64,64,64; got '{given}'.") from None
