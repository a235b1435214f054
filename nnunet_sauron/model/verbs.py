"""The verb `densify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console.options import add_verb


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verb's options."""
    densify = add_verb(
        verbs, "densify", _densify,
        "write a pruned checkpoint at its plans' widths, with the same output",
        "Pads a pruned checkpoint with zeros to the widths of its plans. The output of the network stays the same, and "
        "nnU-Net can take the checkpoint for -pretrained_weights.",
        "fold_0/checkpoint_final.pth -o dense.pth",
    )  # fmt: skip
    densify.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the pruned checkpoint, a .pth file")
    densify.add_argument("-o", dest="output", type=Path, metavar="OUT", required=True, help="the checkpoint to write")


def _densify(options: argparse.Namespace) -> int:
    from .checkpoints import densify_checkpoint
    from .networks import builder_of

    written = densify_checkpoint(options.checkpoint, options.output)
    print(f"Wrote {options.output}")
    builder = builder_of(written, options.checkpoint)
    if builder and builder.differs:
        print(
            f"The weights are of the network that {builder.trainer_name} builds, which is another one than its plans "
            f"describe: they compute the same only where a trainer builds that network."
        )
    if builder and builder.assumed:
        print(builder.assumed)
    return 0
