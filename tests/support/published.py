"""Small models of public families: config.json, and the names and shapes of files."""

from collections.abc import Callable, Mapping

VOCAB, M, N, U, D, F, E = 24, 16, 4, 2, 4, 12, 3
NUMBERS = {
    "vocab_size": VOCAB,
    "hidden_size": M,
    "num_hidden_layers": 2,
    "num_attention_heads": N,
    "num_key_value_heads": U,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "bos_token_id": 5,
    "eos_token_id": [1, 3],
}
Shapes = dict[str, tuple[int, ...]]


def attention(at: str, norms: Mapping[str, int]) -> Shapes:
    return {
        f"{at}.input_layernorm.weight": (M,),
        f"{at}.post_attention_layernorm.weight": (M,),
        f"{at}.self_attn.q_proj.weight": (N * D, M),
        f"{at}.self_attn.k_proj.weight": (U * D, M),
        f"{at}.self_attn.v_proj.weight": (U * D, M),
        f"{at}.self_attn.o_proj.weight": (M, N * D),
        **{f"{at}.self_attn.{name}.weight": (n,) for name, n in norms.items()},
    }


def experts(at: str, gate: str, up: str, down: str) -> Shapes:
    found: Shapes = {f"{at}.gate.weight": (E, M)}
    for e in range(E):
        found |= {
            f"{at}.experts.{e}.{gate}.weight": (F, M),
            f"{at}.experts.{e}.{up}.weight": (F, M),
            f"{at}.experts.{e}.{down}.weight": (M, F),
        }
    return found


def mixtral(at: str) -> Shapes:
    return attention(at, {}) | experts(f"{at}.block_sparse_moe", "w1", "w3", "w2")


def olmoe(at: str) -> Shapes:
    norms = {"q_norm": N * D, "k_norm": U * D}
    mlp = experts(f"{at}.mlp", "gate_proj", "up_proj", "down_proj")
    return attention(at, norms) | mlp


def qwen3_moe(at: str) -> Shapes:
    mlp = experts(f"{at}.mlp", "gate_proj", "up_proj", "down_proj")
    return attention(at, {"q_norm": D, "k_norm": D}) | mlp


def dense(at: str) -> Shapes:
    return {
        f"{at}.gate_proj.weight": (F, M),
        f"{at}.up_proj.weight": (F, M),
        f"{at}.down_proj.weight": (M, F),
    }


def of_deepseek(at: str, bias: str = "gate.e_score_correction_bias") -> Shapes:
    """A dense layer at the bottom, and experts above it."""
    if ".0" in at:
        return dense(f"{at}.mlp")
    mlp = experts(f"{at}.mlp", "gate_proj", "up_proj", "down_proj")
    return mlp | dense(f"{at}.mlp.shared_experts") | {f"{at}.mlp.{bias}": (E,)}


def biases(at: str, names: str) -> Shapes:
    width = {"q": N * D, "k": U * D, "v": U * D, "o": M}
    return {f"{at}.self_attn.{x}_proj.bias": (width[x],) for x in names}


def glm4_moe(at: str) -> Shapes:
    norms = attention(at, {"q_norm": D, "k_norm": D})
    return norms | biases(at, "qkv") | of_deepseek(at)


def minimax_m2(at: str) -> Shapes:
    moe = f"{at}.block_sparse_moe"
    bias: Shapes = {f"{moe}.e_score_correction_bias": (E,)}
    norms = {"q_norm": N * D, "k_norm": U * D}
    return attention(at, norms) | experts(moe, "w1", "w3", "w2") | bias


def deepseek_v3(at: str) -> Shapes:
    latents: Shapes = {
        f"{at}.input_layernorm.weight": (M,),
        f"{at}.post_attention_layernorm.weight": (M,),
        f"{at}.self_attn.q_a_proj.weight": (8, M),
        f"{at}.self_attn.q_a_layernorm.weight": (8,),
        f"{at}.self_attn.q_b_proj.weight": (N * (D + 2), 8),
        f"{at}.self_attn.kv_a_proj_with_mqa.weight": (6 + 2, M),
        f"{at}.self_attn.kv_a_layernorm.weight": (6,),
        f"{at}.self_attn.kv_b_proj.weight": (N * (D + 5), 6),
        f"{at}.self_attn.o_proj.weight": (M, N * 5),
    }
    return latents | of_deepseek(at)


def gpt_oss(at: str) -> Shapes:
    fused: Shapes = {
        f"{at}.self_attn.sinks": (N,),
        f"{at}.mlp.router.weight": (E, M),
        f"{at}.mlp.router.bias": (E,),
        f"{at}.mlp.experts.gate_up_proj": (E, M, 2 * F),
        f"{at}.mlp.experts.gate_up_proj_bias": (E, 2 * F),
        f"{at}.mlp.experts.down_proj": (E, F, M),
        f"{at}.mlp.experts.down_proj_bias": (E, M),
    }
    return attention(at, {}) | biases(at, "qkvo") | fused


def granitemoe(at: str) -> Shapes:
    moe = f"{at}.block_sparse_moe"
    return attention(at, {}) | {
        f"{moe}.router.layer.weight": (E, M),
        f"{moe}.input_linear.weight": (E, 2 * F, M),
        f"{moe}.output_linear.weight": (E, M, F),
    }


def ernie4_5_moe(at: str) -> Shapes:
    found = attention(at, {}) | of_deepseek(at)
    bias: Shapes = {f"{at}.mlp.moe_statics.e_score_correction_bias": (1, E)}
    return found if ".0" in at else without_bias(found) | bias


def without_bias(shapes: Shapes) -> Shapes:
    return {name: s for name, s in shapes.items() if "correction_bias" not in name}


OF_DEEPSEEK = {
    "intermediate_size": F,
    "moe_intermediate_size": F,
    "n_routed_experts": E,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
LAYERS: dict[str, tuple[Callable[[str], Shapes], dict[str, object]]] = {
    "mixtral": (
        mixtral,
        {"intermediate_size": F, "num_local_experts": E, "sliding_window": None},
    ),
    "olmoe": (olmoe, {"intermediate_size": F, "num_experts": E}),
    "qwen3_moe": (
        qwen3_moe,
        {"moe_intermediate_size": F, "num_experts": E, "norm_topk_prob": True},
    ),
    "glm4_moe": (
        glm4_moe,
        {**OF_DEEPSEEK, "use_qk_norm": True, "attention_bias": True},
    ),
    "minimax_m2": (
        minimax_m2,
        {"intermediate_size": F, "num_local_experts": E, "head_dim": D},
    ),
    "deepseek_v3": (
        deepseek_v3,
        {
            **OF_DEEPSEEK,
            "num_key_value_heads": N,
            "q_lora_rank": 8,
            "kv_lora_rank": 6,
            "qk_rope_head_dim": 2,
            "qk_nope_head_dim": D,
            "v_head_dim": 5,
        },
    ),
    "granitemoe": (
        granitemoe,
        {
            "intermediate_size": F,
            "num_local_experts": E,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 49.0,
        },
    ),
    "ernie4_5_moe": (
        ernie4_5_moe,
        {
            "intermediate_size": F,
            "moe_intermediate_size": F,
            "moe_num_experts": E,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "tie_word_embeddings": False,
        },
    ),
    "gpt_oss": (
        gpt_oss,
        {"intermediate_size": F, "num_local_experts": E, "head_dim": D},
    ),
}


def t5_attention(at: str) -> Shapes:
    shapes: Shapes = {f"{at}.{name}.weight": (N * D, M) for name in "qkv"}
    return shapes | {f"{at}.o.weight": (M, N * D)}


def matrices(at: str, *ups: str) -> Shapes:
    return {f"{at}.{up}.weight": (F, M) for up in ups} | {f"{at}.wo.weight": (M, F)}


def two_stacks(feed_forward: Callable[[str, int], Shapes], layers: int = 3) -> Shapes:
    """So many layers of the encoder, and 2 of the decoder."""
    shapes: Shapes = {"shared.weight": (SENTINELS + VOCAB, M)}
    for stack, number_of_layers in (("encoder", layers), ("decoder", 2)):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes |= {f"{stack}.final_layer_norm.weight": (M,), table: (8, N)}
        for number in range(number_of_layers):
            at = f"{stack}.block.{number}.layer"
            shapes |= t5_attention(f"{at}.0.SelfAttention")
            if stack == "decoder":
                shapes |= t5_attention(f"{at}.1.EncDecAttention")
            last = 1 if stack == "encoder" else 2
            norms = range(last + 1)
            shapes |= {f"{at}.{n}.layer_norm.weight": (M,) for n in norms}
            shapes |= feed_forward(f"{at}.{last}", number)
    return shapes


def relu(at: str, number: int) -> Shapes:
    return matrices(f"{at}.DenseReluDense", "wi")


def gated_gelu(at: str, number: int) -> Shapes:
    return matrices(f"{at}.DenseReluDense", "wi_0", "wi_1")


def switch(at: str, number: int) -> Shapes:
    if number % 2 == 0:
        return matrices(f"{at}.mlp", "wi")
    shapes: Shapes = {f"{at}.mlp.router.classifier.weight": (E, M)}
    for e in range(E):
        shapes |= matrices(f"{at}.mlp.experts.expert_{e}", "wi")
    return shapes


SENTINELS = 100
HEAD: Shapes = {"lm_head.weight": (SENTINELS + VOCAB, M)}
TWO_STACKS: dict[str, object] = {
    "vocab_size": SENTINELS + VOCAB,
    "d_model": M,
    "d_kv": D,
    "d_ff": F,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": N,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-5,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
UNTIED = TWO_STACKS | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def norm(name: str) -> Shapes:
    return {f"{name}.weight": (M,), f"{name}.bias": (M,)}


def gpt2() -> Shapes:
    shapes: Shapes = {
        "transformer.wte.weight": (VOCAB, M),
        "transformer.wpe.weight": (77, M),
        **norm("transformer.ln_f"),
    }
    for number in range(2):
        at = f"transformer.h.{number}"
        shapes |= norm(f"{at}.ln_1") | norm(f"{at}.ln_2")
        for name, (inputs, outputs) in {
            "attn.c_attn": (M, 3 * N * D),
            "attn.c_proj": (N * D, M),
            "mlp.c_fc": (M, F),
            "mlp.c_proj": (F, M),
        }.items():
            shapes[f"{at}.{name}.weight"] = (inputs, outputs)
            shapes[f"{at}.{name}.bias"] = (outputs,)
    return shapes


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def bert(head: bool) -> Shapes:
    at = "bert.embeddings"
    shapes: Shapes = {
        f"{at}.word_embeddings.weight": (VOCAB, M),
        f"{at}.position_embeddings.weight": (77, M),
        f"{at}.token_type_embeddings.weight": (2, M),
        **norm(f"{at}.LayerNorm"),
    }
    for number in range(2):
        at = f"bert.encoder.layer.{number}"
        for name in ("query", "key", "value"):
            shapes |= linear(f"{at}.attention.self.{name}", M, N * D)
        shapes |= linear(f"{at}.attention.output.dense", N * D, M)
        shapes |= linear(f"{at}.intermediate.dense", M, F)
        shapes |= linear(f"{at}.output.dense", F, M)
        shapes |= norm(f"{at}.attention.output.LayerNorm")
        shapes |= norm(f"{at}.output.LayerNorm")
    at = "cls.predictions"
    of_head = linear(f"{at}.transform.dense", M, M) | norm(f"{at}.transform.LayerNorm")
    return shapes | (of_head | {f"{at}.bias": (VOCAB,)} if head else {})


BERT: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": M,
    "num_hidden_layers": 2,
    "num_attention_heads": N,
    "intermediate_size": F,
    "hidden_act": "gelu",
    "max_position_embeddings": 77,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
# Those that share neither names nor words with the others: all arrays, and config.json.
OTHERS: dict[str, tuple[Shapes, dict[str, object]]] = {
    "t5": (two_stacks(relu), {**TWO_STACKS, "feed_forward_proj": "relu"}),
    "t5_1_1": (two_stacks(gated_gelu) | HEAD, {**UNTIED, "model_type": "t5"}),
    "mt5": (two_stacks(gated_gelu) | HEAD, UNTIED),
    "switch_transformers": (
        two_stacks(switch, 4),
        {
            **TWO_STACKS,
            "num_layers": 4,
            "num_experts": E,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 7,
            "dense_act_fn": "relu",
        },
    ),
    "gpt2": (
        gpt2(),
        {
            "vocab_size": VOCAB,
            "n_embd": M,
            "n_layer": 2,
            "n_head": N,
            "n_inner": F,
            "n_positions": 77,
            "n_ctx": 77,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-3,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
    "bert": (bert(True), {**BERT, "architectures": ["BertForMaskedLM"]}),
    "bert_without_a_head": (
        bert(False),
        {**BERT, "architectures": ["BertModel"], "model_type": "bert"},
    ),
}
