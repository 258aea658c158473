"""Metrics of a run, in files."""
