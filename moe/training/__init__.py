"""Losses, metrics, optimizers, the train state and the train step."""
