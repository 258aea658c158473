"""Families whose routers choose by a softmax: Mixtral, OLMoE, Qwen3-MoE."""

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
