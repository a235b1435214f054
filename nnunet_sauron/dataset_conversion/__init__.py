"""Stands in a checkout for `dataset_conversion` at the top level, which setup.py installs in this file's place."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "dataset_conversion")]
