"""Chips, and how they are joined."""
