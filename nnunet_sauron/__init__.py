"""Channel pruning, lean architectures and on-device deployment for nnU-Net v2."""

from __future__ import annotations

__version__ = "0.1.0"
