"""Arithmetic on memory, time and traffic."""
