"""Which layers a model has: the one reader of MOE_EVERY and its kin.

Flat words become the records of `moe/layers.py`. Standard library only.
"""

import dataclasses
import functools
import itertools

from moe.layers import Block, Layers, Segment, Stack, Sublayer
from moe.settings import (
    DenseSettings,
    EmbeddingSettings,
    HeadsSettings,
    LatentSettings,
    ModelSettings,
    NormSettings,
    PositionSettings,
    RouterSettings,
    SparseSettings,
)

EPSILONS = {"rms": 1e-6, "rms_plus_one": 1e-6, "layer": 1e-5}


def sides(model: ModelSettings) -> dict[str, ModelSettings]:
    """Returns the words of each stack as if it were alone, by its name."""
    if model.shape != "encoder_decoder":
        return {model.shape: model}
    period = model.encoder_moe_every
    encoder = dataclasses.replace(
        model,
        shape="encoder",
        num_layers=model.num_encoder_layers or model.num_layers,
        moe_every=model.moe_every if period < 0 else period,
    )
    decoder = dataclasses.replace(model, shape="decoder")
    each, number = model.experts_per_layer, len(sparse_layers(encoder))
    return {
        "encoder": dataclasses.replace(encoder, experts_per_layer=each[:number]),
        "decoder": dataclasses.replace(decoder, experts_per_layer=each[number:]),
    }


def has_experts(model: ModelSettings) -> bool:
    """Whether any layer is sparse."""
    return any(side.moe_every > 0 for side in sides(model).values())


def has_dense(model: ModelSettings) -> bool:
    """Whether any layer has a dense feed-forward."""
    return model.extra_mlp != "none" or any(
        side.moe_every != 1 or side.first_dense_layers > 0
        for side in sides(model).values()
    )


def experts_of(model: ModelSettings) -> tuple[int, ...]:
    """Returns the number of experts of each sparse layer, the encoder's first."""
    return tuple(
        number for side in sides(model).values() for number in _experts(side).values()
    )


def told(model: ModelSettings, num_experts: int) -> str:
    """Says where a layer's number of experts was set."""
    if model.experts_per_layer:
        return f"{num_experts} of EXPERTS_PER_LAYER = {model.experts_per_layer}"
    return f"NUM_EXPERTS = {num_experts}"


@functools.lru_cache(maxsize=256)
def describe(
    model: ModelSettings,
    router: RouterSettings,
    encoder_router: RouterSettings | None = None,
) -> Layers:
    """Makes layers of flat words that break no rule.

    Args:
        model: flat words.
        router: how tokens choose, in every sparse layer.
        encoder_router: the same in the encoder beside a decoder; None: as there.
    """
    two = model.shape == "encoder_decoder"
    routers = {"encoder": router, "decoder": router}
    if two and encoder_router is not None:
        routers["encoder"] = encoder_router
    found = {
        name: stack_of(side, routers[name], crosses=two and name == "decoder")
        for name, side in sides(model).items()
    }
    ahead = _ahead(found["decoder"], model) if model.predict_ahead else None
    return Layers(_embedding(model), found.get("encoder"), found.get("decoder"), ahead)


def _ahead(stack: Stack, model: ModelSettings) -> Stack:
    """As many layers like the last as tokens are predicted after the next."""
    *_, last = stack.layers
    first = model.num_layers
    segments = (Segment((last,), 1, first + n) for n in range(model.predict_ahead))
    return stack._replace(segments=tuple(segments))


def _embedding(model: ModelSettings) -> EmbeddingSettings:
    return EmbeddingSettings(
        vocab_size=model.vocab_size,
        width=model.model_dim,
        max_positions=model.max_positions if model.positions == "learned" else 0,
        tied=model.tie_embeddings,
        init_scale=model.init_scale,
        scale=model.embed_scale or model.model_dim**0.5,
        logit_scale=model.logit_scale,
        token_types=model.token_types,
        norm=_norm(model) if model.embedding_norm else None,
        transform=model.activation if model.output_transform else "",
        output_norm=_norm(model),
        output_bias=model.output_bias,
        logit_cap=model.logit_cap,
        image_size=model.image_size,
        patch_size=model.patch_size,
        image_channels=model.image_channels,
    )


def stack_of(side: ModelSettings, router: RouterSettings, *, crosses: bool) -> Stack:
    """Dense layers at the bottom, then sparse layers once a period."""
    first = side.first_dense_layers if side.moe_every else 0
    blocks = [_block(side, router, n, crosses=crosses) for n in range(side.num_layers)]
    below = _repeating(blocks[:first], 1, 0)
    segments = below + _repeating(blocks[first:], max(side.moe_every, 1), first)
    shared = side.layer_sharing == "all"
    return Stack(
        tuple(s._replace(shared=shared and s.repeats > 1) for s in segments),
        width=side.model_dim,
        norm=_norm(side) if side.norm_place != "after" else None,
        shared_positions=_positions(side) if side.positions == "relative" else None,
        dropout=side.dropout,
        residual_scale=side.residual_scale,
    )


def _norm(model: ModelSettings) -> NormSettings:
    epsilon = model.norm_epsilon or EPSILONS[model.norm]
    return NormSettings(model.norm, epsilon, model.norm_place)


def _repeating(blocks: list[Block], step: int, first: int) -> tuple[Segment, ...]:
    """Cuts layers into segments that repeat, so that the fewest are compiled.

    Args:
        blocks: layers, one after the other.
        step: number whose multiples a period may have.
        first: number of the first of them.
    """

    def cut(period: int) -> list[Segment]:
        starts = range(0, len(blocks), period)
        parts = [tuple(blocks[start : start + period]) for start in starts]
        segments, layer = [], first
        for part, run in itertools.groupby(parts):
            segments.append(Segment(part, len(list(run)), layer))
            layer += len(part) * segments[-1].repeats
        return segments

    def compiled(period: int) -> int:
        return sum(len(segment.blocks) for segment in cut(period))

    if not blocks:
        return ()
    return tuple(cut(min(range(step, len(blocks) + 1, step), key=compiled)))


def _block(
    side: ModelSettings, router: RouterSettings, layer: int, *, crosses: bool
) -> Block:
    """Attention, maybe to the other stack too, then experts or dense, or both."""
    norm = _norm(side)
    own = _latent(side, layer) if side.attention == "latent" else _heads(side, layer)
    block = [Sublayer("attention", side.attention, own, norm)]
    if crosses:
        cross = dataclasses.replace(
            _heads(side, layer),
            positions=PositionSettings(),
            window=0,
            chunk=0,
            growth=0.0,
            causal=False,
            shares_bias=False,
        )
        block.append(Sublayer("cross", "cross", cross, norm))
    mlp = DenseSettings(side.mlp_dim, side.activation, side.mlp_biases, side.init_scale)
    dense = Sublayer("dense", "dense", mlp, norm)
    experts = _experts(side)
    if layer not in experts:
        return *block, dense
    if layer in sparse_layers(side)[: side.first_hash_layers]:
        router = by_table(router)
    of_experts = _sparse(side, router, experts[layer])
    sparse = Sublayer("sparse", "sparse", of_experts, norm)
    also = {"before": (dense, sparse), "after": (sparse, dense)}
    return *block, *also.get(side.extra_mlp, (sparse,))


def by_table(router: RouterSettings) -> RouterSettings:
    """Returns the hash router of as many choices, groups and slots as another."""
    of_choosing = {
        name: getattr(RouterSettings(), name)
        for name in (
            *("options", "own", "num_prototypes", "num_expert_groups"),
            *("num_selected_groups", "group_score", "max_experts_per_token"),
            *("sinkhorn_iterations", "second_policy", "overflow", "logit_noise"),
            *("selection_bias", "bias_update", "bias_update_rate"),
        )
    }
    hashed = dataclasses.replace(
        router,
        family="hashed",
        num_selected=router.num_selected * router.num_prototypes,
        **of_choosing,
    )
    if hashed.reads_logits:
        return hashed
    return dataclasses.replace(
        hashed, scores="softmax", renormalize="no", logit_bias=False, jitter=0.0
    )


def _experts(side: ModelSettings) -> dict[int, int]:
    """The number of experts of each sparse layer of a stack, by the layer's number."""
    layers = sparse_layers(side)
    each = side.experts_per_layer or (side.num_experts,) * len(layers)
    return dict(zip(layers, each, strict=False))


def sparse_layers(side: ModelSettings) -> range:
    """Numbers of the sparse layers of a stack."""
    if side.moe_every <= 0:
        return range(0)
    place = 0 if side.moe_position == "first" else side.moe_every - 1
    return range(side.first_dense_layers + place, side.num_layers, side.moe_every)


def _latent(side: ModelSettings, layer: int) -> LatentSettings:
    window = _of_layer(side.attention_windows, layer)
    sees = _of_layer(side.position_layers, layer, 1) > 0
    return LatentSettings(
        num_heads=side.num_heads,
        head_dim=side.head_dim,
        rope_dim=side.rope_head_dim,
        value_dim=side.value_head_dim or side.head_dim,
        kv_latent=side.kv_latent_dim,
        query_latent=side.query_latent_dim,
        positions=_positions(side, window) if sees else PositionSettings(),
        norm=NormSettings("rms", side.latent_norm_epsilon),
        window=window,
        causal=side.shape != "encoder",
        init_scale=side.init_scale,
        sinks=side.attention_sinks,
        cap=side.attention_cap,
        score_scale=side.attention_scale,
        gated=side.attention_output_gate,
        chunk=_of_layer(side.attention_chunks, layer),
    )


def _of_layer(cycle: tuple[int, ...], layer: int, otherwise: int = 0) -> int:
    """What a pattern says of a layer; it begins again after its last."""
    return cycle[layer % len(cycle)] if cycle else otherwise


def _heads(side: ModelSettings, layer: int) -> HeadsSettings:
    window = _of_layer(side.attention_windows, layer)
    sees = _of_layer(side.position_layers, layer, 1) > 0
    unplaced = not sees or side.positions == "none"
    return HeadsSettings(
        num_heads=side.num_heads,
        kv_heads=side.num_kv_heads or side.num_heads,
        head_dim=side.head_dim,
        biases=side.attention_biases,
        output_bias=side.attention_output_bias,
        positions=_positions(side, window) if sees else PositionSettings(),
        window=window,
        causal=side.shape != "encoder",
        shares_bias=side.positions == "relative" and sees,
        init_scale=side.init_scale,
        qk_norm=side.qk_norm,
        norm=_norm(side),
        sinks=side.attention_sinks,
        cap=side.attention_cap,
        score_scale=side.attention_scale,
        gated=side.attention_output_gate,
        chunk=_of_layer(side.attention_chunks, layer),
        growth=side.attention_growth if unplaced else 0.0,
        growth_length=side.attention_growth_length if unplaced else 0,
    )


def _positions(side: ModelSettings, window: int = 0) -> PositionSettings:
    if side.positions == "rotary":
        own_base = window > 0 and side.rope_base_windowed > 0
        return PositionSettings(
            "rotary",
            rotary_base=side.rope_base_windowed if own_base else side.rope_base,
            fraction=side.rope_fraction,
            pairs=side.rope_pairs,
            scaling="none" if own_base else side.rope_scaling,
            factor=side.rope_factor,
            original_length=side.rope_original_length,
            fast_turns=side.rope_fast_turns,
            slow_turns=side.rope_slow_turns,
            attention_factor=side.rope_attention_factor,
            truncate=side.rope_truncate,
        )
    if side.positions in ("relative", "relative_per_layer"):
        return PositionSettings(
            "distance",
            buckets=side.relative_buckets,
            max_distance=side.relative_max_distance,
            two_sided=side.shape == "encoder",
        )
    return PositionSettings("alibi" if side.positions == "alibi" else "none")


def _sparse(
    model: ModelSettings, router: RouterSettings, num_experts: int
) -> SparseSettings:
    same = model.expert_activation == "same"
    shared = DenseSettings(
        model.shared_expert_mlp_dim,
        model.activation,
        model.mlp_biases,
        model.init_scale,
    )
    return SparseSettings(
        num_experts=num_experts,
        experts=DenseSettings(
            model.expert_mlp_dim,
            model.activation if same else model.expert_activation,
            model.expert_biases,
            model.init_scale,
        ),
        router=router,
        shared=shared if model.shared_expert_mlp_dim else None,
        shared_gate=model.shared_expert_gate,
        dropout=model.expert_dropout,
        vocab_size=model.vocab_size if router.family == "hashed" else 0,
    )
