"""By which rules the arrays of public models become ours; `rules.py` explains them.

Names are those of a model in memory, where the experts of a layer are one array. In the
files that are published each expert has its own; `EXPERTS` are those.
"""

from launch.exchange.rules import Rules


def gated(ours: str, theirs: str) -> Rules:
    """Returns the rules of a feed-forward whose gate is a matrix of its own."""
    return {
        f"{ours}/up": (
            f"{theirs}.gate_proj.weight + {theirs}.up_proj.weight",
            "c,F,M -> M,c,F",
        ),
        f"{ours}/down": (f"{theirs}.down_proj.weight", "M,F -> F,M"),
    }


def norms(**names: str) -> Rules:
    """Returns the rules of norms, such as attention_norm="input_layernorm".

    A feed-forward's norm is that of the dense sublayers and of the sparse ones.
    """
    rules: Rules = {}
    for ours, theirs in names.items():
        sublayer, _, norm = ours.partition("_")
        for each in ("dense", "sparse") if sublayer == "mlp" else (sublayer,):
            rules[f"{each}/{norm}/scale"] = (f"{theirs}.weight", "M")
    return rules


def layer_norm(ours: str, theirs: str) -> Rules:
    """Returns the rules of a norm that has a bias."""
    return {
        f"{ours}/scale": (f"{theirs}.weight", "M"),
        f"{ours}/bias": (f"{theirs}.bias", "M"),
    }


# Most families name and shape these so. A rule of what a model lacks is not used.
RULES: Rules = {
    "embedding": ("model.embed_tokens.weight", "V,M"),
    "head": ("lm_head.weight", "V,M -> M,V"),
    "decoder/norm/scale": ("model.norm.weight", "M"),
    # Of a layer, in which their names begin with model.layers.NUMBER.
    **norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    "attention/query": ("self_attn.q_proj.weight", "ND,M -> M,N,D"),
    "attention/key": ("self_attn.k_proj.weight", "UD,M -> M,U,D"),
    "attention/value": ("self_attn.v_proj.weight", "UD,M -> M,U,D"),
    "attention/output": ("self_attn.o_proj.weight", "M,ND -> N,D,M"),
    "attention/query_bias": ("self_attn.q_proj.bias", "ND -> N,D"),
    "attention/key_bias": ("self_attn.k_proj.bias", "UD -> U,D"),
    "attention/value_bias": ("self_attn.v_proj.bias", "UD -> U,D"),
    "attention/output_bias": ("self_attn.o_proj.bias", "M"),
    "attention/query_norm/scale": ("self_attn.q_norm.weight", "D"),
    "attention/key_norm/scale": ("self_attn.k_norm.weight", "D"),
    "attention/sink": ("self_attn.sinks", "N"),
    **gated("dense", "mlp"),
    "sparse/router": ("mlp.gate.weight", "E,M -> M,E"),
    "sparse/selection_bias": ("mlp.gate.e_score_correction_bias", "E"),
    "sparse/experts/up": ("mlp.experts.gate_up_proj", "E,cF,M -> E,M,c,F"),
    "sparse/experts/down": ("mlp.experts.down_proj", "E,M,F -> E,F,M"),
    **gated("sparse/shared", "mlp.shared_experts"),
}

# What other families do otherwise.
NORMS_OF_WHOLE_WIDTH: Rules = {
    "attention/query_norm/scale": ("self_attn.q_norm.weight", "ND -> N,D"),
    "attention/key_norm/scale": ("self_attn.k_norm.weight", "UD -> U,D"),
}
NORMS_OF_OUTPUT = norms(
    attention_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
NORMS_ON_BOTH_SIDES = NORMS_OF_OUTPUT | norms(
    attention_norm="input_layernorm", mlp_norm="pre_feedforward_layernorm"
)
LATENTS: Rules = {
    "attention/query_down": ("self_attn.q_a_proj.weight", "R,M -> M,R"),
    "attention/query_norm/scale": ("self_attn.q_a_layernorm.weight", "R"),
    "attention/query_up": ("self_attn.q_b_proj.weight", "ND,R -> R,N,D"),
    "attention/kv_down": ("self_attn.kv_a_proj_with_mqa.weight", "[R|P],M -> M,R"),
    "attention/rope_key": ("self_attn.kv_a_proj_with_mqa.weight", "[R|P],M -> M,P"),
    "attention/kv_norm/scale": ("self_attn.kv_a_layernorm.weight", "R"),
    "attention/key_up": ("self_attn.kv_b_proj.weight", "N[D|W],R -> R,N,D"),
    "attention/value_up": ("self_attn.kv_b_proj.weight", "N[D|W],R -> R,N,W"),
    "attention/output": ("self_attn.o_proj.weight", "M,NW -> N,W,M"),
}
ONE_SHARED_EXPERT: Rules = {
    **gated("sparse/shared", "mlp.shared_expert"),
    "sparse/shared_gate": ("mlp.shared_expert_gate.weight", "o,M -> M,o"),
}
GATE_BESIDE_QUERIES: Rules = {
    "attention/query": ("self_attn.q_proj.weight", "N[D|W],M -> M,N,D"),
    "attention/gate": ("self_attn.q_proj.weight", "N[D|W],M -> M,N,W"),
}
BIAS_BESIDE_THE_GATE: Rules = {
    "sparse/selection_bias": ("mlp.e_score_correction_bias", "E"),
}
GPT_OSS: Rules = {
    "sparse/router": ("mlp.router.weight", "E,M -> M,E"),
    "sparse/router_bias": ("mlp.router.bias", "E"),
    # Gate and up alternate, and experts are kept as they multiply from the right.
    "sparse/experts/up": ("mlp.experts.gate_up_proj", "E,M,Fc -> E,M,c,F"),
    "sparse/experts/up_bias": ("mlp.experts.gate_up_proj_bias", "E,Fc -> E,c,F"),
    "sparse/experts/down": ("mlp.experts.down_proj", "E,F,M"),
    "sparse/experts/down_bias": ("mlp.experts.down_proj_bias", "E,M"),
}
LLAMA_4: Rules = {
    **gated("dense", "feed_forward"),
    "sparse/router": ("feed_forward.router.weight", "E,M -> M,E"),
    "sparse/experts/up": ("feed_forward.experts.gate_up_proj", "E,M,cF -> E,M,c,F"),
    "sparse/experts/down": ("feed_forward.experts.down_proj", "E,F,M"),
    **gated("sparse/shared", "feed_forward.shared_expert"),
}
GRANITE: Rules = {
    "sparse/router": ("block_sparse_moe.router.weight", "E,M -> M,E"),
    "sparse/experts/up": ("block_sparse_moe.experts.gate_up_proj", "E,cF,M -> E,M,c,F"),
    "sparse/experts/down": ("block_sparse_moe.experts.down_proj", "E,M,F -> E,F,M"),
}

# As they are in files, where an expert's arrays have its number.
EXPERTS: Rules = {
    "sparse/experts/up": (
        "mlp.experts.{E}.gate_proj.weight + mlp.experts.{E}.up_proj.weight",
        "E,c,F,M -> E,M,c,F",
    ),
    "sparse/experts/down": ("mlp.experts.{E}.down_proj.weight", "E,M,F -> E,F,M"),
}
EXPERTS_OF_MIXTRAL: Rules = {
    "sparse/router": ("block_sparse_moe.gate.weight", "E,M -> M,E"),
    "sparse/experts/up": (
        "block_sparse_moe.experts.{E}.w1.weight + "
        "block_sparse_moe.experts.{E}.w3.weight",
        "E,c,F,M -> E,M,c,F",
    ),
    "sparse/experts/down": (
        "block_sparse_moe.experts.{E}.w2.weight",
        "E,M,F -> E,F,M",
    ),
}
BIAS_OF_MIXTRAL: Rules = {
    "sparse/selection_bias": ("block_sparse_moe.e_score_correction_bias", "E"),
}
GRANITE_IN_FILES: Rules = {
    "sparse/router": ("block_sparse_moe.router.layer.weight", "E,M -> M,E"),
    "sparse/experts/up": (
        "block_sparse_moe.input_linear.weight",
        "E,cF,M -> E,M,c,F",
    ),
    "sparse/experts/down": (
        "block_sparse_moe.output_linear.weight",
        "E,M,F -> E,F,M",
    ),
}
BIAS_OF_ERNIE: Rules = {
    "sparse/selection_bias": (
        "mlp.gate.moe_statics.e_score_correction_bias",
        "[1/1],E -> E",
    ),
}
BIAS_OF_ERNIE_IN_FILES: Rules = {
    "sparse/selection_bias": (
        "mlp.moe_statics.e_score_correction_bias",
        "[1/1],E -> E",
    ),
}
