"""The verb `demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console.options import add_json, add_verb


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verb's options."""
    demo = add_verb(
        verbs, "demo", _demo,
        "train, prune and predict a generated dataset and compare with stock nnU-Net",
        "Generates a dataset, trains stock nnU-Net, SauronTrainer and ShrinkTrainer on it, compresses the stock model, "
        "and reports on all four; about 7 minutes on two cores. Everything stays in one folder. Interrupted, it "
        "continues when the command is given again.",
        "-o nnunet_sauron_demo",
    )  # fmt: skip
    demo.add_argument("-o", dest="output", type=Path, metavar="FOLDER",
                      help="work in FOLDER (default: nnunet_sauron_demo)")  # fmt: skip
    add_json(demo)


def _demo(options: argparse.Namespace) -> int:
    from .steps import run_demo

    run_demo(options.output, options.json)
    return 0
