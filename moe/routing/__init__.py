"""Routers: float32 logits in, an `Assignment` of tokens to expert slots out."""
