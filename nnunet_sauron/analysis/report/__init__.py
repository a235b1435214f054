"""Compares trained models: cost, time and quality, as data, tables, pictures and one page."""

from .compare import FoldReport, ModelReport, Report, make_report, short_names

__all__ = ["FoldReport", "ModelReport", "Report", "make_report", "short_names"]
