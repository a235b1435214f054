from __future__ import annotations

from pathlib import Path

import pytest

from .plans import write_plans


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of `nnUNetPlans` of the small dataset, in nnU-Net's folder for preprocessed data."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return write_plans(tmp_path)
