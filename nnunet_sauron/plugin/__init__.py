"""How nnU-Net finds our trainers and planners: installing and removing the shims, and checking them."""

from __future__ import annotations

from .doctor import Check, examine, print_checks
from .installation import (
    find_nnunet,
    install,
    planner_names,
    reads_external_trainers,
    shim_state,
    trainer_folder,
    trainer_names,
    uninstall,
)

__all__ = [
    "Check",
    "examine",
    "find_nnunet",
    "install",
    "planner_names",
    "print_checks",
    "reads_external_trainers",
    "shim_state",
    "trainer_folder",
    "trainer_names",
    "uninstall",
]
