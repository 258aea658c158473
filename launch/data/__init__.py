"""The tokens that a run reads."""
