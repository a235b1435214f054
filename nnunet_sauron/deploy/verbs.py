"""The verb `export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console.options import add_json, add_model_options, add_verb

CARD = ("name", "description", "licence", "authors", "intended_use")


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verb's options."""
    export = add_verb(
        verbs, "export", _export,
        "write a trained model as a bundle, for machines without PyTorch",
        "Writes a trained model with its whole pipeline as a bundle, one ONNX file per fold and one JSON, and compares "
        "it with PyTorch. `predict` segments with it where neither PyTorch nor nnU-Net is installed.",
        "-m nnUNetTrainer__nnUNetPlans__2d -f 0 -o hippocampus.zip",
    )  # fmt: skip
    folder = {"type": Path, "metavar": "FOLDER"}
    export.add_argument("-m", dest="model", **folder, required=True, help="a trained model, with plans.json and fold_*")
    export.add_argument(
        "-o", dest="output", type=Path, metavar="BUNDLE", required=True, help="a new file NAME.zip, or a new folder"
    )
    add_model_options(export, device=False)
    export.add_argument(
        "--previous-stage", **folder, help="of a cascade: the model of 3d_lowres, same folds (default: none)"
    )
    export.add_argument("--precision", choices=("float32", "float16", "int8"), default="float32",
                        help="of the weights, and for int8 of convolutions (default: float32)")  # fmt: skip
    export.add_argument("-i", dest="images", **folder, help="raw images to check on; int8 is calibrated on them")
    export.add_argument("--card", type=Path, metavar="FILE", help=f"JSON with {', '.join(CARD)}")
    for field in CARD:
        export.add_argument(f"--{field.replace('_', '-')}", metavar="TEXT", help="of the card")
    add_json(export)


def _export(options: argparse.Namespace) -> int:
    from .command import export

    export(
        options.model,
        options.output,
        folds=options.folds,
        checkpoint=options.checkpoint,
        previous_stage=options.previous_stage,
        precision=options.precision,
        images=options.images,
        card_file=options.card,
        card={field: getattr(options, field) for field in CARD if getattr(options, field) is not None},
        json_output=options.json,
    )
    return 0
