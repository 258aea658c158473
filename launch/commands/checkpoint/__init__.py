"""`switchyard checkpoint`: look at, check, compare, copy and average checkpoints."""
