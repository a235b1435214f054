from __future__ import annotations

from ..contracts.networks import EQUAL_WIDTHS
from ..contracts.pruned_network import PrunedNetworkContract


class TestPlain(PrunedNetworkContract):
    pass


class TestPlainBatchNorm(PrunedNetworkContract):
    norm = "batch"


class TestPlainOfFourStages(PrunedNetworkContract):
    widths = (4, 5, 6, 7)


class TestResidual(PrunedNetworkContract):
    architecture = "basic"


class TestResidualEqualWidths(PrunedNetworkContract):
    """Stages whose skip is a mere pool: their channels are joined across stages."""

    architecture = "basic"
    widths = EQUAL_WIDTHS


class TestResidualBatchNorm(PrunedNetworkContract):
    architecture = "basic"
    norm = "batch"


class TestBottleneck(PrunedNetworkContract):
    architecture = "bottleneck"


class TestBottleneckEqualWidths(PrunedNetworkContract):
    architecture = "bottleneck"
    widths = EQUAL_WIDTHS
