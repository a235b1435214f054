"""In a checkout, stands for `dataset_conversion` at the top level, which setup.py installs in the place of this file."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "dataset_conversion")]
