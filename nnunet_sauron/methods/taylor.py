"""Taylor: removes the channels whose removal changes the loss least, to first order.

Molchanov et al.: Pruning convolutional neural networks for resource efficient inference. ICLR 2017, arXiv 1611.06440.
"""

from __future__ import annotations

from .stamp import ActivationRanked, ActivationSettings


class Taylor(ActivationRanked):
    """STAMP's ranking by |activation * gradient|, without its dropout."""

    Settings = ActivationSettings

    ranking = "taylor"
