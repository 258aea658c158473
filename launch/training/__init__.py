"""Training: from a state to the next one, until the last step."""
