"""The verb `compress`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console.options import add_json, add_model_options, add_verb


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verb's options."""
    compress = add_verb(
        verbs, "compress", _compress,
        "make a trained model smaller without training it again",
        "Makes a trained model smaller from raw images, without labels and without training: channels that the others "
        "can stand for are merged into them. With --recover, the small model is then trained with the old one as "
        "teacher, on the same images. The output is a model folder for nnUNetv2_predict_from_modelfolder.",
        "-m MODEL_FOLDER -i imagesTs -o small --macs 0.1 --recover 20",
    )  # fmt: skip
    folder = {"type": Path, "metavar": "FOLDER", "required": True}
    compress.add_argument("-m", dest="model", **folder, help="a trained model, with plans.json and fold_*")
    compress.add_argument("-i", dest="images", **folder, help="raw images in nnU-Net's naming; no labels needed")
    compress.add_argument("-o", dest="output", **folder, help="write the new model here")
    add_model_options(compress)
    goal = compress.add_mutually_exclusive_group()
    goal.add_argument("--tolerance", type=float, metavar="T", help="relative error that each layer may make, such as "
                      "0.02; --dry-run shows several")  # fmt: skip
    goal.add_argument("--macs", type=float, metavar="FRACTION", help="multiply-accumulates left, such as 0.5 for half")
    goal.add_argument("--params", type=float, metavar="FRACTION", help="parameters left, such as 0.3")
    goal.add_argument("--latency", type=float, metavar="FRACTION", help="network time left, measured on this machine")
    compress.add_argument("--dry-run", action="store_true", help="show what several tolerances give, write no model")
    compress.add_argument(
        "--round-to", type=int, default=1, metavar="N", help="make widths multiples of N (default: 1)"
    )
    compress.add_argument(
        "--uniform-stages", action="store_true",
        help="one width for each stage: a plain nnU-Net model, which predicts without this package",
    )  # fmt: skip
    compress.add_argument("--max-images", type=int, default=20, metavar="N", help="use at most N images (default: 20)")
    compress.add_argument("--labels", type=Path, metavar="FOLDER", help="reference segmentations, to score both models")
    compress.add_argument("--recover", type=int, metavar="EPOCHS", help="train the small model with the old one as "
                          "teacher, for at most EPOCHS epochs (default: no training)")  # fmt: skip
    compress.add_argument("--recover-steps", type=int, metavar="N", help="training steps of such an epoch (default: "
                          "250)")  # fmt: skip
    add_json(compress)


def _compress(options: argparse.Namespace) -> int:
    from .command import Options, compress, show_trade_off
    from .goal import Goal
    from .student import STEPS, RecoverySettings

    targets = options.tolerance, options.macs, options.params, options.latency
    goal = None if targets == (None, None, None, None) else Goal(*targets)
    if goal is None and not options.dry_run:
        raise ValueError("Nothing to meet: give --tolerance, --macs, --params or --latency, or --dry-run to see them.")
    if options.recover is None and options.recover_steps is not None:
        raise ValueError("--recover-steps is the length of an epoch of --recover; give --recover EPOCHS as well.")
    if options.recover is not None and options.dry_run:
        raise ValueError("--dry-run writes no model, so there is none to --recover; give one of the two.")
    what = Options(
        folder=options.model, images=options.images, output=options.output, folds=options.folds, labels=options.labels,
        max_images=options.max_images, round_to=options.round_to, uniform_stages=options.uniform_stages,
        device=options.device, checkpoint=options.checkpoint,
    )  # fmt: skip
    if options.dry_run:
        show_trade_off(what, goal, json_output=options.json)
        return 0
    recovery = None
    if options.recover is not None:
        recovery = RecoverySettings(options.recover, STEPS if options.recover_steps is None else options.recover_steps)
    compress(what, goal, recovery, json_output=options.json)
    return 0
