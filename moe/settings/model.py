"""The model in flat words, as a user writes it.

Read before jax is imported: standard library only. `configs/base.gin` fills the record;
nothing else does. What it means for each layer, `moe/architecture.py` says.
"""

import dataclasses
from typing import Literal

Activation = Literal[
    "relu",
    "relu_squared",
    "gelu",
    "gelu_exact",
    "geglu",
    "geglu_exact",
    "swiglu",
    "swiglu_clamped",
]


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """A transformer of one stack of layers or two, every `moe_every`-th layer sparse.

    Attributes:
        shape: "decoder", in which tokens see those before them; "encoder", in which
            they see all; or both, "encoder_decoder", whose decoder sees the encoder's
            output too (arXiv:1706.03762).
        vocab_size: V, rows of the embedding; at least the vocabulary's size.
        num_layers: layers of a stack, dense and sparse.
        num_encoder_layers: those of the encoder beside a decoder; 0: as many.
        model_dim: M.
        num_heads: N.
        head_dim: D.
        mlp_dim: F of a dense layer.
        activation: "relu", "relu_squared" (arXiv:2109.08668), "gelu" (its approximation
            by tanh) or "gelu_exact" (BERT); or gated: "geglu", "geglu_exact", "swiglu",
            "swiglu_clamped" (gpt-oss).
        mlp_biases: whether dense feed-forwards have biases.
        num_kv_heads: heads of keys and values, each shared by as many heads of queries
            (arXiv:2305.13245); 0 has one for each.
        attention: "heads" (arXiv:1706.03762), or "latent", whose keys and values are
            made of one narrow vector for each token (DeepSeek-V2, arXiv:2405.04434,
            section 2.1); `head_dim` is then the part without positions.
        query_latent_dim: width of what its queries are made of; 0 makes them of the
            input.
        kv_latent_dim: width of what its keys and values are made of.
        rope_head_dim: width of the part with positions, one key for all heads.
        value_head_dim: width of its values; 0 takes `head_dim`.
        latent_norm_epsilon: added to the mean square in the norms of both latents.
        attention_biases: whether queries, keys and values have biases.
        attention_output_bias: whether what is made of the mixed values has one.
        qk_norm: what of queries and of keys is normalised together, as `norm` says,
            before they are turned: each "head" (Qwen3), all heads, the "width" (OLMoE);
            "unit" divides each head of turned ones by its root mean square, without
            weights (Llama 4); "none".
        attention_sinks: whether every softmax has a learned score that no key has
            (arXiv:2309.17453, section 3.3).
        attention_cap: bound of the scores, which come as cap·tanh(score / cap) (Gemma
            2, arXiv:2408.00118, section 2); 0 sets none.
        attention_scale: factor of the products of queries and keys; 0 takes D^-0.5, of
            latent attention (D + R)^-0.5.
        attention_output_gate: whether mixed values are multiplied by a sigmoid of the
            same input (arXiv:2505.06708).
        attention_windows: places that tokens see back, of the layers from the bottom
            up, and again from the first; 0 sees all; () has no window in any layer.
        attention_chunks: positions of the pieces that a document falls into, none of
            which sees another, of the layers like `attention_windows` (Llama 4).
        attention_growth: g, and
        attention_growth_length: s, by which queries of position p are multiplied in
            layers that know no positions: 1 + g·ln(1 + ⌊(p + 1) / s⌋)
            (arXiv:2501.19399); 0 leaves them alone.
        positions: "rotary" (arXiv:2104.09864); "relative", T5's bias by bucket of
            distance (arXiv:1910.10683), one table for all layers; "relative_per_layer",
            one for each; "alibi", a slope of each head times the distance
            (arXiv:2108.12409); "learned", a vector per position, added to the embedding
            (GPT-3); "none".
        position_layers: whether attention knows positions, 1 or 0, of the layers from
            the bottom up, and again from the first; () in all (arXiv:2501.18795).
        relative_buckets: buckets of distance; a decoder has all of them for the past,
            an encoder half for each side.
        relative_max_distance: distance from which on all share the last bucket.
        max_positions: rows of the learned table; at least L.
        norm: "rms" (arXiv:1910.07467); "rms_plus_one", whose scales are one more than
            their weights (Gemma); or "layer" (arXiv:1607.06450), which has a bias.
        norm_place: "before" a sublayer (T5, GPT-2), on its "output", before that is
            added (OLMo 2), or "both" (Gemma 2), with one more norm on top; or "after"
            it and what it was added to (arXiv:1706.03762; BERT).
        norm_epsilon: added to the mean square; 0 takes 1e-5 of "layer", else 1e-6.
        expert_activation: activation of the experts; "same" takes `activation`.
        expert_biases: whether experts have biases.
        first_dense_layers: layers at the bottom that are dense (DeepSeek-V3: 3).
        first_hash_layers: sparse layers at the bottom of a stack that choose by a table
            from token to expert (DeepSeek-V4: 3).
        moe_every: above the first dense layers, every n-th layer is sparse; 0 makes
            every layer dense.
        encoder_moe_every: the same of the encoder beside a decoder; -1: as there.
        moe_position: which layer of such a period: its "last", or its "first".
        num_experts: E.
        experts_per_layer: E of each sparse layer from the bottom up, the encoder's
            first, as in PR-MoE's pyramid (arXiv:2201.05596, section 4.1); () has
            `num_experts` in all.
        expert_mlp_dim: F of one expert.
        extra_mlp: whether a sparse layer has a dense feed-forward too, a sublayer of
            its own "before" or "after" the experts (ST-MoE, arXiv:2202.08906); "none".
        shared_expert_mlp_dim: F of the experts that every token visits, side by side
            as one (DeepSeekMoE, arXiv:2401.06066, section 3.2); 0 has none.
        shared_expert_gate: whether what they make of a token is multiplied by
            sigmoid(x·w) (Qwen2-MoE).
        dropout: probability of zeroing an activation on the residual path.
        expert_dropout: the same inside the experts, for fine-tuning (Switch, section
            2.4: 0.4).
        init_scale: variance of the initial weights, times their fan-in (Switch,
            section 2.4: 0.1). As in Flaxformer's recipe, of all products, of the bias
            by distance and of an output projection of its own, but not of embeddings,
            which start out with unit variance, nor of routers, which have 0.02².
        embed_scale: factor of embeddings; 0 takes the root of M (T5, Gemma).
        residual_scale: factor of what each sublayer adds to the stream (Granite).
        logit_scale: factor of the logits.
        layer_sharing: "none": every layer has parameters of its own; "all": layers that
            repeat have one set between them (arXiv:2110.03888, section 3.1), but for
            the biases that choose experts.
        rope_base: base of the rotary position angles (arXiv:2104.09864).
        rope_base_windowed: base in layers with a window, whose angles are not scaled
            (Gemma 3, arXiv:2503.19786, section 2.1); 0: as in the others.
        rope_fraction: share of a head's numbers that are turned, the first of them.
        rope_pairs: numbers that turn together: (d, d + D/2), "halves", or (2d, 2d + 1),
            "neighbours".
        rope_scaling: how angles reach beyond the length that was learnt: "none";
            "linear" (arXiv:2306.15595); "by_parts" and "yarn" (arXiv:2309.00071,
            sections 3.2 and 3.4).
        rope_factor: lengths to reach, over the one that was learnt.
        rope_original_length: tokens of that length.
        rope_fast_turns: turns in it from which on an angle is not scaled.
        rope_slow_turns: turns up to which it is scaled by all of the factor.
        rope_attention_factor: factor of turned queries and keys of "yarn"; 0 takes
            0.1·ln(factor) + 1.
        rope_truncate: whether "yarn" begins and ends its degrees at whole pairs.
        predict_ahead: tokens after the next that training predicts too, each by one
            more layer like the last (DeepSeek-V3, arXiv:2412.19437, section 2.2).
        tie_embeddings: whether the output projection is the embedding.
        token_types: rows of a table of token types (BERT's two sentences); 0 has none.
        embedding_norm: whether a norm follows the embedding (BERT).
        output_transform: whether a dense layer and a norm precede the output (BERT's
            masked-token head).
        output_bias: whether logits have a bias (BERT).
        logit_cap: bound of the logits, which come as cap·tanh(logit / cap); 0 sets
            none.
        image_size: height and width of the image that stands before each text, in
            pixels (M6, arXiv:2103.00823, section 3); 0 has none.
        patch_size: the same of a patch, which takes the place of a token
            (arXiv:2010.11929, section 3.1).
        image_channels: numbers of a pixel.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    shape: Literal["decoder", "encoder_decoder", "encoder"] = "decoder"
    num_encoder_layers: int = 0
    activation: Activation = "gelu"
    mlp_biases: bool = False
    num_kv_heads: int = 0
    attention: Literal["heads", "latent"] = "heads"
    query_latent_dim: int = 0
    kv_latent_dim: int = 0
    rope_head_dim: int = 0
    value_head_dim: int = 0
    latent_norm_epsilon: float = 1e-6
    attention_biases: bool = False
    attention_output_bias: bool = False
    qk_norm: Literal["none", "head", "width", "unit"] = "none"
    attention_sinks: bool = False
    attention_cap: float = 0.0
    attention_scale: float = 0.0
    attention_output_gate: bool = False
    attention_windows: tuple[int, ...] = ()
    attention_chunks: tuple[int, ...] = ()
    attention_growth: float = 0.0
    attention_growth_length: int = 0
    positions: Literal[
        "rotary", "relative", "relative_per_layer", "alibi", "learned", "none"
    ] = "rotary"
    position_layers: tuple[int, ...] = ()
    relative_buckets: int = 32
    relative_max_distance: int = 128
    max_positions: int = 0
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_place: Literal["before", "both", "output", "after"] = "before"
    norm_epsilon: float = 0.0
    expert_activation: Literal["same", Activation] = "same"
    expert_biases: bool = False
    first_dense_layers: int = 0
    first_hash_layers: int = 0
    moe_every: int = 2
    encoder_moe_every: int = -1
    moe_position: Literal["last", "first"] = "last"
    num_experts: int = 8
    experts_per_layer: tuple[int, ...] = ()
    expert_mlp_dim: int = 1024
    extra_mlp: Literal["none", "before", "after"] = "none"
    shared_expert_mlp_dim: int = 0
    shared_expert_gate: bool = False
    dropout: float = 0.0
    expert_dropout: float = 0.0
    init_scale: float = 1.0
    embed_scale: float = 0.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    layer_sharing: Literal["none", "all"] = "none"
    rope_base: float = 10_000.0
    rope_base_windowed: float = 0.0
    rope_fraction: float = 1.0
    rope_pairs: Literal["halves", "neighbours"] = "halves"
    rope_scaling: Literal["none", "linear", "by_parts", "yarn"] = "none"
    rope_factor: float = 1.0
    rope_original_length: int = 0
    rope_fast_turns: float = 32.0
    rope_slow_turns: float = 1.0
    rope_attention_factor: float = 0.0
    rope_truncate: bool = True
    predict_ahead: int = 0
    tie_embeddings: bool = False
    token_types: int = 0
    embedding_norm: bool = False
    output_transform: bool = False
    output_bias: bool = False
    logit_cap: float = 0.0
    image_size: int = 0
    patch_size: int = 16
    image_channels: int = 3
