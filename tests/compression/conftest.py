from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
    """How long networks take is chance here, and no test looks at it."""
    monkeypatch.setattr("nnunet_sauron.compression.compressor.REPEATS", 1)
