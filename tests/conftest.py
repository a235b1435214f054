from __future__ import annotations

import os

import torch
from xdist.scheduler import LoadFileScheduling

# The networks of the tests are so small that threads only wait for each other, in other processes as well; and where
# nnU-Net starts several all the same, those that spin while they wait make a step ten times slower on a busy machine.
torch.set_num_threads(1)
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

INTEGRATION = "tests/integration/"


class SharingModels(LoadFileScheduling):
    """A file's tests run in one process, and so do all that share the data set and the models of `INTEGRATION`."""

    def _split_scope(self, nodeid: str) -> str:
        return INTEGRATION if nodeid.startswith(INTEGRATION) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config, log) -> SharingModels:
    return SharingModels(config, log)
