"""How nnU-Net finds our trainers: the folder it scans, the shim put into it or taken out, and what is wrong if not."""

from __future__ import annotations

from .doctor import Check, examine, print_checks
from .installation import (
    find_nnunet,
    install,
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
    "print_checks",
    "reads_external_trainers",
    "shim_state",
    "trainer_folder",
    "trainer_names",
    "uninstall",
]
