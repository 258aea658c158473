"""Rules of attention. Standard library only."""

from moe.rules.latent import latent_problems
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
    found += latent_problems(model)
    if model.qk_norm == "unit" and model.positions != "rotary":
        found.append(
            f"QK_NORM = 'unit' means nothing to POSITIONS = {model.positions!r}: it "
            "normalises what was turned; choose 'head'"
        )
    bounds = {
        "ATTENTION_CAP": model.attention_cap,
        "LOGIT_CAP": model.logit_cap,
        "ATTENTION_SCALE": model.attention_scale,
    }
    return found + [
        f"{m} = {x}: cannot be negative" for m, x in bounds.items() if x < 0
    ]
