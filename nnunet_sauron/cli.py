"""The command `nnUNetv2_sauron`: one verb for each thing that nnU-Net has no place for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Every verb imports its room when it runs: `path` stands in shell start-up files, where PyTorch's import would be felt.
DEBUG_VARIABLE = "nnunet_sauron_debug"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: The words after the command; by default those it was called with.

    Returns:
        The exit code: 0, 1 if `doctor` finds what stops training, 2 after an error, 130 if interrupted.
    """
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
        return options.run(options)
    except KeyboardInterrupt:
        print(f"nnUNetv2_sauron {options.verb}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        print(f"nnUNetv2_sauron {options.verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


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

    install = verbs.add_parser("install", help="put a small shim into nnU-Net, so that it finds the trainers")
    install.set_defaults(run=_install)

    uninstall = verbs.add_parser("uninstall", help="take the shim out of nnU-Net again")
    uninstall.set_defaults(run=_uninstall)

    doctor = verbs.add_parser("doctor", help="say whether nnU-Net finds the trainers, and if not, why not")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(run=_doctor)

    densify = verbs.add_parser("densify", help="write a pruned checkpoint at its plans' widths, with the same output")
    densify.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the pruned checkpoint, a .pth file")
    densify.add_argument("-o", dest="output", type=Path, metavar="OUT", required=True, help="the checkpoint to write")
    densify.set_defaults(run=_densify)

    demo = verbs.add_parser("demo", help="train, prune and predict a generated dataset and compare with stock nnU-Net")
    demo.add_argument("-o", dest="output", type=Path, metavar="FOLDER", help="work here; default ./nnunet_sauron_demo")
    demo.add_argument("--json", action="store_true", help="print JSON instead of a table")
    demo.set_defaults(run=_demo)
    return parser


def _path(options: argparse.Namespace) -> int:
    from .plugin.installation import find_nnunet, reads_external_trainers, trainer_folder

    print(trainer_folder())
    nnunet = find_nnunet()
    if nnunet is not None and not reads_external_trainers(nnunet):
        advice = "nnU-Net reads nnUNet_extTrainer since 2.8.0, and yours is older. Run: nnUNetv2_sauron install"
        print(advice, file=sys.stderr)  # stdout goes into the environment variable
    return 0


def _install(options: argparse.Namespace) -> int:
    from .plugin.installation import install, shim_state

    before = shim_state()
    shim = install()
    print({"absent": "Installed", "current": "Already there", "outdated": "Updated"}[before] + f": {shim}")
    return 0


def _uninstall(options: argparse.Namespace) -> int:
    from .plugin.installation import uninstall

    removed = uninstall()
    print("Nothing to remove: nnU-Net has no shim of ours." if removed is None else f"Removed: {removed}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .plugin.doctor import examine, print_checks

    checks = examine()
    print_checks(checks, json_output=options.json)
    return 1 if any(check.ok is False for check in checks) else 0


def _densify(options: argparse.Namespace) -> int:
    from .trainers.checkpoints import densify_checkpoint

    densify_checkpoint(options.checkpoint, options.output)
    print(f"Wrote {options.output}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import run_demo

    run_demo(options.output, options.json)
    return 0
