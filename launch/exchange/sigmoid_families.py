"""Families whose routers score by a sigmoid: GLM-4.5, MiniMax-M2, DeepSeek-V3."""

import math

from launch.exchange import tables
from launch.exchange.family import Config, Knobs, Said, renormalized
from launch.exchange.like_llama import like_llama
from launch.exchange.rotary import mscale, rope_of, rope_parameters
from moe.settings import ModelSettings, RouterSettings

_SIGMOID = {"ROUTER_SCORES": "sigmoid", "ROUTER_BIAS": True}

# ------------------------------------------------------------------ DeepSeek's experts


def _experts(c: Config) -> Knobs:
    """Returns what GLM-4.5 has of DeepSeek-V3: all but attention."""
    width, groups = c["moe_intermediate_size"], c.get("n_group", 1)
    knobs = {
        "NUM_EXPERTS": c["n_routed_experts"],
        "EXPERT_MLP_DIM": width,
        "SHARED_EXPERT_MLP_DIM": width * c["n_shared_experts"],
        "FIRST_DENSE_LAYERS": c["first_k_dense_replace"],
        "RENORMALIZE_GATES": renormalized(c["norm_topk_prob"]),
        "GATE_SCALE": float(c["routed_scaling_factor"]),
        **_SIGMOID,
    }
    if groups > 1:
        knobs |= {
            "NUM_EXPERT_GROUPS": groups,
            "NUM_SELECTED_GROUPS": c["topk_group"],
            "EXPERT_GROUP_SCORE": "top2_sum",
        }
    return knobs


def _to_experts(model: ModelSettings, router: RouterSettings) -> Said:
    return {
        "intermediate_size": model.mlp_dim,
        "moe_intermediate_size": model.expert_mlp_dim,
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.shared_expert_mlp_dim // model.expert_mlp_dim,
        "first_k_dense_replace": model.first_dense_layers,
        "norm_topk_prob": router.renormalize != "no",
        "routed_scaling_factor": router.gate_scale,
        "n_group": router.num_expert_groups,
        "topk_group": router.num_selected_groups,
        "num_nextn_predict_layers": 0,
    }


# --------------------------------------------------------------------------- GLM-4.5


def _glm4_moe(c: Config) -> Knobs:
    return _experts(c) | {
        "QK_NORM": "head" if c["use_qk_norm"] else "none",
        "ATTENTION_BIASES": c["attention_bias"],
        "ATTENTION_OUTPUT_BIAS": False,
    }


def _to_glm4_moe(model: ModelSettings, router: RouterSettings) -> Said:
    return _to_experts(model, router) | {
        "use_qk_norm": model.qk_norm != "none",
        "attention_bias": model.attention_biases,
        "partial_rotary_factor": model.rope_fraction,
    }


# ------------------------------------------------------------------------ MiniMax-M2


def _minimax_m2(c: Config) -> Knobs:
    return {
        "NUM_EXPERTS": c["num_local_experts"],
        "EXPERT_MLP_DIM": c["intermediate_size"],
        "RENORMALIZE_GATES": "before_drop",
        "QK_NORM": "width",
        **_SIGMOID,
    }


def _to_minimax_m2(model: ModelSettings, router: RouterSettings) -> Said:
    return {
        "intermediate_size": model.expert_mlp_dim,
        "num_local_experts": model.num_experts,
        "rotary_dim": round(model.head_dim * model.rope_fraction),
    }


# ----------------------------------------------------------------------- DeepSeek-V3


def _deepseek_v3(c: Config) -> Knobs:
    width = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    rope, scale = rope_of(c), 0.0
    if not c.get("q_lora_rank"):
        raise ValueError("q_lora_rank is null: queries have no rules without a latent")
    if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
        of_all = mscale(rope["factor"], rope["mscale_all_dim"])
        scale = of_all**2 / math.sqrt(width)
    return _experts(c) | {
        "ATTENTION": "latent",
        "NUM_KV_HEADS": 0,
        "HEAD_DIM": c["qk_nope_head_dim"],
        "ROPE_HEAD_DIM": c["qk_rope_head_dim"],
        "VALUE_HEAD_DIM": c["v_head_dim"],
        "QUERY_LATENT_DIM": c["q_lora_rank"],
        "KV_LATENT_DIM": c["kv_lora_rank"],
        "ROPE_PAIRS": "neighbours" if c["rope_interleave"] else "halves",
        "ATTENTION_SCALE": scale,
    }


def _to_deepseek_v3(model: ModelSettings, router: RouterSettings) -> Said:
    said = _to_experts(model, router) | {
        "num_key_value_heads": model.num_heads,
        "head_dim": model.rope_head_dim,
        "qk_nope_head_dim": model.head_dim,
        "qk_rope_head_dim": model.rope_head_dim,
        "v_head_dim": model.value_head_dim or model.head_dim,
        "q_lora_rank": model.query_latent_dim or None,
        "kv_lora_rank": model.kv_latent_dim,
        "rope_interleave": model.rope_pairs == "neighbours",
    }
    if model.rope_scaling == "yarn" and model.attention_scale:
        width = model.head_dim + model.rope_head_dim
        of_all = math.sqrt(model.attention_scale * math.sqrt(width))
        by = round((of_all - 1.0) / (0.1 * math.log(model.rope_factor)), 6)
        rope = rope_parameters(model) | {"mscale_all_dim": by}
        if rope.get("attention_factor") == 1.0:  # the ratio of both
            rope |= {"mscale": by}
            del rope["attention_factor"]
        said["rope_parameters"] = rope
    return said


GLM4_MOE = like_llama(
    architecture="Glm4MoeForCausalLM",
    defaults={
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "num_nextn_predict_layers": 1,
    },
    knobs=_glm4_moe,
    config=_to_glm4_moe,
    files=tables.EXPERTS,
)

MINIMAX_M2 = like_llama(
    architecture="MiniMaxM2ForCausalLM",
    defaults={
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "num_experts_per_tok": 8,
        "num_local_experts": 256,
    },
    must_be={
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "shared_intermediate_size": 0,
    },
    knobs=_minimax_m2,
    config=_to_minimax_m2,
    memory=tables.NORMS_OF_WHOLE_WIDTH | tables.BIAS_BESIDE_THE_GATE,
    files=tables.EXPERTS_OF_MIXTRAL | tables.BIAS_OF_MIXTRAL,
)

DEEPSEEK_V3 = like_llama(
    architecture="DeepseekV3ForCausalLM",
    defaults={
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 4096,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_nextn_predict_layers": 1,
    },
    must_be={
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    },
    knobs=_deepseek_v3,
    config=_to_deepseek_v3,
    memory=tables.LATENTS,
    files=tables.EXPERTS,
)
