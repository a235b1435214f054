"""The verb `compress`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console.options import add_folds_and_device


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verb's options."""
    compress = verbs.add_parser("compress", help="make a trained model smaller without training it again")
    folder = {"type": Path, "metavar": "FOLDER", "required": True}
    compress.add_argument("-m", dest="model", **folder, help="a trained model, with plans.json and fold_*")
    compress.add_argument("-i", dest="images", **folder, help="raw images in nnU-Net's naming; no labels needed")
    compress.add_argument("-o", dest="output", **folder, help="the new model; for nnUNetv2_predict_from_modelfolder")
    add_folds_and_device(compress)
    goal = compress.add_mutually_exclusive_group()
    goal.add_argument("--tolerance", type=float, metavar="T", help="what every layer may lose; see --dry-run")
    goal.add_argument("--macs", type=float, metavar="PART", help="part of the multiply-accumulates left, such as 0.5")
    goal.add_argument("--params", type=float, metavar="PART", help="part of the parameters left, such as 0.3")
    goal.add_argument("--latency", type=float, metavar="PART", help="part of the time left, measured on this machine")
    compress.add_argument("--dry-run", action="store_true", help="show what several tolerances give, write no model")
    compress.add_argument("--round-to", type=int, default=1, metavar="N", help="keep widths at multiples of this")
    compress.add_argument(
        "--uniform-stages", action="store_true", help="one width a stage: a plain nnU-Net model, without this package"
    )
    compress.add_argument("--max-images", type=int, default=20, metavar="N", help="use so many images; %(default)s")
    compress.add_argument("--labels", type=Path, metavar="FOLDER", help="reference segmentations of the images")
    compress.add_argument("--recover", type=int, metavar="EPOCHS", help="then learn from the old model on the images")
    compress.add_argument("--recover-steps", type=int, metavar="N", help="steps of such an epoch; 250")
    compress.add_argument("--json", action="store_true", help="print JSON instead of tables")
    compress.set_defaults(run=_compress)


def _compress(options: argparse.Namespace) -> int:
    from .command import compress
    from .compressor import Goal

    targets = options.tolerance, options.macs, options.params, options.latency
    compress(
        options.model,
        options.images,
        options.output,
        None if targets == (None, None, None, None) else Goal(*targets),
        dry_run=options.dry_run,
        folds=options.folds,
        labels=options.labels,
        max_images=options.max_images,
        round_to=options.round_to,
        recover=options.recover,
        recover_steps=options.recover_steps,
        uniform_stages=options.uniform_stages,
        device=options.device,
        checkpoint=options.checkpoint,
        json_output=options.json,
    )
    return 0
