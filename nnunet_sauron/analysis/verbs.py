"""The verbs `report`, `benchmark`, `feature_maps` and `clusterability`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..console.options import add_json, add_model_options, add_verb, whole_numbers


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verbs' options."""
    _add_report(verbs)
    _add_benchmark(verbs)
    _add_feature_maps(verbs)
    _add_clusterability(verbs)


def _add_report(verbs: argparse._SubParsersAction) -> None:
    folders = {"type": Path, "nargs": "+", "metavar": "MODEL_FOLDER"}
    report = add_verb(
        verbs, "report", _report,
        "compare trained models: cost, time, quality; as table, data and page",
        "Compares trained models: parameters, MACs, memory, network time, and Dice, HD95 and surface Dice per class "
        "and case. Writes report.html and report.txt, and the numbers as report.json, report.csv and cases.csv.",
        "nnUNetTrainer__nnUNetPlans__2d SauronTrainer__nnUNetPlans__2d -o report",
    )  # fmt: skip
    report.add_argument(
        "models", **folders, help="Trainer__Plans__configuration folders, or bundles; the first is the baseline"
    )
    report.add_argument("-o", dest="output", type=Path, metavar="FOLDER", required=True, help="write the report here")
    report.add_argument(
        "--baseline", type=Path, metavar="MODEL_FOLDER", help="the model to compare with (default: the first)"
    )
    report.add_argument(
        "--predictions", nargs="+", metavar="FOLDER", default=[],
        help="folder of segmentations of each model, in the order of the models, or the word validation (default: each "
        "model's validation)",
    )  # fmt: skip
    report.add_argument(
        "--labels", type=Path, metavar="FOLDER", help="reference segmentations (default: those of the validation)"
    )
    report.add_argument(
        "--tolerance", type=float, default=1.0, metavar="MM", help="tolerance of surface Dice in mm (default: 1)"
    )
    report.add_argument(
        "--timing",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="spend about SECONDS on timing the networks, 0 to skip it (default: 60)",
    )
    add_model_options(report, folds="all that are there", device=False)
    add_json(report)


def _add_benchmark(verbs: argparse._SubParsersAction) -> None:
    folders = {"type": Path, "nargs": "+", "metavar": "MODEL_FOLDER"}
    benchmark = add_verb(
        verbs, "benchmark", _benchmark,
        "time the networks of trained models in alternation",
        "Times forward passes of the networks of trained models on one patch, in alternation, so that a busy machine "
        "slows all of them alike.",
        "-m nnUNetTrainer__nnUNetPlans__2d SauronTrainer__nnUNetPlans__2d --threads 2",
    )  # fmt: skip
    benchmark.add_argument("-m", dest="models", required=True, **folders, help="trained models")
    add_model_options(benchmark, folds="the first of each model")
    benchmark.add_argument(
        "--patch-size",
        nargs="+",
        metavar="VOXELS",
        help="one number per axis, such as 64 64 64 (default: each model's own)",
    )
    benchmark.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="patches per forward pass (default: 1)"
    )
    benchmark.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's number)")
    benchmark.add_argument(
        "--repeats", type=int, default=30, metavar="N", help="forward passes of each network (default: 30)"
    )
    add_json(benchmark)


def _add_feature_maps(verbs: argparse._SubParsersAction) -> None:
    maps = add_verb(
        verbs, "feature_maps", _feature_maps,
        "show all feature maps of a layer for a slice of an image",
        "Draws every feature map of a layer for one slice of an image, beside the slice and its segmentation.",
        "-m SauronTrainer__nnUNetPlans__2d -i CASE_0000.nii.gz",
    )  # fmt: skip
    maps.add_argument("-m", dest="model", type=Path, metavar="MODEL_FOLDER", required=True, help="a trained model")
    add_model_options(maps, folds="the first that exists")
    maps.add_argument(
        "-i", dest="image", type=Path, metavar="IMAGE", help="a file of the case, such as CASE_0000.nii.gz"
    )
    maps.add_argument("--labels", type=Path, metavar="REFERENCE", help="reference segmentation of the case")
    maps.add_argument("--layer", metavar="NAME", help="layer to show (default: the second-to-last block)")
    maps.add_argument(
        "--slice", type=int, metavar="N", help="index of the slice (default: the one with most foreground)"
    )
    maps.add_argument("-o", dest="output", type=Path, metavar="FOLDER", default=Path("feature_maps"),
                      help="write to FOLDER (default: feature_maps)")  # fmt: skip
    maps.add_argument("--nifti", action="store_true", help="write whole volumes as well, for a viewer")
    maps.add_argument("--list", action="store_true", help="list the layers and stop")


def _add_clusterability(verbs: argparse._SubParsersAction) -> None:
    clusters = add_verb(
        verbs, "clusterability", _clusterability,
        "measure whether feature maps clustered during training",
        "Measures whether the feature maps of each layer form clusters, and the trend over a training: dip test, "
        "Hopkins statistic, near neighbours. Needs pip install diptest.",
        "-m SauronTrainer__nnUNetPlans__2d StockTrainer__nnUNetPlans__2d",
    )  # fmt: skip
    clusters.add_argument("-m", dest="models", type=Path, nargs="+", metavar="MODEL_FOLDER", required=True,
                          help="models trained with the setting snapshot_every; others need -i")  # fmt: skip
    add_model_options(clusters, folds="all with snapshots", checkpoint=None)
    clusters.add_argument(
        "-i", dest="images", type=Path, metavar="FOLDER", help="raw images, for models that kept no snapshots"
    )
    clusters.add_argument("--layer", metavar="NAME", help="layer of the t-SNE (default: the widest)")
    clusters.add_argument("-o", dest="output", type=Path, metavar="FOLDER", default=Path("clusterability"),
                          help="write pictures to FOLDER (default: clusterability)")  # fmt: skip
    add_json(clusters)


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
