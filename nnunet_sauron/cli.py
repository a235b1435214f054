"""The command `nnUNetv2_sauron`: one verb for each thing that nnU-Net has no place for."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .json_output import json_alone, send_nowhere, send_to_standard_error

# Every verb imports its room when it runs: `path` stands in shell start-up files, where PyTorch's import would be felt.
DEBUG_VARIABLE = "nnunet_sauron_debug"
# What we, nnU-Net and readers of files raise on purpose; a mistake of ours, such as a TypeError, is not hidden.
EXPECTED = (ValueError, RuntimeError, OSError, MemoryError, AssertionError, EOFError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: The words after the command; by default those it was called with.

    Returns:
        The exit code: 0; 1 if `doctor` finds what stops training, if models that were asked for could not be read and
        others could, or if whoever read standard output stopped reading; 2 after an error; 130 if interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks an alphabet must not end a verb
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.version:
        from . import __version__

        print(f"nnunet-sauron {__version__}")
        return 0
    if options.verb is None:
        parser.print_help()
        return 0
    try:
        with json_alone() if getattr(options, "json", False) else contextlib.nullcontext():
            code = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # now, as long as it can be said that this fails
        if arguments is None and getattr(options, "json", False):
            send_to_standard_error()  # what is printed while the process ends
        return code
    except KeyboardInterrupt:
        print(f"nnUNetv2_sauron {options.verb}: interrupted", file=sys.stderr)
        return 130
    except EXPECTED as error:
        nobody_reads = isinstance(error, BrokenPipeError) and _reader_is_gone()
        if isinstance(error, OSError):
            _forget_what_cannot_be_written()
        if nobody_reads:
            return 1
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        print(f"nnUNetv2_sauron {options.verb}: {_words(error)}", file=sys.stderr)
        return 2


def _reader_is_gone() -> bool:
    """Whether standard output was closed at its other end, as `| head -1` does."""
    import select

    if not hasattr(select, "poll"):  # Windows
        return True
    other_end = select.poll()
    other_end.register(1, 0)
    return bool(other_end.poll(0))


def _forget_what_cannot_be_written() -> None:
    """Else it would be tried again, with a traceback, while the process ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        send_nowhere()


def _words(error: Exception) -> str:
    """An error in one line; with its class where the text was not written for the user."""
    # Spaces within a line are left alone, since they may be a path's.
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if text and isinstance(error, (ValueError, RuntimeError, OSError, MemoryError)):
        return text
    where = f"{DEBUG_VARIABLE}=1 in the environment shows where it came from"
    return f"{type(error).__name__}{': ' if text else ''}{text} ({where})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_sauron",
        description="Channel pruning for nnU-Net v2. Once nnU-Net knows the trainers, its own commands do the rest: "
        "nnUNetv2_train DATASET CONFIGURATION FOLD -tr SauronTrainer",
        epilog=f"{DEBUG_VARIABLE}=1 in the environment shows where an error came from.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")

    path = verbs.add_parser("path", help="print the folder for nnUNet_extTrainer, which leaves nnU-Net untouched")
    path.set_defaults(run=_path)

    install = verbs.add_parser("install", help="put small shims into nnU-Net, so that it finds trainers and planners")
    install.set_defaults(run=_install)

    uninstall = verbs.add_parser("uninstall", help="take the shims out of nnU-Net again")
    uninstall.set_defaults(run=_uninstall)

    doctor = verbs.add_parser("doctor", help="say whether nnU-Net finds trainers and planners, and why not")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(run=_doctor)

    _add_plan(verbs)

    _add_compress(verbs)

    _add_report(verbs)

    _add_pictures(verbs)

    densify = verbs.add_parser("densify", help="write a pruned checkpoint at its plans' widths, with the same output")
    densify.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the pruned checkpoint, a .pth file")
    densify.add_argument("-o", dest="output", type=Path, metavar="OUT", required=True, help="the checkpoint to write")
    densify.set_defaults(run=_densify)

    demo = verbs.add_parser("demo", help="train, prune and predict a generated dataset and compare with stock nnU-Net")
    demo.add_argument("-o", dest="output", type=Path, metavar="FOLDER", help="work here; default ./nnunet_sauron_demo")
    demo.add_argument("--json", action="store_true", help="print JSON instead of a table")
    demo.set_defaults(run=_demo)
    return parser


def _add_plan(verbs: argparse._SubParsersAction) -> None:
    plan = verbs.add_parser("plan", help="derive lean plans from existing ones, for the same preprocessed data")
    plan.add_argument("-d", dest="dataset", metavar="DATASET", required=True, help="the dataset's number or name")
    plan.add_argument(
        "-p", dest="source", metavar="PLANS", default="nnUNetPlans", help="derive from these; %(default)s"
    )
    plan.add_argument(
        "-c", dest="configurations", metavar="CONFIGURATION", nargs="+", default=[], help="only these; default all"
    )
    widths = plan.add_mutually_exclusive_group(required=True)
    widths.add_argument("--flat", type=int, metavar="WIDTH", help="LUnet: the same width on all stages, such as 32")
    widths.add_argument("--scale", type=float, metavar="FACTOR", help="every width times this, such as 0.5")
    widths.add_argument("--widths", nargs="+", metavar="WIDTH", help="one for each stage, such as 8,16,32")
    widths.add_argument(
        "--widths-from", type=Path, metavar="CHECKPOINT", help="every layer as wide as in this pruned .pth"
    )
    plan.add_argument("--batch-size", type=int, metavar="N", help="patches per batch")
    plan.add_argument("--patch-size", nargs="+", metavar="VOXELS", help="one value per axis, such as 64 64 64")
    plan.add_argument(
        "--same-memory", action="store_true", help="let patch and batch grow up to the old plans' memory estimate"
    )
    plan.add_argument("-o", dest="name", metavar="NAME", help="the new plans' name, such as nnUNetLUnet32Plans")
    plan.add_argument("--overwrite", action="store_true", help="replace plans of that name")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.set_defaults(run=_plan)


def _add_compress(verbs: argparse._SubParsersAction) -> None:
    compress = verbs.add_parser("compress", help="make a trained model smaller without training it again")
    folder = {"type": Path, "metavar": "FOLDER", "required": True}
    compress.add_argument("-m", dest="model", **folder, help="a trained model, with plans.json and fold_*")
    compress.add_argument("-i", dest="images", **folder, help="raw images in nnU-Net's naming; no labels needed")
    compress.add_argument("-o", dest="output", **folder, help="the new model; for nnUNetv2_predict_from_modelfolder")
    _add_folds_and_device(compress)
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


def _add_folds_and_device(
    verb: argparse.ArgumentParser, *, folds: str = "default 0 to 4, or all where it is alone", device: bool = True
) -> None:
    """What every verb that reads trained models takes, as nnU-Net's own commands spell it."""
    verb.add_argument("-f", dest="folds", metavar="FOLD", nargs="+", help=f"only these, such as 0 1, or all; {folds}")
    name = "checkpoint_final.pth"
    verb.add_argument("-chk", dest="checkpoint", default=name, metavar="NAME", help=f"file in fold_*; default {name}")
    if device:
        verb.add_argument(
            "-device", metavar="DEVICE", help="cpu, cuda, cuda:1 or mps; default cuda where there is a GPU, else cpu"
        )


def _add_report(verbs: argparse._SubParsersAction) -> None:
    folders = {"type": Path, "nargs": "+", "metavar": "MODEL_FOLDER"}
    report = verbs.add_parser("report", help="compare trained models: cost, time, quality; as table, data and page")
    report.add_argument("models", **folders, help="Trainer__Plans__configuration folders; the first is the baseline")
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
    _add_folds_and_device(report, device=False)
    report.add_argument("--json", action="store_true", help="print JSON instead of tables")
    report.set_defaults(run=_report)

    benchmark = verbs.add_parser("benchmark", help="time the networks of trained models, taking turns")
    benchmark.add_argument("-m", dest="models", required=True, **folders, help="trained models")
    _add_folds_and_device(benchmark, folds="default the first of each model")
    benchmark.add_argument("--patch-size", nargs="+", metavar="VOXELS", help="default each model's own")
    benchmark.add_argument("--batch-size", type=int, default=1, metavar="N", help="patches at once; %(default)s")
    benchmark.add_argument("--threads", type=int, metavar="N", help="CPU threads; default PyTorch's")
    benchmark.add_argument("--repeats", type=int, default=30, metavar="N", help="forward passes; %(default)s")
    benchmark.add_argument("--json", action="store_true", help="print JSON instead of a table")
    benchmark.set_defaults(run=_benchmark)


def _add_pictures(verbs: argparse._SubParsersAction) -> None:
    maps = verbs.add_parser("feature_maps", help="show all feature maps of a layer for a slice of an image")
    maps.add_argument("-m", dest="model", type=Path, metavar="MODEL_FOLDER", required=True, help="a trained model")
    _add_folds_and_device(maps, folds="default the first that is there")
    maps.add_argument("-i", dest="image", type=Path, metavar="IMAGE", help="a case's file, such as CASE_0000.nii.gz")
    maps.add_argument("--labels", type=Path, metavar="REFERENCE", help="the case's reference segmentation")
    maps.add_argument("--layer", metavar="NAME", help="default the second-to-last block")
    maps.add_argument("--slice", type=int, metavar="N", help="default the one with most foreground")
    maps.add_argument("-o", dest="output", type=Path, metavar="FOLDER", default=Path("feature_maps"),
                      help="write here; %(default)s")  # fmt: skip
    maps.add_argument("--nifti", action="store_true", help="also write whole volumes, for a viewer")
    maps.add_argument("--list", action="store_true", help="list the layers and stop")
    maps.set_defaults(run=_feature_maps)

    clusters = verbs.add_parser("clusterability", help="say whether feature maps clustered while models trained")
    clusters.add_argument("-m", dest="models", type=Path, nargs="+", metavar="MODEL_FOLDER", required=True,
                          help="models trained with the setting snapshot_every")  # fmt: skip
    _add_folds_and_device(clusters, folds="default all with snapshots")
    clusters.set_defaults(checkpoint=None)  # of a training that still runs, the last one
    clusters.add_argument(
        "-i", dest="images", type=Path, metavar="FOLDER", help="raw images, for models that kept no snapshots"
    )
    clusters.add_argument("--layer", metavar="NAME", help="the layer of the t-SNE; default the widest")
    clusters.add_argument("-o", dest="output", type=Path, metavar="FOLDER", default=Path("clusterability"),
                          help="write the pictures here; %(default)s")  # fmt: skip
    clusters.add_argument("--json", action="store_true", help="print JSON instead of tables")
    clusters.set_defaults(run=_clusterability)


def _path(options: argparse.Namespace) -> int:
    from .plugin.installation import find_nnunet, reads_external_trainers, trainer_folder

    print(trainer_folder())
    nnunet = find_nnunet()
    if nnunet is not None and not reads_external_trainers(nnunet):
        advice = "nnU-Net reads nnUNet_extTrainer since 2.8.0, and yours is older. Run: nnUNetv2_sauron install"
        print(advice, file=sys.stderr)  # stdout goes into the environment variable
    return 0


def _install(options: argparse.Namespace) -> int:
    from .plugin.installation import SHIMS, install, shim_state

    # A foreign file lets install fail.
    words = {"absent": "Installed", "current": "Already there", "outdated": "Updated", "foreign": ""}
    before = [shim_state(shim=shim) for shim in SHIMS]
    for state, path in zip(before, install(), strict=True):
        print(f"{words[state]}: {path}")
    return 0


def _uninstall(options: argparse.Namespace) -> int:
    from .plugin.installation import uninstall

    removed = uninstall()
    for path in removed:
        print(f"Removed: {path}")
    if not removed:
        print("Nothing to remove: nnU-Net has no shim of ours.")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .plugin.doctor import examine, print_checks

    checks = examine()
    print_checks(checks, json_output=options.json)
    return 1 if any(check.ok is False for check in checks) else 0


def _plan(options: argparse.Namespace) -> int:
    from .planning.derive import derive_plans
    from .planning.display import print_derived
    from .planning.widths import Flat, PerStage, PrunedWidths, Scaled

    if options.flat is not None:
        widths = Flat(options.flat)
    elif options.scale is not None:
        widths = Scaled(options.scale)
    elif options.widths is not None:
        widths = PerStage(_whole_numbers(options.widths, "--widths"))
    else:
        widths = PrunedWidths.of_checkpoint(options.widths_from)
    derived = derive_plans(
        options.dataset,
        widths,
        source=options.source,
        configurations=options.configurations,
        batch_size=options.batch_size,
        patch_size=options.patch_size and _whole_numbers(options.patch_size, "--patch-size"),
        same_memory=options.same_memory,
        name=options.name,
        overwrite=options.overwrite,
    )
    print_derived(derived, json_output=options.json)
    return 0


def _whole_numbers(words: Sequence[str], flag: str) -> tuple[int, ...]:
    """Numbers separated by spaces, commas or both."""
    try:
        return tuple(int(word) for word in " ".join(words).replace(",", " ").split())
    except ValueError:
        given = " ".join(words)
        raise ValueError(f"{flag} takes whole numbers, such as 64 64 64 or 64,64,64; got '{given}'.") from None


def _compress(options: argparse.Namespace) -> int:
    from .compression.command import compress
    from .compression.compress import Goal

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


def _report(options: argparse.Namespace) -> int:
    from .analysis.report_command import report

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
    from .analysis.benchmark import benchmark, print_benchmark

    remarks = []

    def say(line: str) -> None:
        remarks.append(line)
        print(line, file=sys.stderr)

    timings = benchmark(
        options.models,
        folds=options.folds,
        patch_size=options.patch_size and _whole_numbers(options.patch_size, "--patch-size"),
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
    from .analysis.cases import case_of, check_cases
    from .analysis.feature_maps import feature_maps, layer_names
    from .analysis.feature_maps_plot import check_output, write
    from .analysis.models import TrainedModel
    from .analysis.progress import Progress

    if not options.list:
        if options.image is None:
            raise ValueError("-i IMAGE is missing: a file of the case to show, such as imagesTs/CASE_0000.nii.gz.")
        check_output(options.output)
    model = TrainedModel.read(options.model, options.folds, options.checkpoint)
    for line in model.remarks:
        print(line, file=sys.stderr)
    folds = list(model.checkpoints) if options.folds else [next(iter(model.checkpoints))]
    if options.list:
        for layer in layer_names(model, folds[0]):
            size = " x ".join(str(length) for length in layer.voxels)
            print(f"{layer.name:40s}{layer.channels:5d} maps of {size}")
        return 0
    progress = Progress()
    case = case_of(options.image, model)
    check_cases(model, [case], progress)
    for fold in folds:
        found = feature_maps(
            model, fold, case, options.layer, options.slice, options.labels, options.device, progress.bar
        )
        if found.note:
            print(found.note)
        output = options.output / f"fold_{fold}" if len(folds) > 1 else options.output
        for path in write(found, output, options.nifti, progress.bar):
            print(f"Wrote {path}")
    return 0


def _clusterability(options: argparse.Namespace) -> int:
    from .analysis.clusterability import clusterability
    from .analysis.clusterability_plot import draw, print_table
    from .json_output import print_json
    from .output_folder import check_writable

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


def _densify(options: argparse.Namespace) -> int:
    from .trainers.checkpoints import densify_checkpoint

    densify_checkpoint(options.checkpoint, options.output)
    print(f"Wrote {options.output}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import run_demo

    run_demo(options.output, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
