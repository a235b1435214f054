from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
    """How long networks take is chance here, and no test looks at it."""
    for module in ("pruning.timing", "compression.compressor"):
        monkeypatch.setattr(f"nnunet_sauron.{module}.RATIO_REPEATS", 1)
