"""The verb `plan`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console.options import add_json, add_verb, whole_numbers


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verb's options."""
    plan = add_verb(
        verbs, "plan", _plan,
        "derive lean plans from existing ones, for the same preprocessed data",
        "Writes plans of a network with fewer channels beside a dataset's plans. They use the same preprocessed data, "
        "and nnUNetv2_train takes them with -p.",
        "-d 4 --flat 16",
    )  # fmt: skip
    plan.add_argument("-d", dest="dataset", metavar="DATASET", required=True, help="the dataset's number or name")
    plan.add_argument(
        "-p",
        dest="source",
        metavar="PLANS",
        default="nnUNetPlans",
        help="derive from these plans (default: nnUNetPlans)",
    )
    plan.add_argument(
        "-c",
        dest="configurations",
        metavar="CONFIGURATION",
        nargs="+",
        default=[],
        help="configurations to derive (default: all)",
    )
    widths = plan.add_mutually_exclusive_group(required=True)
    widths.add_argument("--flat", type=int, metavar="WIDTH", help="LUnet: WIDTH channels in every stage, such as 32")
    widths.add_argument("--scale", type=float, metavar="FACTOR", help="multiply every width by FACTOR, such as 0.5")
    widths.add_argument("--widths", nargs="+", metavar="WIDTH", help="channels of each stage, such as 8,16,32")
    widths.add_argument(
        "--widths-from", type=Path, metavar="CHECKPOINT", help="widths of a pruned checkpoint, a .pth file"
    )
    plan.add_argument("--batch-size", type=int, metavar="N", help="patches per batch (default: as in the old plans)")
    plan.add_argument(
        "--patch-size",
        nargs="+",
        metavar="VOXELS",
        help="one number per axis, such as 64 64 64 (default: as in the old plans)",
    )
    plan.add_argument(
        "--same-memory", action="store_true", help="enlarge patch and batch to the memory estimate of the old plans"
    )
    plan.add_argument(
        "-o",
        dest="name",
        metavar="NAME",
        help="name of the new plans (default: from the widths, such as nnUNetLUnet32Plans)",
    )
    plan.add_argument("--overwrite", action="store_true", help="replace plans of the same name")
    add_json(plan)


def _plan(options: argparse.Namespace) -> int:
    from .derive import derive_plans
    from .table import print_derived
    from .widths import Flat, PerStage, PrunedWidths, Scaled

    if options.flat is not None:
        widths = Flat(options.flat)
    elif options.scale is not None:
        widths = Scaled(options.scale)
    elif options.widths is not None:
        widths = PerStage(whole_numbers(options.widths, "--widths"))
    else:
        widths = PrunedWidths.of_checkpoint(options.widths_from)
    derived = derive_plans(
        options.dataset,
        widths,
        source=options.source,
        configurations=options.configurations,
        batch_size=options.batch_size,
        patch_size=options.patch_size and whole_numbers(options.patch_size, "--patch-size"),
        same_memory=options.same_memory,
        name=options.name,
        overwrite=options.overwrite,
    )
    print_derived(derived, json_output=options.json)
    return 0
