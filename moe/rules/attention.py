"""Rules of attention. Standard library only."""

from moe.settings import ModelSettings


def attention_problems(model: ModelSettings) -> list[str]:
    """Heads, and what they see."""
    found = []
    heads = model.num_kv_heads
    if heads < 0 or (heads and model.num_heads % heads):
        found.append(
            f"NUM_KV_HEADS = {heads} does not divide NUM_HEADS = {model.num_heads}"
        )
    if any(window < 0 for window in model.attention_windows):
        found.append(
            f"ATTENTION_WINDOWS = {model.attention_windows}: a window has 1 place or "
            "more; 0 sees all"
        )
    return found
