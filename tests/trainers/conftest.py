"""What the tests of trainers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from .small import set_folders


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """nnU-Net's folders; networks are not compiled, and the shell's settings are not seen."""
    set_folders(monkeypatch, tmp_path)
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.delenv("nnunet_sauron", raising=False)
    return tmp_path
