"""Reads the results of trainings and predictions, and measures networks; never trains."""
