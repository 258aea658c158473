"""Rotary positions in the words of config.json, and in ours."""

import math
from collections.abc import Mapping
from typing import Any

from moe.settings import ModelSettings

Config = Mapping[str, Any]


def rope_of(c: Config) -> dict[str, Any]:
    """Returns `rope_parameters`; of older files, what came to be in it."""
    old = {"rope_type": "default", "rope_theta": c["rope_theta"]}
    if "partial_rotary_factor" in c:
        old["partial_rotary_factor"] = c["partial_rotary_factor"]
    elif "rotary_dim" in c:  # the same, of MiniMax-M2
        old["partial_rotary_factor"] = c["rotary_dim"] / c["head_dim"]
    rope = old | dict(c.get("rope_scaling", {})) | dict(c.get("rope_parameters", {}))
    if "type" in rope:  # older still
        rope["rope_type"] = rope.pop("type")
    return rope


def rope_knobs(rope: Config, c: Config) -> dict[str, Any]:
    """Returns our knobs of what `rope_parameters` say.

    Raises:
        ValueError: a kind of scaling that is not known.
    """
    knobs: dict[str, Any] = {
        "ROPE_BASE": float(rope["rope_theta"]),
        "ROPE_FRACTION": float(rope.get("partial_rotary_factor", 1.0)),
    }
    if not 0 < knobs["ROPE_FRACTION"] <= 1:
        raise ValueError(f"partial_rotary_factor = {knobs['ROPE_FRACTION']}")
    kind = rope["rope_type"]
    if kind == "default":
        return knobs
    if kind == "linear":
        return knobs | {"ROPE_SCALING": "linear", "ROPE_FACTOR": float(rope["factor"])}
    if kind != "yarn":
        raise ValueError(f"rope_type {kind!r}: known are default, linear and yarn")
    length = rope.get("original_max_position_embeddings", 0)
    return knobs | {
        "ROPE_SCALING": "yarn",
        "ROPE_FACTOR": float(rope["factor"]),
        "ROPE_ORIGINAL_LENGTH": length or c["max_position_embeddings"],
        "ROPE_FAST_TURNS": float(rope.get("beta_fast") or 32),
        "ROPE_SLOW_TURNS": float(rope.get("beta_slow") or 1),
        "ROPE_TRUNCATE": rope.get("truncate", True),
        "ROPE_ATTENTION_FACTOR": _attention_factor(rope),
    }


def mscale(factor: float, by: float) -> float:
    """Returns YaRN's factor of a length that is so much longer (arXiv:2309.00071)."""
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


def _attention_factor(rope: Config) -> float:
    """Returns what is said of it, or follows from a ratio; 0 for neither."""
    if rope.get("attention_factor"):
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        ratio = mscale(rope["factor"], rope["mscale"])
        return ratio / mscale(rope["factor"], rope["mscale_all_dim"])
    return 0.0


def rope_parameters(model: ModelSettings) -> dict[str, Any]:
    """Returns the `rope_parameters` of a model of ours."""
    said: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_base}
    if model.rope_fraction != 1.0:
        said["partial_rotary_factor"] = model.rope_fraction
    if model.rope_scaling == "none":
        return said
    said |= {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling == "yarn":
        said |= {
            "original_max_position_embeddings": model.rope_original_length,
            "beta_fast": model.rope_fast_turns,
            "beta_slow": model.rope_slow_turns,
            "truncate": model.rope_truncate,
        }
        if model.rope_attention_factor:
            said["attention_factor"] = model.rope_attention_factor
    return said
