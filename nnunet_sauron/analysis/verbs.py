"""The verbs `report`, `benchmark`, `feature_maps` and `clusterability`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..console.options import add_folds_and_device, whole_numbers


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verbs' options."""
    _add_report(verbs)
    _add_benchmark(verbs)
    _add_feature_maps(verbs)
    _add_clusterability(verbs)


def _add_report(verbs: argparse._SubParsersAction) -> None:
    folders = {"type": Path, "nargs": "+", "metavar": "MODEL_FOLDER"}
    report = verbs.add_parser("report", help="compare trained models: cost, time, quality; as table, data and page")
    report.add_argument(
        "models", **folders, help="Trainer__Plans__configuration folders, or bundles; the first is the baseline"
    )
    report.add_argument("-o", dest="output", type=Path, metavar="FOLDER", required=True, help="write the report here")
    report.add_argument("--baseline", type=Path, metavar="MODEL_FOLDER", help="compare with this one of the models")
    report.add_argument(
        "--predictions", nargs="+", metavar="FOLDER", default=[],
        help="segmentations to score for each model, in their order; the word validation for a model's own",
    )  # fmt: skip
    report.add_argument("--labels", type=Path, metavar="FOLDER", help="references; default those of the validation")
    report.add_argument("--tolerance", type=float, default=1.0, metavar="MM", help="of surface Dice, %(default)s mm")
    report.add_argument(
        "--timing", type=float, default=60.0, metavar="SECONDS", help="time networks about so long; %(default)s; 0: not"
    )
    add_folds_and_device(report, device=False)
    report.add_argument("--json", action="store_true", help="print JSON instead of tables")
    report.set_defaults(run=_report)


def _add_benchmark(verbs: argparse._SubParsersAction) -> None:
    folders = {"type": Path, "nargs": "+", "metavar": "MODEL_FOLDER"}
    benchmark = verbs.add_parser("benchmark", help="time the networks of trained models, taking turns")
    benchmark.add_argument("-m", dest="models", required=True, **folders, help="trained models")
    add_folds_and_device(benchmark, folds="default the first of each model")
    benchmark.add_argument("--patch-size", nargs="+", metavar="VOXELS", help="default each model's own")
    benchmark.add_argument("--batch-size", type=int, default=1, metavar="N", help="patches at once; %(default)s")
    benchmark.add_argument("--threads", type=int, metavar="N", help="CPU threads; default PyTorch's")
    benchmark.add_argument("--repeats", type=int, default=30, metavar="N", help="forward passes; %(default)s")
    benchmark.add_argument("--json", action="store_true", help="print JSON instead of a table")
    benchmark.set_defaults(run=_benchmark)


def _add_feature_maps(verbs: argparse._SubParsersAction) -> None:
    maps = verbs.add_parser("feature_maps", help="show all feature maps of a layer for a slice of an image")
    maps.add_argument("-m", dest="model", type=Path, metavar="MODEL_FOLDER", required=True, help="a trained model")
    add_folds_and_device(maps, folds="default the first that is there")
    maps.add_argument("-i", dest="image", type=Path, metavar="IMAGE", help="a case's file, such as CASE_0000.nii.gz")
    maps.add_argument("--labels", type=Path, metavar="REFERENCE", help="the case's reference segmentation")
    maps.add_argument("--layer", metavar="NAME", help="default the second-to-last block")
    maps.add_argument("--slice", type=int, metavar="N", help="default the one with most foreground")
    maps.add_argument("-o", dest="output", type=Path, metavar="FOLDER", default=Path("feature_maps"),
                      help="write here; %(default)s")  # fmt: skip
    maps.add_argument("--nifti", action="store_true", help="also write whole volumes, for a viewer")
    maps.add_argument("--list", action="store_true", help="list the layers and stop")
    maps.set_defaults(run=_feature_maps)


def _add_clusterability(verbs: argparse._SubParsersAction) -> None:
    clusters = verbs.add_parser("clusterability", help="say whether feature maps clustered while models trained")
    clusters.add_argument("-m", dest="models", type=Path, nargs="+", metavar="MODEL_FOLDER", required=True,
                          help="models trained with the setting snapshot_every")  # fmt: skip
    add_folds_and_device(clusters, folds="default all with snapshots")
    clusters.set_defaults(checkpoint=None)  # of a training that still runs, the last one
    clusters.add_argument(
        "-i", dest="images", type=Path, metavar="FOLDER", help="raw images, for models that kept no snapshots"
    )
    clusters.add_argument("--layer", metavar="NAME", help="the layer of the t-SNE; default the widest")
    clusters.add_argument("-o", dest="output", type=Path, metavar="FOLDER", default=Path("clusterability"),
                          help="write the pictures here; %(default)s")  # fmt: skip
    clusters.add_argument("--json", action="store_true", help="print JSON instead of tables")
    clusters.set_defaults(run=_clusterability)


def _report(options: argparse.Namespace) -> int:
    from .report.command import report

    made = report(
        options.models,
        options.output,
        baseline=options.baseline,
        predictions=[None if word == "validation" else Path(word) for word in options.predictions],
        labels=options.labels,
        tolerance_mm=options.tolerance,
        timing_seconds=options.timing,
        checkpoint=options.checkpoint,
        folds=options.folds,
        json_output=options.json,
    )
    return 1 if made.left_out else 0


def _benchmark(options: argparse.Namespace) -> int:
    from .benchmark import benchmark, print_benchmark

    remarks = []

    def say(line: str) -> None:
        remarks.append(line)
        print(line, file=sys.stderr)

    timings = benchmark(
        options.models,
        folds=options.folds,
        patch_size=options.patch_size and whole_numbers(options.patch_size, "--patch-size"),
        batch_size=options.batch_size,
        threads=options.threads,
        repeats=options.repeats,
        device=options.device,
        checkpoint=options.checkpoint,
        say=say,
    )
    print_benchmark(timings, json_output=options.json, remarks=remarks)
    return 0


def _feature_maps(options: argparse.Namespace) -> int:
    from .feature_maps.command import print_layers, write_feature_maps

    if options.list:
        print_layers(options.model, options.folds, options.checkpoint)
        return 0
    write_feature_maps(
        options.model,
        options.image,
        options.output,
        folds=options.folds,
        layer=options.layer,
        slice_index=options.slice,
        labels=options.labels,
        nifti=options.nifti,
        checkpoint=options.checkpoint,
        device=options.device,
    )
    return 0


def _clusterability(options: argparse.Namespace) -> int:
    from ..console.json_output import print_json
    from ..files import check_writable
    from .clusterability.measure import clusterability
    from .clusterability.plots import draw, print_table

    check_writable(options.output)
    found = clusterability(
        options.models,
        options.folds,
        images=options.images,
        checkpoint=options.checkpoint,
        device=options.device,
        progress=lambda line: print(line, file=sys.stderr),
    )
    pictures = draw(found, options.output, options.layer)
    if options.json:
        print_json(found.to_dict())
    else:
        print_table(found)
    for path in pictures:
        print(f"Wrote {path}", file=sys.stderr)
    measured = {model.folder.resolve() for model in found.models}
    return 0 if measured.issuperset(folder.resolve() for folder in options.models) else 1
