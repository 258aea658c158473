"""GPT-2: a dense decoder with biases everywhere and learned positions."""

import re

from launch.exchange import tables
from launch.exchange.activations import activation_knob, activation_of
from launch.exchange.family import Config, Family, Knobs, Said
from launch.exchange.rules import Rules
from moe.settings import ModelSettings, RouterSettings

_AT = "transformer."
# Which tokens are seen, and what those that are not have for a score.
_FOLLOWING = r"transformer\.h\.\d+\.attn\.(masked_)?bias"


def _rules() -> Rules:
    """Their matrices multiply from the right, as ours do: none is transposed."""
    rules: Rules = {
        "embedding": (f"{_AT}wte.weight", "V,M"),
        "positions": (f"{_AT}wpe.weight", "L,M"),
        "head": ("lm_head.weight", "V,M -> M,V"),
        **tables.layer_norm("decoder/norm", f"{_AT}ln_f"),
        **tables.layer_norm("attention/norm", "ln_1"),
        **tables.layer_norm("dense/norm", "ln_2"),
        "attention/output": ("attn.c_proj.weight", "ND,M -> N,D,M"),
        "attention/output_bias": ("attn.c_proj.bias", "M"),
        "dense/up": ("mlp.c_fc.weight", "M,F"),
        "dense/up_bias": ("mlp.c_fc.bias", "F"),
        "dense/down": ("mlp.c_proj.weight", "F,M"),
        "dense/down_bias": ("mlp.c_proj.bias", "M"),
    }
    for number, name in enumerate(("query", "key", "value"), 1):
        block = f"[{number}/3]ND"
        rules[f"attention/{name}"] = ("attn.c_attn.weight", f"M,{block} -> M,N,D")
        rules[f"attention/{name}_bias"] = ("attn.c_attn.bias", f"{block} -> N,D")
    return rules


def _knobs(c: Config) -> Knobs:
    width, heads = c["n_embd"], c["n_head"]
    if width % heads:
        raise ValueError(f"n_embd = {width} is no multiple of n_head = {heads}")
    return {
        "VOCAB_SIZE": c["vocab_size"],
        "NUM_LAYERS": c["n_layer"],
        "EMBED_DIM": width,
        "NUM_HEADS": heads,
        "HEAD_DIM": width // heads,
        "MLP_DIM": c.get("n_inner", 4 * width),
        "ACTIVATION": activation_knob(c["activation_function"]),
        "MLP_BIASES": True,
        "ATTENTION_BIASES": True,
        "ATTENTION_OUTPUT_BIAS": True,
        "NORM": "layer",
        "NORM_EPSILON": float(c["layer_norm_epsilon"]),
        "POSITIONS": "learned",
        "MAX_POSITIONS": c.get("n_positions", c.get("n_ctx", 1024)),
        "EMBED_SCALE": 1.0,
        "TIE_EMBEDDINGS": c["tie_word_embeddings"],
        "MOE_EVERY": 0,
    }


def _config(model: ModelSettings, router: RouterSettings) -> Said:
    return {
        "n_embd": model.model_dim,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.mlp_dim,
        "n_positions": model.max_positions,
        "n_ctx": model.max_positions,
        "max_position_embeddings": model.max_positions,
        "activation_function": activation_of(model.activation),
        "layer_norm_epsilon": model.norm_epsilon or 1e-5,
    }


def _renamed(name: str) -> str:
    """Puts before a name what files of a model without its output leave out."""
    return name if re.match(r"transformer\.|lm_head\.", name) else f"{_AT}{name}"


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    defaults={
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    must_be={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    also={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    knobs=_knobs,
    config=_config,
    layers={"decoder": f"{_AT}h.{{}}."},
    memory=_rules(),
    ignored=lambda c: _FOLLOWING,
    copies={"lm_head.weight": f"{_AT}wte.weight"},
    renamed=_renamed,
)
