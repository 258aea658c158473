"""Public models with random weights and odd sizes, as `transformers` saves them."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

VOCAB = 77
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 22,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DEEPSEEK = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 14,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
SENTINELS = 30  # at the end of the vocabulary of those of two stacks
_TWO_STACKS = {
    "d_model": 36,
    "d_kv": 7,
    "d_ff": 22,
    "num_layers": 4,  # no fewer than the decoder has, or their cache has no room
    "num_decoder_layers": 2,
    "num_heads": 6,
    "relative_attention_num_buckets": 6,
    "relative_attention_max_distance": 9,
    "decoder_start_token_id": 0,
}
# The class, and the fields of its configuration beside or in place of those above.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 6}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 6, "num_experts_per_tok": 3}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 14,
            "head_dim": 10,
            "norm_topk_prob": True,
        },
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {**_DEEPSEEK, "head_dim": 12, "use_qk_norm": True, "n_shared_experts": 1},
    ),
    "minimax_m2": (
        "MiniMaxM2ForCausalLM",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 12},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **_DEEPSEEK,
            "n_group": 3,
            "topk_group": 2,
            "q_lora_rank": 10,
            "kv_lora_rank": 14,
            "qk_rope_head_dim": 6,
            "qk_nope_head_dim": 7,
            "v_head_dim": 5,
            "num_key_value_heads": 6,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 10,
            "sliding_window": 5,
        },
    ),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 1.5,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_intermediate_size": 14,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
            "moe_layer_end_index": 1,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "n_embd": 35,
            "n_layer": 2,
            "n_head": 5,
            "n_inner": 22,
            "n_positions": 64,
            "tie_word_embeddings": True,
        },
    ),
    "bert": (
        "BertForMaskedLM",
        {"hidden_size": 35, "num_attention_heads": 5, "tie_word_embeddings": True},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {**_TWO_STACKS, "tie_word_embeddings": True},
    ),
    "mt5": ("MT5ForConditionalGeneration", _TWO_STACKS),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {
            **_TWO_STACKS,
            "tie_word_embeddings": True,
            "num_experts": 6,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
        },
    ),
}


def save(name: str, folder: Path) -> Any:
    """Draws a model, and saves it with a tokenizer of words; returns it."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind, fields = MODELS[name]
    kind = getattr(transformers, kind)
    wanted = _SIZES | _SPECIAL | fields
    config = kind.config_class(**wanted, attn_implementation="eager")
    config._experts_implementation = "eager"  # the fast one refuses odd widths
    model = kind(config).eval()
    if name == "mt5":  # its class ties, unless the files have another head
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for path, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in path.lower()), 0.25)
        if path.endswith("Attention.q.weight"):  # T5 does not scale scores
            parameter.data *= _TWO_STACKS["d_kv"] ** -0.5
    for path, buffer in model.named_buffers():
        if "correction_bias" in path:
            buffer.normal_(0, 0.2)
    model.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(VOCAB - 3))]
    if "d_model" in fields:
        words[-SENTINELS:] = [f"<extra_id_{n}>" for n in reversed(range(SENTINELS))]
    ids = {word: n for n, word in enumerate(words)}
    made = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(words[:3])
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return model
