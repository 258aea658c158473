"""A training run, from its settings to its last step."""
