"""Rules of attention and positions. Standard library only."""

from moe.settings import ModelSettings


def attention_problems(model: ModelSettings, length: int) -> list[str]:
    """Heads, positions, and the settings of positions that the model has not."""
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
    rotary = model.positions == "rotary"
    relative = model.positions in ("relative", "relative_per_layer")
    learned = model.positions == "learned"
    if rotary and model.head_dim % 2:
        found.append(
            f"HEAD_DIM = {model.head_dim}: rotary positions turn pairs, so it must be "
            "even"
        )
    if learned and model.max_positions < length:
        found.append(
            f"MAX_POSITIONS = {model.max_positions}: POSITIONS = 'learned' needs one "
            f"for each of the {length} tokens of a row"
        )
    buckets, farthest = model.relative_buckets, model.relative_max_distance
    if relative and (buckets < 2 or farthest <= buckets // 2):
        found.append(
            f"RELATIVE_BUCKETS = {buckets} and RELATIVE_MAX_DISTANCE = {farthest}: "
            "there must be 2 at least, and half of them less than the distance"
        )
    default = ModelSettings(1, 1, 1, 1, 1, 1)
    belongs_to = {
        "ROPE_BASE": ("rope_base", rotary),
        "RELATIVE_BUCKETS": ("relative_buckets", relative),
        "RELATIVE_MAX_DISTANCE": ("relative_max_distance", relative),
        "MAX_POSITIONS": ("max_positions", learned),
    }
    for macro, (field, used) in belongs_to.items():
        value, unused = getattr(model, field), getattr(default, field)
        if not used and value != unused:
            found.append(
                f"{macro} = {value} means nothing to POSITIONS = {model.positions!r}: "
                f"leave it at {unused}"
            )
    return found
