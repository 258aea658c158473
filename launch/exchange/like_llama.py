"""What most families share with Llama: decoders with RMS norms, SwiGLU and RoPE."""

from collections.abc import Callable, Mapping
from typing import Any

from launch.exchange import tables
from launch.exchange.family import Config, Family, Knobs, Said, refuse_excess
from launch.exchange.rotary import rope_knobs, rope_of, rope_parameters
from launch.exchange.rules import Rules
from moe.settings import ModelSettings, RouterSettings

# Of rotary positions, which follow from the base; old files have them.
_FOLLOWING = r".*\.rotary_emb\.inv_freq"
_MOST_AHEAD = 100
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # all mean E
_AHEAD = ("num_nextn_predict_layers", "num_mtp_layers")  # by newer files, by older


def like_llama(
    *,
    architecture: str,
    defaults: Config,
    knobs: Callable[[Config], Knobs],
    config: Callable[[ModelSettings, RouterSettings], Said],
    must_be: Config | None = None,
    memory: Rules | None = None,
    files: Rules | None = None,
    also: Mapping[str, str] | None = None,
    ignored: str = "",
) -> Family:
    """Describes a family by what it has besides, or otherwise; as `Family` has them.

    Of `ignored` it is the pattern alone.
    """
    own = next((word for word in _EXPERTS if word in defaults), None)
    return Family(
        architecture=architecture,
        defaults={"tie_word_embeddings": False, "hidden_act": "silu"} | dict(defaults),
        must_be={"hidden_act": "silu"} | dict(must_be or {}),
        also={word: own for word in _EXPERTS if own} | dict(also or {}),
        knobs=lambda c: _knobs(c) | knobs(c),
        config=lambda model, router: _config(model, router) | config(model, router),
        layers={"decoder": "model.layers.{}."},
        memory=tables.RULES | (memory or {}),
        files=files or {},
        ignored=lambda c: _ignored(c) + (ignored and f"|{ignored}"),
        copies={"lm_head.weight": "model.embed_tokens.weight"},
    )


def _knobs(c: Config) -> Knobs:
    heads = c["num_attention_heads"]
    knobs = {
        "VOCAB_SIZE": c["vocab_size"],
        "NUM_LAYERS": c["num_hidden_layers"],
        "EMBED_DIM": c["hidden_size"],
        "NUM_HEADS": heads,
        "NUM_KV_HEADS": c.get("num_key_value_heads", heads),
        "HEAD_DIM": c.get("head_dim", c["hidden_size"] // heads),
        "MLP_DIM": c["intermediate_size"],
        "ACTIVATION": "swiglu",
        "NORM_EPSILON": float(c["rms_norm_eps"]),
        "EMBED_SCALE": 1.0,
        "TIE_EMBEDDINGS": c["tie_word_embeddings"],
        "MOE_EVERY": 1,
        "NUM_SELECTED_EXPERTS": c["num_experts_per_tok"],
        **rope_knobs(rope_of(c), c),
    }
    refuse_excess(knobs)
    return knobs


def _config(model: ModelSettings, router: RouterSettings) -> Said:
    return {
        "hidden_size": model.model_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon or 1e-6,
        "rope_theta": model.rope_base,
        "rope_parameters": rope_parameters(model),
        "num_experts_per_tok": router.num_selected,
    }


def _ignored(c: Config) -> str:
    """Returns a pattern of arrays that need not be read.

    Layers above the last predict tokens after the next, and are left out: a model
    that comes in does not learn to.
    """
    patterns = [_FOLLOWING]
    above = max(_count(c.get(key)) for key in _AHEAD)
    if above:
        last = c["num_hidden_layers"]
        numbers = "|".join(str(n) for n in range(last, last + above))
        patterns.append(rf"model\.layers\.({numbers})\..*")
    return "|".join(f"(?:{one})" for one in patterns)


def _count(said: Any) -> int:
    return said if type(said) is int and 0 < said < _MOST_AHEAD else 0
