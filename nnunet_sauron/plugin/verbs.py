"""The verbs `path`, `install`, `uninstall` and `doctor`."""

from __future__ import annotations

import argparse
import sys


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verbs' options."""
    path = verbs.add_parser("path", help="print the folder for nnUNet_extTrainer, which leaves nnU-Net untouched")
    path.set_defaults(run=_path)

    install = verbs.add_parser("install", help="put small shims into nnU-Net, so that it finds trainers and planners")
    install.set_defaults(run=_install)

    uninstall = verbs.add_parser("uninstall", help="take the shims out of nnU-Net again")
    uninstall.set_defaults(run=_uninstall)

    doctor = verbs.add_parser("doctor", help="say whether nnU-Net finds trainers and planners, and why not")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(run=_doctor)


def _path(options: argparse.Namespace) -> int:
    from .installation import find_nnunet, reads_external_trainers, trainer_folder

    print(trainer_folder())
    nnunet = find_nnunet()
    if nnunet is not None and not reads_external_trainers(nnunet):
        advice = "nnU-Net reads nnUNet_extTrainer since 2.8.0, and yours is older. Run: nnUNetv2_sauron install"
        print(advice, file=sys.stderr)  # stdout goes into the environment variable
    return 0


def _install(options: argparse.Namespace) -> int:
    from .installation import SHIMS, install, shim_state

    # A foreign file lets install fail.
    words = {"absent": "Installed", "current": "Already there", "outdated": "Updated", "foreign": ""}
    before = [shim_state(shim=shim) for shim in SHIMS]
    for state, path in zip(before, install(), strict=True):
        print(f"{words[state]}: {path}")
    return 0


def _uninstall(options: argparse.Namespace) -> int:
    from .installation import uninstall

    removed = uninstall()
    for path in removed:
        print(f"Removed: {path}")
    if not removed:
        print("Nothing to remove: nnU-Net has no shim of ours.")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import examine, print_checks

    checks = examine()
    print_checks(checks, json_output=options.json)
    return 1 if any(check.ok is False for check in checks) else 0
