"""Feed-forwards: one for every token, or one per expert over its rows."""
