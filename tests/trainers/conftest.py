"""What the tests of trainers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_sauron.methods import shrink

from .small import PROBED, set_folders


@pytest.fixture(scope="package", autouse=True)
def few_probes():
    """Sensitivities are measured on few patches, which takes most of a small training's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrink, "PROBED", PROBED)
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """nnU-Net's folders; networks are not compiled, and the shell's settings are not seen."""
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.delenv("nnunet_sauron", raising=False)
    return tmp_path
