"""The verbs `path`, `install`, `uninstall` and `doctor`."""

from __future__ import annotations

import argparse
import sys

from ..console.options import add_json, add_verb


def add_parsers(verbs: argparse._SubParsersAction) -> None:
    """Describe the verbs' options."""
    add_verb(
        verbs, "path", _path,
        "print the folder for nnUNet_extTrainer, which leaves nnU-Net untouched",
        "Prints the folder of the trainers. With export nnUNet_extTrainer=\"$(nnUNetv2_sauron path)\" nnU-Net finds "
        "them, and nothing is installed into it.",
        "",
    )  # fmt: skip
    add_verb(
        verbs, "install", _install,
        "let nnU-Net find the trainers and planners",
        "Writes two small files, the shims, into nnU-Net's own folder, so that nnU-Net finds the trainers and planners "
        "by name.",
        "",
    )  # fmt: skip
    add_verb(
        verbs, "uninstall", _uninstall,
        "undo install",
        "Removes the shims that install wrote into nnU-Net's folder.",
        "",
    )  # fmt: skip
    doctor = add_verb(
        verbs, "doctor", _doctor,
        "check whether nnU-Net finds the trainers and planners",
        "Checks versions, folders and whether nnU-Net finds every trainer and planner; says what to do about each "
        "problem. The exit code is 1 if training is not possible.",
        "",
    )  # fmt: skip
    add_json(doctor)


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
