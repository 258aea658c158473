"""Weights that come in from other systems, and leave to them."""
