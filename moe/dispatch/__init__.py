"""Transports: tokens to rows of experts and back, one file per transport."""
