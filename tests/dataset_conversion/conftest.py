from __future__ import annotations

from pathlib import Path

import pytest

from ..integration.nnunet import NnUNet


@pytest.fixture
def nnunet(tmp_path: Path, monkeypatch) -> NnUNet:
    """nnU-Net's three folders, anew, and its commands in them."""
    return in_new_folders(tmp_path, monkeypatch)


@pytest.fixture
def raw(nnunet: NnUNet) -> Path:
    """nnU-Net's folder of raw data sets, anew, and beside it the other two."""
    return nnunet.raw


def in_new_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> NnUNet:
    """nnU-Net's three folders below `root`, which conversions find by its variables."""
    folders = [root / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")]
    for folder in folders:
        folder.mkdir()
        monkeypatch.setenv(folder.name, str(folder))
    return NnUNet(*folders)
