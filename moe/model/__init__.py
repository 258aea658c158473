"""The transformer: pure functions of dicts of arrays."""
