"""Rules of positions. Standard library only."""

from moe.settings import ModelSettings, PositionSettings


def position_problems(model: ModelSettings, length: int) -> list[str]:
    """How positions are seen, and the settings of other ways to see them.

    Args:
        model: flat words.
        length: tokens of the longest rows.
    """
    found = []
    relative = model.positions in ("relative", "relative_per_layer")
    learned = model.positions == "learned"
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
    if not set(model.position_layers) <= {0, 1} or {*model.position_layers} == {0}:
        found.append(
            f"POSITION_LAYERS = {model.position_layers}: of each layer 1 or 0, and of "
            "one at least 1; or POSITIONS = 'none'"
        )
    if model.positions == "rotary":
        found += _rotary_problems(model)
    return found + _unused(model)


def _rotary_problems(model: ModelSettings) -> list[str]:
    """How many numbers turn, and how fast."""
    found = []
    latent, fraction = model.attention == "latent", model.rope_fraction
    width = model.rope_head_dim if latent else model.head_dim
    macro = "ROPE_HEAD_DIM" if latent else "HEAD_DIM"
    turned = PositionSettings(fraction=fraction).turned(width)
    if fraction == 1 and width % 2:
        found.append(
            f"{macro} = {width}: rotary positions turn pairs, so it must be even"
        )
    elif not 0 < fraction <= 1 or turned % 2 or abs(turned - fraction * width) > 1e-6:
        found.append(
            f"ROPE_FRACTION = {fraction} of {macro} = {width} numbers: it must be an "
            "even number of them, and at most all"
        )
    if model.rope_base_windowed < 0:
        found.append(
            f"ROPE_BASE_WINDOWED = {model.rope_base_windowed}: must be above 0, or 0 "
            "for ROPE_BASE"
        )
    return found + (_scaling_problems(model) if model.rope_scaling != "none" else [])


def _scaling_problems(model: ModelSettings) -> list[str]:
    """How far angles reach."""
    found, scaling = [], model.rope_scaling
    if model.rope_factor <= 1:
        found.append(
            f"ROPE_FACTOR = {model.rope_factor}: ROPE_SCALING = {scaling!r} reaches "
            "farther than what was learnt by a factor above 1"
        )
    if scaling == "linear":
        return found
    if model.rope_original_length < 1:
        found.append(
            f"ROPE_ORIGINAL_LENGTH = {model.rope_original_length}: ROPE_SCALING = "
            f"{scaling!r} needs the tokens of the length that was learnt"
        )
    slow, fast = model.rope_slow_turns, model.rope_fast_turns
    at_once = scaling == "yarn" and slow == fast  # Kimi K2
    if not 0 < slow < fast and not (at_once and slow > 0):
        found.append(
            f"ROPE_SLOW_TURNS = {slow} and ROPE_FAST_TURNS = {fast}: must be above 0, "
            "and the first the less"
        )
    if model.rope_base <= 1:
        found.append(
            f"ROPE_BASE = {model.rope_base}: ROPE_SCALING = {scaling!r} needs one "
            "above 1"
        )
    if model.rope_attention_factor < 0:
        found.append(
            f"ROPE_ATTENTION_FACTOR = {model.rope_attention_factor}: cannot be negative"
        )
    return found


def _unused(model: ModelSettings) -> list[str]:
    """Settings that mean nothing to the ways that were chosen."""
    rotary = model.positions == "rotary"
    relative = model.positions in ("relative", "relative_per_layer")
    scaled = rotary and model.rope_scaling != "none"
    by_turns = rotary and model.rope_scaling in ("by_parts", "yarn")
    yarn = rotary and model.rope_scaling == "yarn"
    windows = rotary and any(model.attention_windows)
    kind = f"POSITIONS = {model.positions!r}"
    scaling = f"ROPE_SCALING = {model.rope_scaling!r}" if rotary else kind
    no_window = f"ATTENTION_WINDOWS = {model.attention_windows}" if rotary else kind
    attended = model.positions not in ("learned", "none")
    belongs_to = {
        "POSITION_LAYERS": (attended, kind),
        "ROPE_BASE": (rotary, kind),
        "ROPE_FRACTION": (rotary, kind),
        "ROPE_PAIRS": (rotary, kind),
        "ROPE_SCALING": (rotary, kind),
        "ROPE_BASE_WINDOWED": (windows, no_window),
        "ROPE_FACTOR": (scaled, scaling),
        "ROPE_ORIGINAL_LENGTH": (by_turns, scaling),
        "ROPE_FAST_TURNS": (by_turns, scaling),
        "ROPE_SLOW_TURNS": (by_turns, scaling),
        "ROPE_ATTENTION_FACTOR": (yarn, scaling),
        "ROPE_TRUNCATE": (yarn, scaling),
        "RELATIVE_BUCKETS": (relative, kind),
        "RELATIVE_MAX_DISTANCE": (relative, kind),
        "MAX_POSITIONS": (model.positions == "learned", kind),
    }
    default = ModelSettings(1, 1, 1, 1, 1, 1)
    found = []
    for macro, (used, choice) in belongs_to.items():
        field = macro.lower()
        value, unused = getattr(model, field), getattr(default, field)
        if not used and value != unused:
            found.append(
                f"{macro} = {value!r} means nothing to {choice}: leave it at {unused!r}"
            )
    return found
