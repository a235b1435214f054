"""What the oldest PyTorch that setup.py allows, 2.1.2, cannot do; `.ci/oldest` runs the tests with it."""

from __future__ import annotations

import pytest
import torch

IS_OLDEST = torch.__version__.startswith("2.1.")
scales_gradients_on_cpu = pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="PyTorch before 2.3 scales gradients on CUDA only"
)
compiles_hooks = pytest.mark.skipif(IS_OLDEST, reason="PyTorch 2.1 breaks the graph at our hooks, and goes on eagerly")
