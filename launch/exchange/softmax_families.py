"""Families whose routers choose by a softmax: Mixtral, OLMoE, Qwen3, Granite, ERNIE."""

from launch.exchange import tables
from launch.exchange.family import Config, Knobs, Said, renormalized
from launch.exchange.like_llama import like_llama
from moe.settings import ModelSettings, RouterSettings

# --------------------------------------------------------------------------- Mixtral


def _mixtral(c: Config) -> Knobs:
    return {
        "NUM_EXPERTS": c["num_local_experts"],
        "EXPERT_MLP_DIM": c["intermediate_size"],
        "RENORMALIZE_GATES": "before_drop",
        "ATTENTION_WINDOWS": (c["sliding_window"],) if "sliding_window" in c else (),
    }


def _to_mixtral(model: ModelSettings, router: RouterSettings) -> Said:
    window = model.attention_windows[0] if model.attention_windows else None
    return {
        "intermediate_size": model.expert_mlp_dim,
        "num_local_experts": model.num_experts,
        "sliding_window": window,
    }


# ----------------------------------------------------------------------------- OLMoE


def _olmoe(c: Config) -> Knobs:
    return {
        "NUM_EXPERTS": c["num_experts"],
        "EXPERT_MLP_DIM": c["intermediate_size"],
        "RENORMALIZE_GATES": renormalized(c["norm_topk_prob"]),
        "QK_NORM": "width",
    }


def _to_olmoe(model: ModelSettings, router: RouterSettings) -> Said:
    return {
        "intermediate_size": model.expert_mlp_dim,
        "num_experts": model.num_experts,
        "norm_topk_prob": router.renormalize != "no",
    }


# ------------------------------------------------------------------------- Qwen3-MoE


def _qwen3_moe(c: Config) -> Knobs:
    dense = sorted(c.get("mlp_only_layers", ()))
    every = c["decoder_sparse_step"]
    if dense != list(range(len(dense))) or (dense and every != 1):
        raise ValueError(
            f"mlp_only_layers = {dense} with decoder_sparse_step = {every} is no "
            "pattern that FIRST_DENSE_LAYERS and MOE_EVERY have"
        )
    return {
        "MOE_EVERY": every,
        "FIRST_DENSE_LAYERS": len(dense),
        "NUM_EXPERTS": c["num_experts"],
        "EXPERT_MLP_DIM": c["moe_intermediate_size"],
        "RENORMALIZE_GATES": renormalized(c["norm_topk_prob"]),
        "QK_NORM": "head",
    }


def _to_qwen3_moe(model: ModelSettings, router: RouterSettings) -> Said:
    return {
        "intermediate_size": model.mlp_dim,
        "moe_intermediate_size": model.expert_mlp_dim,
        "num_experts": model.num_experts,
        "norm_topk_prob": router.renormalize != "no",
        "decoder_sparse_step": model.moe_every,
        "mlp_only_layers": list(range(model.first_dense_layers)),
    }


# ----------------------------------------------------------------------- Granite MoE


def _granitemoe(c: Config) -> Knobs:
    head_dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    scale = float(c["attention_multiplier"])
    return {
        "NUM_EXPERTS": c["num_local_experts"],
        "EXPERT_MLP_DIM": c["intermediate_size"],
        "RENORMALIZE_GATES": "before_drop",
        "ATTENTION_BIASES": c["attention_bias"],
        "ATTENTION_OUTPUT_BIAS": c["attention_bias"],
        "ATTENTION_SCALE": 0.0 if scale == head_dim**-0.5 else scale,
        "EMBED_SCALE": float(c["embedding_multiplier"]),
        "RESIDUAL_SCALE": float(c["residual_multiplier"]),
        "LOGIT_SCALE": 1.0 / c["logits_scaling"],
    }


def _to_granitemoe(model: ModelSettings, router: RouterSettings) -> Said:
    return {
        "intermediate_size": model.expert_mlp_dim,
        "num_local_experts": model.num_experts,
        "attention_bias": model.attention_biases,
        "attention_multiplier": model.attention_scale or model.head_dim**-0.5,
        "embedding_multiplier": model.embed_scale or model.model_dim**0.5,
        "residual_multiplier": model.residual_scale,
        "logits_scaling": _inverse(model.logit_scale),
    }


def _inverse(x: float) -> float:
    """Returns 1 / x, as short as it is still that."""
    short = float(f"{1.0 / x:.12g}")
    return short if 1.0 / short == x else 1.0 / x


# ------------------------------------------------------------------------- ERNIE 4.5


def _ernie4_5_moe(c: Config) -> Knobs:
    width, last = c["moe_intermediate_size"], c["num_hidden_layers"] - 1
    if c["moe_layer_end_index"] not in (-1, last):
        raise ValueError(
            f"moe_layer_end_index = {c['moe_layer_end_index']}: layers above it are "
            "dense, and no knob has such"
        )
    return {
        "NUM_EXPERTS": c["num_experts"],
        "EXPERT_MLP_DIM": width,
        "SHARED_EXPERT_MLP_DIM": width * c["moe_num_shared_experts"],
        "FIRST_DENSE_LAYERS": c["moe_layer_start_index"],
        "RENORMALIZE_GATES": "before_drop",
        "ROUTER_BIAS": True,
        "ROPE_PAIRS": "neighbours",
    }


def _to_ernie4_5_moe(model: ModelSettings, router: RouterSettings) -> Said:
    return {
        "intermediate_size": model.mlp_dim,
        "moe_intermediate_size": model.expert_mlp_dim,
        "moe_num_experts": model.num_experts,
        "moe_k": router.num_selected,
        "moe_num_shared_experts": model.shared_expert_mlp_dim // model.expert_mlp_dim,
        "moe_layer_start_index": model.first_dense_layers,
        "moe_layer_end_index": model.num_layers - 1,
    }


MIXTRAL = like_llama(
    architecture="MixtralForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    knobs=_mixtral,
    config=_to_mixtral,
    files=tables.EXPERTS_OF_MIXTRAL,
)

OLMOE = like_llama(
    architecture="OlmoeForCausalLM",
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "norm_topk_prob": False,
    },
    must_be={"attention_bias": False, "clip_qkv": None},
    knobs=_olmoe,
    config=_to_olmoe,
    memory=tables.NORMS_OF_WHOLE_WIDTH,
    files=tables.EXPERTS,
)

QWEN3_MOE = like_llama(
    architecture="Qwen3MoeForCausalLM",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    must_be={"attention_bias": False, "use_sliding_window": False},
    knobs=_qwen3_moe,
    config=_to_qwen3_moe,
    files=tables.EXPERTS,
)

GRANITEMOE = like_llama(
    architecture="GraniteMoeForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "attention_bias": False,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    knobs=_granitemoe,
    config=_to_granitemoe,
    memory=tables.GRANITE,
    files=tables.GRANITE_IN_FILES,
)

ERNIE4_5_MOE = like_llama(
    architecture="Ernie4_5_MoeForCausalLM",
    defaults={
        "vocab_size": 103424,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "moe_intermediate_size": 1536,
        "num_experts_per_tok": 6,
        "num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
    },
    must_be={"use_bias": False, "moe_layer_interval": 1, "moe_norm_min": 1e-12},
    also={"moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok"},
    knobs=_ernie4_5_moe,
    config=_to_ernie4_5_moe,
    memory=tables.BIAS_OF_ERNIE,
    files=tables.EXPERTS | tables.BIAS_OF_ERNIE_IN_FILES,
    ignored=r"model\.mtp_.*",  # what predicts tokens after the next
)
