"""Reads what trainings and predictions left behind and measures networks; never trains."""
