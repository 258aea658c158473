"""Faults, injected for real into a tiny run, and what became of it."""
