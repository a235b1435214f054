"""The verb `demo`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verb's options."""
    demo = verbs.add_parser("demo", help="train, prune and predict a generated dataset and compare with stock nnU-Net")
    demo.add_argument("-o", dest="output", type=Path, metavar="FOLDER", help="work here; default ./nnunet_sauron_demo")
    demo.add_argument("--json", action="store_true", help="print JSON instead of a table")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from .steps import run_demo

    run_demo(options.output, options.json)
    return 0
