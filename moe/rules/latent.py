"""Rules of latent attention. Standard library only."""

from typing import Any

from moe.settings import ModelSettings


def latent_problems(model: ModelSettings) -> list[str]:
    """What latent attention needs, what means nothing to it, and its own to others."""
    widths = {
        "QUERY_LATENT_DIM": model.query_latent_dim,
        "KV_LATENT_DIM": model.kv_latent_dim,
        "ROPE_HEAD_DIM": model.rope_head_dim,
        "VALUE_HEAD_DIM": model.value_head_dim,
    }
    epsilon, default = model.latent_norm_epsilon, ModelSettings.latent_norm_epsilon
    unused: dict[str, tuple[Any, Any]]
    if model.attention == "heads":
        unused = {macro: (value, 0) for macro, value in widths.items()}
        unused["LATENT_NORM_EPSILON"] = epsilon, default
        found = []
    else:
        unused = {
            "NUM_KV_HEADS": (model.num_kv_heads, 0),
            "ATTENTION_BIASES": (model.attention_biases, False),
            "ATTENTION_OUTPUT_BIAS": (model.attention_output_bias, False),
            "QK_NORM": (model.qk_norm, "none"),
            "ATTENTION_GROWTH": (model.attention_growth, 0.0),
        }
        needed = ("KV_LATENT_DIM", "ROPE_HEAD_DIM")
        found = [
            f"{macro} = {widths[macro]}: ATTENTION = 'latent' needs at least 1"
            for macro in needed
            if widths[macro] < 1
        ]
        found += [
            f"{macro} = {value}: cannot be negative"
            for macro, value in widths.items()
            if macro not in needed and value < 0
        ]
        if epsilon <= 0:
            found.append(f"LATENT_NORM_EPSILON = {epsilon}: must be above 0")
        if model.positions in ("relative", "relative_per_layer", "alibi"):
            found.append(
                f"POSITIONS = {model.positions!r}: ATTENTION = 'latent' has no bias by "
                "distance; use 'rotary', 'learned' or 'none'"
            )
        if model.shape == "encoder_decoder":
            found.append(
                "ATTENTION = 'latent' sees no other stack: use 'heads' with "
                "ARCHITECTURE = 'encoder_decoder'"
            )
    return found + [
        f"{macro} = {value} means nothing to ATTENTION = {model.attention!r}: leave it "
        f"at {same}"
        for macro, (value, same) in unused.items()
        if value != same
    ]
