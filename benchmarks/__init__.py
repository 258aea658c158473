"""Benchmarks: ours, a reference and the roofline in one run, as ratios."""
