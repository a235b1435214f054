"""A bundle for all tests that need one."""

from __future__ import annotations

from pathlib import Path

import pytest

from .models import write_bundle, write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A bundle of a 3D model, as a folder."""
    place = tmp_path_factory.mktemp("model")
    return write_bundle(place / "bundle", write_model(place / "model"))
