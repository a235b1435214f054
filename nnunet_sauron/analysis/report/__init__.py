"""Compares trained models: cost, time and quality, as data, tables, pictures and one page."""

from .compare import make_report, short_names
from .contents import FoldReport, ModelReport, Report

__all__ = ["FoldReport", "ModelReport", "Report", "make_report", "short_names"]
