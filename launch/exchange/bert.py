"""BERT (arXiv:1810.04805): an encoder, with its output for masked tokens or without."""

import re

from launch.exchange import tables
from launch.exchange.activations import activation_knob, activation_of
from launch.exchange.family import Config, Family, Knobs, Said
from launch.exchange.rules import Rules
from moe.settings import ModelSettings, RouterSettings

_HEAD = "cls.predictions"
_WITH_A_HEAD = {"BertForMaskedLM", "BertForPreTraining"}
_WITHOUT = "BertModel"
# What says whether a sentence follows another; and places, as files once kept them.
_LEFT_OUT = (
    r"bert\.pooler\.dense\.(weight|bias)|cls\.seq_relationship\.(weight|bias)"
    r"|bert\.embeddings\.(position_ids|token_type_ids)"
)


def _linear(ours: str, theirs: str, dims: str, of_bias: str) -> Rules:
    """Returns the rules of a matrix and of its bias."""
    return {
        ours: (f"{theirs}.weight", dims),
        f"{ours}_bias": (f"{theirs}.bias", of_bias),
    }


def _rules() -> Rules:
    rules: Rules = {
        "embedding": ("bert.embeddings.word_embeddings.weight", "V,M"),
        "positions": ("bert.embeddings.position_embeddings.weight", "L,M"),
        "token_types": ("bert.embeddings.token_type_embeddings.weight", "T,M"),
        **tables.layer_norm("embedding_norm", "bert.embeddings.LayerNorm"),
        **tables.layer_norm("transform/norm", f"{_HEAD}.transform.LayerNorm"),
        "transform/kernel": (f"{_HEAD}.transform.dense.weight", "O,M -> M,O"),
        "transform/bias": (f"{_HEAD}.transform.dense.bias", "O"),
        "output_bias": (f"{_HEAD}.bias", "V"),
        **tables.layer_norm("attention/norm", "attention.output.LayerNorm"),
        **_linear("attention/output", "attention.output.dense", "M,ND -> N,D,M", "M"),
        **tables.layer_norm("dense/norm", "output.LayerNorm"),
        **_linear("dense/up", "intermediate.dense", "F,M -> M,F", "F"),
        **_linear("dense/down", "output.dense", "M,F -> F,M", "M"),
    }
    for name in ("query", "key", "value"):
        dims = "ND,M -> M,N,D", "ND -> N,D"
        rules |= _linear(f"attention/{name}", f"attention.self.{name}", *dims)
    return rules


def _knobs(c: Config) -> Knobs:
    width, heads = c["hidden_size"], c["num_attention_heads"]
    if width % heads:
        raise ValueError(
            f"hidden_size = {width} is no multiple of num_attention_heads = {heads}"
        )
    has_head = _has_head(c)
    return {
        "ARCHITECTURE": "encoder",
        "VOCAB_SIZE": c["vocab_size"],
        "NUM_LAYERS": c["num_hidden_layers"],
        "EMBED_DIM": width,
        "NUM_HEADS": heads,
        "HEAD_DIM": width // heads,
        "MLP_DIM": c["intermediate_size"],
        "ACTIVATION": activation_knob(c["hidden_act"]),
        "MLP_BIASES": True,
        "ATTENTION_BIASES": True,
        "ATTENTION_OUTPUT_BIAS": True,
        "NORM": "layer",
        "NORM_PLACE": "after",
        "NORM_EPSILON": float(c["layer_norm_eps"]),
        "POSITIONS": "learned",
        "MAX_POSITIONS": c["max_position_embeddings"],
        "TOKEN_TYPES": c["type_vocab_size"],
        "EMBEDDING_NORM": True,
        "OUTPUT_TRANSFORM": has_head,
        "OUTPUT_BIAS": has_head,
        "EMBED_SCALE": 1.0,
        "TIE_EMBEDDINGS": True,
        "MOE_EVERY": 0,
    }


def _has_head(c: Config) -> bool:
    """Whether its class predicts masked tokens; one that says no class does."""
    return not c["architectures"] or not _WITH_A_HEAD.isdisjoint(c["architectures"])


def _config(model: ModelSettings, router: RouterSettings) -> Said:
    said = {} if model.output_transform else {"architectures": [_WITHOUT]}
    return said | {
        "hidden_size": model.model_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": activation_of(model.activation),
        "layer_norm_eps": model.norm_epsilon or 1e-5,
        "max_position_embeddings": model.max_positions,
        "type_vocab_size": model.token_types,
        "pad_token_id": 0,
    }


def _renamed(name: str) -> str:
    """Returns a name as newer files have it, and those of models with an output."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    return f"bert.{name}" if re.match(r"(embeddings|encoder|pooler)\.", name) else name


BERT = Family(
    architecture="BertForMaskedLM",
    defaults={
        "architectures": [],
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    },
    must_be={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    knobs=_knobs,
    config=_config,
    layers={"encoder": "bert.encoder.layer.{}."},
    memory=_rules(),
    ignored=lambda c: _LEFT_OUT,
    copies={
        f"{_HEAD}.decoder.weight": "bert.embeddings.word_embeddings.weight",
        f"{_HEAD}.decoder.bias": f"{_HEAD}.bias",
    },
    renamed=_renamed,
    data="data/here_masked.gin",
)
