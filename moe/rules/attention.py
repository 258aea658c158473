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
    if any(chunk < 0 for chunk in model.attention_chunks):
        found.append(
            f"ATTENTION_CHUNKS = {model.attention_chunks}: a piece has 1 position or "
            "more; 0 does not cut"
        )
    found += _growth_problems(model)
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


def _growth_problems(model: ModelSettings) -> list[str]:
    """How queries grow in layers that know no positions."""
    growth, length = model.attention_growth, model.attention_growth_length
    if growth < 0 or (growth and length < 1):
        return [
            f"ATTENTION_GROWTH = {growth} and ATTENTION_GROWTH_LENGTH = {length}: the "
            "first cannot be negative, and needs positions after which queries grow"
        ]
    if length and not growth:
        return [
            f"ATTENTION_GROWTH_LENGTH = {length} means nothing to ATTENTION_GROWTH = "
            f"{growth}: leave it at 0"
        ]
    if growth and model.positions != "none" and 0 not in model.position_layers:
        return [
            f"ATTENTION_GROWTH = {growth} means nothing to POSITION_LAYERS = "
            f"{model.position_layers} of POSITIONS = {model.positions!r}: no layer is "
            "without positions"
        ]
    return []
