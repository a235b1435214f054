"""Compares trained models: cost, time and quality, as data, tables, pictures and one page."""
