# nnunet_sauron shim
"""Shows nnU-Net the experiment planners of the package nnunet-sauron; put here by its `install`, never to be edited.

nnU-Net imports module after module while it looks for a planner. Should nnunet-sauron be gone, this one has nothing to
offer, and must not stop the search for other planners. Any other error is real and is left to be seen.
"""

from __future__ import annotations

try:
    from nnunet_sauron.planning.planners import (  # noqa: F401
        LUnet8Planner,
        LUnet16Planner,
        LUnetPlanner,
        ResEncLUnetPlanner,
    )
except ModuleNotFoundError as error:
    if error.name != "nnunet_sauron":
        raise
