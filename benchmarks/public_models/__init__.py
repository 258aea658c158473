"""Whole small models, as `transformers` computes them, beside ours."""
