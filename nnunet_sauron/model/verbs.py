"""The verb `densify`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verb's options."""
    densify = verbs.add_parser("densify", help="write a pruned checkpoint at its plans' widths, with the same output")
    densify.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the pruned checkpoint, a .pth file")
    densify.add_argument("-o", dest="output", type=Path, metavar="OUT", required=True, help="the checkpoint to write")
    densify.set_defaults(run=_densify)


def _densify(options: argparse.Namespace) -> int:
    from .checkpoints import densify_checkpoint

    densify_checkpoint(options.checkpoint, options.output)
    print(f"Wrote {options.output}")
    return 0
