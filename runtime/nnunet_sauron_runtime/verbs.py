"""The options of `predict`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verb's options."""
    predict = verbs.add_parser(
        "predict",
        help="segment images with a bundle, without PyTorch or nnU-Net",
        description="Segments images with a bundle that `nnUNetv2_sauron export` wrote, as nnU-Net does, without "
        "PyTorch or nnU-Net. A case that fails is reported, and the others go on.",
        epilog="example:\n  nnUNetv2_sauron predict -b hippocampus.zip -i imagesTs -o out",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.add_argument(
        "-b", dest="bundle", type=Path, metavar="BUNDLE", required=True, help="a bundle, zip or folder"
    )
    predict.add_argument(
        "-i", dest="input", type=Path, metavar="IN", help="folder with CASE_0000.nii.gz, ... or one image"
    )
    predict.add_argument("-o", dest="output", type=Path, metavar="OUT", help="folder for CASE.nii.gz, ...")
    predict.add_argument("--check", action="store_true", help="verify the bundle, segment a built-in image, and stop")
    predict.add_argument("--engine", help="openvino (default) or onnxruntime")
    # What nnU-Net calls otherwise has its name as well.
    predict.add_argument(
        "--step", "-step_size", type=float, help="distance of tiles in patches (default: 0.5, as nnU-Net)"
    )
    predict.add_argument(
        "--no-mirroring", "--disable_tta", action="store_true",
        help="do not average over mirrored images: up to 8 times faster",
    )  # fmt: skip
    predict.add_argument("--threads", type=int, help="processor threads (default: all)")
    predict.add_argument(
        "--max-memory", type=float, metavar="GB", help="beyond it, logits are kept in a temporary file, which is slower"
    )
    predict.add_argument(
        "--save-probabilities", "--save_probabilities", action="store_true",
        help="also write CASE.npz, as nnU-Net does; takes memory",
    )  # fmt: skip
    predict.add_argument(
        "--continue-prediction", "--continue_prediction", action="store_true",
        help="skip cases that are segmented already",
    )  # fmt: skip
    predict.set_defaults(run=_predict, parser=predict)


def _predict(options: argparse.Namespace) -> int:
    from .bundle import Bundle
    from .engines import DEFAULT
    from .manifest import check_step
    from .prediction import Request, check, predict_folder

    if not options.check and (options.input is None or options.output is None):
        raise ValueError("predict needs -i IN and -o OUT; or --check, which needs neither.")
    if options.step is not None:
        check_step(options.step)
    bundle = Bundle(
        options.bundle,
        engine=options.engine or DEFAULT,
        threads=options.threads,
        max_memory=options.max_memory,
    )
    if options.check:
        check(bundle, print)
        return 0
    request = Request(
        options.output,
        options.step,
        not options.no_mirroring,
        options.save_probabilities,
        options.continue_prediction,
    )
    failed = predict_folder(bundle, options.input, request)
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
