"""The command `nnUNetv2_sauron` where the runtime is installed by itself."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from . import verbs

WHOLE = "nnunet_sauron"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `predict`, or hand over to the whole package where that is installed.

    Args:
        arguments: The words after the command; by default those it was called with.

    Returns:
        The exit code: 0; 1 if a case failed; 2 after an error; 130 if interrupted.
    """
    if importlib.util.find_spec(WHOLE) is not None:
        from nnunet_sauron.cli import main as whole

        return whole(arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-") and words[0] != "predict":
        print(
            f"nnUNetv2_sauron {words[0]}: only predict is installed here; the other verbs come with the whole of "
            f"nnunet-sauron: run `pip install .` in the top folder of its source.",
            file=sys.stderr,
        )
        return 2
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_sauron", description="Segments images with a bundle. Not a medical device."
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    verbs.add_parsers(parser.add_subparsers(dest="verb", metavar="VERB", title="verbs"))
    options, unknown = parser.parse_known_args(words)
    if unknown:
        getattr(options, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.version:
        from . import __version__

        print(f"nnunet-sauron-runtime {__version__}")
        return 0
    if options.verb is None:
        parser.print_help()
        return 0
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("nnUNetv2_sauron predict: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(
            f"nnUNetv2_sauron predict: the package {error.name} is missing. Install all that the runtime needs, in the "
            f"top folder of its source: pip install ./runtime",
            file=sys.stderr,
        )
        return 2
    except (ValueError, RuntimeError, OSError, MemoryError, ImportError) as error:
        print(f"nnUNetv2_sauron predict: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
