"""Families of an encoder and a decoder: T5, mT5 and Switch Transformers."""

import functools
from collections.abc import Mapping

from launch.exchange.activations import activation_knob
from launch.exchange.family import Config, Family, Knobs, Said, refuse_excess
from launch.exchange.rules import Rule, Rules
from moe.routing.capacity import capacity
from moe.settings import ModelSettings, RouterSettings

# Their words for ours. What is gated has a matrix more.
_PLAIN = {word: activation_knob(word) for word in ("relu", "gelu", "gelu_new")}
_GATED = {
    "gated-gelu": "geglu",  # by tanh, and so is "gelu_new"
    "gated-gelu_new": "geglu",
    "gated-silu": "swiglu",
}
# So many slots for an expert are no limit.
_NO_LIMIT = 2**20

# --------------------------------------------------------------------------- arrays


def _attention(ours: str, theirs: str) -> Rules:
    return {
        f"{ours}/query": (f"{theirs}.q.weight", "ND,M -> M,N,D"),
        f"{ours}/key": (f"{theirs}.k.weight", "ND,M -> M,N,D"),
        f"{ours}/value": (f"{theirs}.v.weight", "ND,M -> M,N,D"),
        f"{ours}/output": (f"{theirs}.o.weight", "M,ND -> N,D,M"),
    }


def _stack(name: str, feed_forward: int, dense: str) -> Rules:
    """Rules of what a stack has for itself; a feed-forward is its layer's last part."""
    layer = f"layer.{feed_forward}"
    wi, wo = (f"{layer}.{dense}.{matrix}" for matrix in ("wi", "wo"))
    experts = f"{layer}.mlp.experts.expert_{{E}}"
    table = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    norm: Rule = (f"{layer}.layer_norm.weight", "M")
    rules: Rules = {
        "dense/norm/scale": norm,
        "dense/up": (f"{wi}.weight", "F,M -> M,F"),
        "dense/up of 3": (f"{wi}_0.weight + {wi}_1.weight", "c,F,M -> M,c,F"),
        "dense/down": (f"{wo}.weight", "M,F -> F,M"),
        "sparse/norm/scale": norm,
        "sparse/router": (f"{layer}.mlp.router.classifier.weight", "E,M -> M,E"),
        "sparse/experts/up": (f"{experts}.wi.weight", "E,F,M -> E,M,F"),
        "sparse/experts/down": (f"{experts}.wo.weight", "E,M,F -> E,F,M"),
    }
    return {
        f"{name}/distance": (f"{name}.{table}", "b,N"),
        f"{name}/norm/scale": (f"{name}.final_layer_norm.weight", "M"),
    } | {f"{name}/{path}": rule for path, rule in rules.items()}


def _rules(dense: str) -> Rules:
    return {
        "embedding": ("shared.weight", "V,M"),
        # Where there is no other, though it need not be the embedding.
        "head": ("shared.weight", "V,M -> M,V"),
        "attention/norm/scale": ("layer.0.layer_norm.weight", "M"),
        **_attention("attention", "layer.0.SelfAttention"),
        "cross/norm/scale": ("layer.1.layer_norm.weight", "M"),
        **_attention("cross", "layer.1.EncDecAttention"),
        **_stack("encoder", 1, dense),
        **_stack("decoder", 2, dense),
    }


# ---------------------------------------------------------------------- config.json


def _knobs(c: Config) -> Knobs:
    return {
        "ARCHITECTURE": "encoder_decoder",
        "VOCAB_SIZE": c["vocab_size"],
        "NUM_LAYERS": _layers(c)["decoder"],
        "NUM_ENCODER_LAYERS": _layers(c)["encoder"],
        "EMBED_DIM": c["d_model"],
        "NUM_HEADS": c["num_heads"],
        "HEAD_DIM": c["d_kv"],
        "MLP_DIM": c["d_ff"],
        "NORM_EPSILON": float(c["layer_norm_epsilon"]),
        "POSITIONS": "relative",
        "RELATIVE_BUCKETS": c["relative_attention_num_buckets"],
        "RELATIVE_MAX_DISTANCE": c["relative_attention_max_distance"],
        "ATTENTION_SCALE": 1.0,
        "EMBED_SCALE": 1.0,
    }


def _layers(c: Config) -> dict[str, int]:
    number = c["num_layers"]
    return {"encoder": number, "decoder": c.get("num_decoder_layers", number)}


def _config(model: ModelSettings) -> Said:
    encoder = model.num_encoder_layers or model.num_layers
    return {
        "d_model": model.model_dim,
        "d_kv": model.head_dim,
        "d_ff": model.mlp_dim,
        "num_layers": encoder,
        "num_decoder_layers": model.num_layers,
        "num_heads": model.num_heads,
        "layer_norm_epsilon": model.norm_epsilon or 1e-6,
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_max_distance,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }


def _as_head(tied: bool, c: Config) -> Knobs:
    """Returns what makes logits: of an embedding that is the head they are smaller."""
    scale = float(c["d_model"]) ** -0.5 if tied else 1.0
    return {"TIE_EMBEDDINGS": tied, "LOGIT_SCALE": scale}


def _known(word: str, value: str, known: Mapping[str, str]) -> str:
    if value not in known:
        raise ValueError(f"{word} = {value!r} is none of {', '.join(known)}")
    return known[value]


def _theirs(activation: str, known: Mapping[str, str]) -> str:
    """Returns their word for an activation; ours where there is none."""
    return next((word for word, own in known.items() if own == activation), activation)


# -------------------------------------------------------------------------------- T5


def _t5_knobs(c: Config, *, scales: bool) -> Knobs:
    """Returns the knobs of T5.

    Args:
        c: config.json.
        scales: whether the decoder's output is divided by the root of its width where
            the embedding is the head; mT5 never does.
    """
    word = c["feed_forward_proj"]
    activation = _known("feed_forward_proj", word, _PLAIN | _GATED)
    named = word.removeprefix("gated-")
    named = "gelu_new" if word == "gated-gelu" else named
    if c.get("dense_act_fn", named) != named:
        raise ValueError(f"dense_act_fn = {c['dense_act_fn']!r} and {word!r}")
    # Newer files say this, and of all models that the embedding is the head.
    tied = scales and c.get("scale_decoder_outputs", c["tie_word_embeddings"])
    return _knobs(c) | _as_head(tied, c) | {"ACTIVATION": activation, "MOE_EVERY": 0}


def _to_t5(model: ModelSettings, router: RouterSettings, *, scales: bool) -> Said:
    del router
    word = _theirs(model.activation, _PLAIN | _GATED)
    said = {"scale_decoder_outputs": model.tie_embeddings} if scales else {}
    return _config(model) | {"feed_forward_proj": word} | said


# ------------------------------------------------------------------------------ Switch


def _every(c: Config, stack: str) -> int:
    """Returns MOE_EVERY of a stack."""
    number, count = _layers(c)[stack], c[f"num_sparse_{stack}_layers"]
    # A count of 0 makes one layer sparse, too, and one that does not divide others.
    step = c.get(f"{stack}_sparse_step", number // count if count > 0 else number)
    layers = [n for n in range(number) if step == 1 or (step > 0 and n % step == 1)]
    for every in range(1, number + 1):
        if number % every == 0 and layers == list(range(every - 1, number, every)):
            return every
    if not layers:
        return 0
    raise ValueError(
        f"{stack}_sparse_step = {step} makes layers {layers} of {number} sparse, which "
        "is no pattern that MOE_EVERY has"
    )


def _switch(c: Config) -> Knobs:
    knobs = _knobs(c)
    refuse_excess(knobs)
    slots = c["expert_capacity"]
    if type(slots) is not int or slots < 1:
        raise ValueError(f"expert_capacity = {slots!r} is no number of slots")
    return {
        **knobs,
        **_as_head(c["tie_word_embeddings"], c),
        "ACTIVATION": _known("dense_act_fn", c["dense_act_fn"], _PLAIN),
        "MOE_EVERY": _every(c, "decoder"),
        "ENCODER_MOE_EVERY": _every(c, "encoder"),
        "NUM_EXPERTS": c["num_experts"],
        "EXPERT_MLP_DIM": c["d_ff"],
        "NUM_SELECTED_EXPERTS": 1,
        "RENORMALIZE_GATES": "no",
        "MIN_EXPERT_CAPACITY": slots,
    }


def _to_switch(model: ModelSettings, router: RouterSettings) -> Said:
    said = _config(model)
    every = {"encoder": model.encoder_moe_every, "decoder": model.moe_every}
    if every["encoder"] < 0:
        every["encoder"] = model.moe_every
    for stack, number in _layers(said).items():
        step = every[stack]
        said[f"num_sparse_{stack}_layers"] = number // step if step else 0
        said[f"{stack}_sparse_step"] = step
    return said | {
        "d_ff": model.expert_mlp_dim,
        "num_experts": model.num_experts,
        "dense_act_fn": _theirs(model.activation, _PLAIN),
        "expert_capacity": _slots(model, router),
    }


def _slots(model: ModelSettings, router: RouterSettings) -> int:
    """Returns what an expert takes of a row outside training, if groups are rows."""
    if router.eval_capacity_factor == 0:
        return _NO_LIMIT
    found = capacity(router, model.num_experts, train=False)
    return max(found, router.min_capacity)


_DEFAULTS = {
    "vocab_size": 32128,
    "d_kv": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": True,
}
_MUST_BE = {
    "is_encoder_decoder": True,
    "is_decoder": False,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_two_stacks = functools.partial(
    Family,
    layers={"encoder": "encoder.block.{}.", "decoder": "decoder.block.{}."},
    files={"head": ("lm_head.weight", "V,M -> M,V")},
    copies=dict.fromkeys(
        (
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
        "shared.weight",
    ),
    sentencepiece="spiece.model",
    data="data/here_spans.gin",
)
_t5 = functools.partial(_two_stacks, memory=_rules("DenseReluDense"))

T5 = _t5(
    architecture="T5ForConditionalGeneration",
    defaults=_DEFAULTS
    | {
        "d_model": 512,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
    },
    must_be=_MUST_BE,
    knobs=functools.partial(_t5_knobs, scales=True),
    config=functools.partial(_to_t5, scales=True),
)

MT5 = _t5(
    architecture="MT5ForConditionalGeneration",
    defaults=_DEFAULTS
    | {
        "vocab_size": 250112,
        "d_model": 512,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    },
    must_be=_MUST_BE,
    knobs=functools.partial(_t5_knobs, scales=False),
    config=functools.partial(_to_t5, scales=False),
)

SWITCH_TRANSFORMERS = _two_stacks(
    architecture="SwitchTransformersForConditionalGeneration",
    defaults=_DEFAULTS
    | {
        "d_model": 768,
        "d_ff": 2048,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 3,
        "num_experts": 8,
        "expert_capacity": 64,
        "dense_act_fn": "relu",
    },
    must_be=_MUST_BE
    | {
        "is_gated_act": False,
        "router_bias": False,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
    },
    knobs=_switch,
    config=_to_switch,
    memory=_rules("mlp"),
)
