"""The command `nnUNetv2_sauron`: one verb for each thing that nnU-Net has no place for."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from nnunet_sauron_runtime import verbs as of_runtime

from .analysis import verbs as of_analysis
from .compression import verbs as of_compression
from .console.json_output import json_alone, send_nowhere, send_to_standard_error
from .demo import verbs as of_demo
from .deploy import verbs as of_deployment
from .model import verbs as of_models
from .planning import verbs as of_planning
from .plugin import verbs as of_plugin
from .plugin.environment import prepare_for_nnunet

# In the order of --help. A verbs.py imports what a verb needs when it runs: `path` stands in shell start-up files,
# where PyTorch's import would be felt.
ROOMS = (of_plugin, of_planning, of_compression, of_deployment, of_runtime, of_analysis, of_models, of_demo)
WITHOUT_NNUNET = ("path", "install", "uninstall", "doctor", "predict")
DEBUG_VARIABLE = "nnunet_sauron_debug"
# What we, nnU-Net and readers of files raise on purpose; a mistake of ours, such as a TypeError, is not hidden.
EXPECTED = (ValueError, RuntimeError, OSError, MemoryError, AssertionError, EOFError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: The words after the command; by default those it was called with.

    Returns:
        The exit code: 0; 1 if `doctor` finds a problem that stops training, if some of the given models could not be
        read, or if the reader of standard output stopped reading; 2 after an error; 130 if interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks an alphabet must not end a verb
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # with the verb's own usage
        getattr(options, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.version:
        from . import __version__

        print(f"nnunet-sauron {__version__}")
        return 0
    if options.verb is None:
        parser.print_help()
        return 0
    try:
        if options.verb not in WITHOUT_NNUNET:
            prepare_for_nnunet()
        with json_alone() if getattr(options, "json", False) else contextlib.nullcontext():
            code = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # now, as long as it can be said that this fails
        if arguments is None and getattr(options, "json", False):
            send_to_standard_error()  # for text that is printed while the process ends
        return code
    except KeyboardInterrupt:
        print(f"nnUNetv2_sauron {options.verb}: interrupted", file=sys.stderr)
        return 130
    except EXPECTED as error:
        nobody_reads = isinstance(error, BrokenPipeError) and _reader_is_gone()
        if isinstance(error, OSError):
            _forget_what_cannot_be_written()
        if nobody_reads:
            return 1
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        print(f"nnUNetv2_sauron {options.verb}: {_words(error)}", file=sys.stderr)
        return 2


def _reader_is_gone() -> bool:
    """Whether standard output was closed at its other end, as `| head -1` does."""
    import select

    if not hasattr(select, "poll"):  # Windows
        return True
    other_end = select.poll()
    other_end.register(1, 0)
    return bool(other_end.poll(0))


def _forget_what_cannot_be_written() -> None:
    """Else it would be tried again, with a traceback, while the process ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        send_nowhere()


def _words(error: Exception) -> str:
    """An error in one line; with its class where the text was not written for the user."""
    # Spaces within a line are left alone, since they may be a path's.
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    of_python = isinstance(error, ModuleNotFoundError)
    if text and isinstance(error, (ValueError, RuntimeError, OSError, MemoryError, ImportError)) and not of_python:
        return text
    where = f"{DEBUG_VARIABLE}=1 in the environment shows where it came from"
    return f"{type(error).__name__}{': ' if text else ''}{text} ({where})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_sauron",
        description="Channel pruning for nnU-Net v2. Once nnU-Net knows the trainers, its own commands do the rest: "
        "nnUNetv2_train DATASET CONFIGURATION FOLD -tr SauronTrainer",
        epilog=f"{DEBUG_VARIABLE}=1 in the environment shows where an error came from.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")

    for room in ROOMS:
        room.add_parsers(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
