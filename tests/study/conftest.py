"""The study's scripts are no package: they find each other in their own folder."""

from __future__ import annotations

import sys
from pathlib import Path

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))
