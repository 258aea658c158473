"""Attention: one body for all kinds of heads, and ways to mix with one signature."""
