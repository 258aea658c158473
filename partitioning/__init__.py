"""Meshes, the one table from logical to mesh axes, and the placement of arrays."""
