"""The public models that are compared, each in their words and in ours."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from launch.exchange import tables
from launch.exchange.bert import BERT
from launch.exchange.gpt2 import GPT2
from launch.exchange.rules import Rules
from launch.exchange.two_stacks import MT5, SWITCH_TRANSFORMERS, T5
from moe.settings import ModelSettings, RouterSettings

ROWS, LENGTH, ENCODER_LENGTH = 2, 12, 15
VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 4, 2, 8
DENSE_DIM, EXPERT_DIM, WINDOW = 48, 24, 5
BASE, EPSILON = 100.0, 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One public model, small.

    Attributes:
        theirs: its classes in `transformers`, without what their names end in.
        head: end of the name of the one that has logits.
        config: fields of their configuration, beside the sizes that all share, which
            two stacks do not; "rope" is what its `rope_parameters` have more.
        ours: fields of `ModelSettings`, beside those.
        router: fields of `RouterSettings`; None where no layer is sparse.
        rules: names and shapes of its arrays, where they are not those of
            `tables.RULES`.
        layers: what the names of a layer's arrays begin with, by stack.
    """

    theirs: str
    head: str = "ForCausalLM"
    config: Mapping[str, Any]
    ours: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    router: Mapping[str, Any] | None = None
    rules: Rules = dataclasses.field(default_factory=dict)
    layers: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"decoder": "model.layers.{}."}
    )

    def model_settings(self) -> ModelSettings:
        """Returns what the model is in our words."""
        fields: dict[str, Any] = {
            "vocab_size": VOCAB,
            "num_layers": 2,
            "model_dim": WIDTH,
            "num_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "mlp_dim": DENSE_DIM,
            "activation": "swiglu",
            "norm_epsilon": EPSILON,
            "rope_base": BASE,
            "embed_scale": 1.0,
            "moe_every": 0 if self.router is None else 1,
            "num_experts": 4,
            "expert_mlp_dim": EXPERT_DIM,
        }
        return ModelSettings(**fields | dict(self.ours))

    def router_settings(self) -> RouterSettings:
        """Returns its router; each token is a group, whose sums are its choices."""
        fields = {"num_selected": 2, "capacity_factor": 0.0, "group_size": 1}
        return RouterSettings(**fields | dict(self.router or {}))

    def lengths(self) -> dict[str, int]:
        """Returns how many tokens a row of each stack has."""
        lengths = {"encoder": ENCODER_LENGTH, "decoder": LENGTH}
        return {stack: lengths[stack] for stack in self.layers}

    def all_rules(self) -> Rules:
        """Returns the rules of all its arrays."""
        return tables.RULES | self.rules


RENORMALIZED = {"renormalize": "before_drop"}
SIGMOID = RENORMALIZED | {"scores": "sigmoid", "selection_bias": True}
GROUPS = {"num_expert_groups": 4, "num_selected_groups": 2, "group_score": "top2_sum"}
THEIR_GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
QWEN = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT_DIM,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
ONE_DENSE_LAYER = {
    "intermediate_size": DENSE_DIM,
    "moe_intermediate_size": EXPERT_DIM,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
OUR_DENSE_LAYER = {
    "num_experts": 8,
    "first_dense_layers": 1,
    "shared_expert_mlp_dim": EXPERT_DIM,
}
ODD = {"vocab_size": 67, "hidden_size": 35, "num_attention_heads": 5}
OUR_ODD = {"vocab_size": 67, "model_dim": 35, "num_heads": 5, "head_dim": 7}
WITH_BIASES = {
    "num_kv_heads": 0,
    "norm": "layer",
    "mlp_biases": True,
    "attention_biases": True,
    "attention_output_bias": True,
    "positions": "learned",
    "max_positions": 64,
    "tie_embeddings": True,
}
HALF_TURNED = {"rope": {"partial_rotary_factor": 0.5}}
YARN_FACTOR = 4.0
YARN = {
    "rope_scaling": "yarn",
    "rope_factor": YARN_FACTOR,
    "rope_original_length": 64,
    "rope_fast_turns": 8.0,
}
THEIR_YARN = {
    "rope_type": "yarn",
    "factor": YARN_FACTOR,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
MSCALE = 0.1 * math.log(YARN_FACTOR) + 1  # of mscale = mscale_all_dim = 1
THEIR_T5 = {
    "vocab_size": 67,
    "d_model": 35,
    "d_kv": 7,
    "d_ff": 45,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 5,
    "relative_attention_num_buckets": 10,
    "relative_attention_max_distance": 11,
    "layer_norm_epsilon": EPSILON,
    "decoder_start_token_id": 0,
}
OUR_T5 = {
    "shape": "encoder_decoder",
    "vocab_size": 67,
    "model_dim": 35,
    "head_dim": 7,
    "mlp_dim": 45,
    "num_encoder_layers": 4,
    "num_layers": 3,
    "num_heads": 5,
    "num_kv_heads": 0,
    "positions": "relative",
    "relative_buckets": 10,
    "relative_max_distance": 11,
    "attention_scale": 1.0,
}
TIED = {"tie_embeddings": True, "logit_scale": 35**-0.5}
THEIR_SWITCH = {
    "num_experts": 5,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 3,
}
OUR_SWITCH = {
    "activation": "relu",
    "num_experts": 5,
    "expert_mlp_dim": 45,
    "moe_every": 1,
    "encoder_moe_every": 2,
}
OUR_SLOTS = {"num_selected": 1, "capacity_factor": 1e-6, "eval_capacity_factor": 1e-6}

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        theirs="Mixtral",
        config={**FOUR, "sliding_window": None},
        router=RENORMALIZED,
    ),
    "olmoe": Family(
        theirs="Olmoe",
        config={"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
        | {"norm_topk_prob": False},
        ours={"qk_norm": "width"},
        router={},
        rules=tables.NORMS_OF_WHOLE_WIDTH,
    ),
    "llama_linear": Family(
        theirs="Llama",
        config={"intermediate_size": DENSE_DIM}
        | {"rope": {"rope_type": "linear", "factor": YARN_FACTOR}},
        ours={"rope_scaling": "linear", "rope_factor": YARN_FACTOR},
    ),
    "llama_by_parts": Family(
        theirs="Llama",
        config={
            "intermediate_size": DENSE_DIM,
            "rope": {
                "rope_type": "llama3",
                "factor": YARN_FACTOR,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
        ours=YARN | {"rope_scaling": "by_parts", "rope_fast_turns": 4.0},
    ),
    "llama_yarn": Family(
        theirs="Llama",
        config={"intermediate_size": DENSE_DIM, "rope": THEIR_YARN},
        ours=YARN,
    ),
    "olmo2": Family(
        theirs="Olmo2",
        config={"intermediate_size": DENSE_DIM},
        ours={"norm_place": "output", "qk_norm": "width"},
        rules=tables.NORMS_OF_WHOLE_WIDTH | tables.NORMS_OF_OUTPUT,
    ),
    "qwen2_moe": Family(
        theirs="Qwen2Moe",
        config={**QWEN, "shared_expert_intermediate_size": 40, "norm_topk_prob": False},
        ours={"attention_biases": True, "attention_output_bias": False}
        | {"shared_expert_mlp_dim": 40, "shared_expert_gate": True},
        router={},
        rules=tables.ONE_SHARED_EXPERT,
    ),
    "qwen3_moe": Family(
        theirs="Qwen3Moe",
        config={**QWEN, "norm_topk_prob": True},
        ours={"qk_norm": "head"},
        router=RENORMALIZED,
    ),
    "qwen3_next": Family(  # its layers of attention; those of gated deltas are no kind
        theirs="Qwen3Next",
        config={
            **QWEN,
            "layer_types": ["full_attention"] * 2,
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
            "rope": {"partial_rotary_factor": 0.25},
        },
        ours={
            "norm": "rms_plus_one",
            "qk_norm": "head",
            "attention_output_gate": True,
            "rope_fraction": 0.25,
            "shared_expert_mlp_dim": 40,
            "shared_expert_gate": True,
        },
        router=RENORMALIZED,
        rules=tables.ONE_SHARED_EXPERT | tables.GATE_BESIDE_QUERIES,
    ),
    "glm4_moe": Family(
        theirs="Glm4Moe",
        config={**ONE_DENSE_LAYER, **THEIR_GROUPS, **HALF_TURNED}
        | {"routed_scaling_factor": 1.5, "use_qk_norm": True, "attention_bias": True},
        ours={**OUR_DENSE_LAYER, "rope_fraction": 0.5, "qk_norm": "head"}
        | {"attention_biases": True, "attention_output_bias": False},
        router={**SIGMOID, **GROUPS, "gate_scale": 1.5},
    ),
    "minimax_m2": Family(
        theirs="MiniMaxM2",
        config={**FOUR, **HALF_TURNED, "rotary_dim": HEAD_DIM // 2},
        ours={"qk_norm": "width", "rope_fraction": 0.5},
        router=SIGMOID,
        rules=tables.NORMS_OF_WHOLE_WIDTH | tables.BIAS_BESIDE_THE_GATE,
    ),
    "deepseek_v3": Family(
        theirs="DeepseekV3",
        config={
            **ONE_DENSE_LAYER,
            **THEIR_GROUPS,
            "routed_scaling_factor": 2.5,
            "num_key_value_heads": HEADS,
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": HEAD_DIM,
            "v_head_dim": 6,
            "rope_interleave": True,
            "rope": {**THEIR_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        ours={
            **OUR_DENSE_LAYER,
            "attention": "latent",
            "num_kv_heads": 0,
            "query_latent_dim": 16,
            "kv_latent_dim": 12,
            "rope_head_dim": 4,
            "value_head_dim": 6,
            "rope_pairs": "neighbours",
            **YARN,
            "rope_attention_factor": 1.0,
            "attention_scale": MSCALE**2 / math.sqrt(HEAD_DIM + 4),
        },
        router={**SIGMOID, **GROUPS, "gate_scale": 2.5},
        rules=tables.LATENTS,
    ),
    "gpt_oss": Family(
        theirs="GptOss",
        config={
            **FOUR,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope": {**THEIR_YARN, "truncate": False},
        },
        ours={
            "activation": "swiglu_clamped",
            "expert_biases": True,
            "attention_biases": True,
            "attention_output_bias": True,
            "attention_sinks": True,
            "attention_windows": (WINDOW, 0),
            **YARN,
            "rope_truncate": False,
        },
        router={**RENORMALIZED, "logit_bias": True},
        rules=tables.GPT_OSS,
    ),
    "llama4": Family(
        theirs="Llama4",
        config={
            "num_hidden_layers": 4,
            "intermediate_size": EXPERT_DIM,
            "intermediate_size_mlp": DENSE_DIM,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 4,
            "use_qk_norm": True,
            "attention_chunk_size": WINDOW,
            "attn_temperature_tuning": True,
            "floor_scale": 3,
            "attn_scale": 0.5,
        },
        ours={
            "num_layers": 4,
            "moe_every": 2,
            "qk_norm": "unit",
            "rope_pairs": "neighbours",
            "position_layers": (1, 1, 1, 0),
            "attention_chunks": (WINDOW, WINDOW, WINDOW, 0),
            "attention_growth": 0.5,
            "attention_growth_length": 3,
            "shared_expert_mlp_dim": EXPERT_DIM,
        },
        router={"num_selected": 1, "scores": "sigmoid", "gate_place": "input"},
        rules=tables.LLAMA_4,
    ),
    "granitemoe": Family(
        theirs="GraniteMoe",
        config={
            **FOUR,
            "vocab_size": 67,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 5.0,
            "tie_word_embeddings": True,
        },
        ours={
            "vocab_size": 67,
            "num_heads": 6,
            "num_kv_heads": 3,
            "embed_scale": 3.0,
            "attention_scale": 0.2,
            "residual_scale": 0.4,
            "logit_scale": 1 / 5.0,
            "tie_embeddings": True,
        },
        router=RENORMALIZED,
        rules=tables.GRANITE,
    ),
    "ernie4_5_moe": Family(
        theirs="Ernie4_5_Moe",
        config={
            "vocab_size": 67,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "intermediate_size": DENSE_DIM,
            "moe_intermediate_size": EXPERT_DIM,
            "moe_num_experts": 5,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": True,
        },
        ours={
            "vocab_size": 67,
            "num_heads": 6,
            "num_kv_heads": 3,
            **OUR_DENSE_LAYER,
            "num_experts": 5,
            "rope_pairs": "neighbours",
            "tie_embeddings": True,
        },
        router=RENORMALIZED | {"selection_bias": True},
        rules=tables.BIAS_OF_ERNIE,
    ),
    "gpt2": Family(
        theirs="GPT2",
        head="LMHeadModel",
        config=ODD
        | {"n_inner": DENSE_DIM, "layer_norm_epsilon": EPSILON}
        | {"activation_function": "gelu_new", "tie_word_embeddings": True}
        | {"max_position_embeddings": 64},
        ours=OUR_ODD | WITH_BIASES | {"activation": "gelu"},
        rules=GPT2.memory,
        layers=GPT2.layers,
    ),
    "bert": Family(
        theirs="Bert",
        head="ForMaskedLM",
        config=ODD
        | {"intermediate_size": DENSE_DIM, "layer_norm_eps": 1e-12}
        | {"hidden_act": "gelu", "tie_word_embeddings": True}
        | {"max_position_embeddings": 64},
        ours=OUR_ODD
        | WITH_BIASES
        | {
            "shape": "encoder",
            "activation": "gelu_exact",
            "norm_place": "after",
            "norm_epsilon": 1e-12,
            "token_types": 2,
            "embedding_norm": True,
            "output_transform": True,
            "output_bias": True,
        },
        rules=BERT.memory,
        layers=BERT.layers,
    ),
    "gemma2": Family(
        theirs="Gemma2",
        config={
            "intermediate_size": DENSE_DIM,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
        },
        ours={
            "activation": "geglu",
            "norm": "rms_plus_one",
            "norm_place": "both",
            "embed_scale": 0.0,
            "attention_scale": 1 / math.sqrt(20),
            "attention_cap": 5.0,
            "logit_cap": 8.0,
            "attention_windows": (WINDOW, 0),
            "tie_embeddings": True,
        },
        rules=tables.NORMS_ON_BOTH_SIDES,
    ),
    "t5": Family(
        theirs="T5",
        head="ForConditionalGeneration",
        config=THEIR_T5 | {"feed_forward_proj": "relu"},
        ours=OUR_T5 | TIED | {"activation": "relu"},
        rules=T5.memory,
        layers=T5.layers,
    ),
    "t5_1_1": Family(  # and Flan-T5
        theirs="T5",
        head="ForConditionalGeneration",
        config=THEIR_T5
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        ours=OUR_T5 | {"activation": "geglu"},
        rules=T5.memory | T5.files,
        layers=T5.layers,
    ),
    "mt5": Family(
        theirs="MT5",
        head="ForConditionalGeneration",
        config=THEIR_T5 | {"feed_forward_proj": "gated-gelu"},
        ours=OUR_T5 | {"activation": "geglu"},
        rules=MT5.memory | MT5.files,
        layers=MT5.layers,
    ),
    "switch_transformers": Family(
        theirs="SwitchTransformers",
        head="ForConditionalGeneration",
        config=THEIR_T5 | THEIR_SWITCH,
        ours=OUR_T5 | TIED | OUR_SWITCH,
        router=OUR_SLOTS | {"min_capacity": 64},
        rules=SWITCH_TRANSFORMERS.memory,
        layers=SWITCH_TRANSFORMERS.layers,
    ),
    "switch_that_drops": Family(  # an expert takes two tokens of a row
        theirs="SwitchTransformers",
        head="ForConditionalGeneration",
        config=THEIR_T5 | THEIR_SWITCH | {"expert_capacity": 2},
        ours=OUR_T5 | TIED | OUR_SWITCH,
        router=OUR_SLOTS | {"min_capacity": 2, "group_size": LENGTH},
        rules=SWITCH_TRANSFORMERS.memory,
        layers=SWITCH_TRANSFORMERS.layers,
    ),
}
DEEPSEEK_V3 = FAMILIES["deepseek_v3"]
FAMILIES["kimi_k2"] = dataclasses.replace(
    DEEPSEEK_V3,
    config={
        **DEEPSEEK_V3.config,
        "n_group": 1,
        "topk_group": 1,
        "rope": {**DEEPSEEK_V3.config["rope"], "beta_fast": 1.0},
    },
    # As many as ROPE_SLOW_TURNS.
    ours={**DEEPSEEK_V3.ours, "rope_fast_turns": 1.0},
    router={**SIGMOID, "gate_scale": 2.5},
)
