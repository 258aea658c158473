"""Which layers a model has: the one reader of MOE_EVERY and its kin.

Flat words become the records of `moe/layers.py`. Standard library only.
"""

import dataclasses
import functools
import itertools
import math

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
    each, number = model.experts_per_layer, len(_sparse_layers(encoder))
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


def problems(model: ModelSettings) -> list[str]:
    """Lists what is wrong with the number of layers, and with which are sparse."""
    found = []
    for name, side in sides(model).items():
        own = "ENCODER_" if name != model.shape and name == "encoder" else ""
        found += _period_problems(side, f"NUM_{own}LAYERS", f"{own}MOE_EVERY")
    if not found and model.layer_sharing == "all" and not _shares(model):
        found.append(
            "LAYER_SHARING = 'all' means nothing to layers of which none repeats: set "
            "it to 'none'"
        )
    each = model.experts_per_layer
    numbers = [len(_sparse_layers(side)) for side in sides(model).values()]
    number, fewest = sum(numbers), min(filter(None, numbers), default=0)
    if not found and fewest and not 0 <= model.first_hash_layers <= fewest:
        found.append(
            f"FIRST_HASH_LAYERS = {model.first_hash_layers}: must be between 0 and the "
            f"{fewest} sparse layers of a stack"
        )
    if found or not each:
        return found
    if not has_experts(model):
        return [
            f"EXPERTS_PER_LAYER = {each} means nothing to MOE_EVERY = 0: set it to ()"
        ]
    if len(each) != number or min(each) < 1:
        return [
            f"EXPERTS_PER_LAYER = {each}: must have a number of at least 1 for each of "
            f"the {number} sparse layers, or be () for NUM_EXPERTS in all"
        ]
    if max(each) != model.num_experts:
        return [
            f"NUM_EXPERTS = {model.num_experts} must be the largest of "
            f"EXPERTS_PER_LAYER = {each}: set it to {max(each)}"
        ]
    return []


def _shares(model: ModelSettings) -> bool:
    """Whether layers repeat, so that they can share parameters."""
    stacks = (_stack(s, RouterSettings(), crosses=False) for s in sides(model).values())
    return any(segment.shared for stack in stacks for segment in stack.segments)


def _period_problems(side: ModelSettings, number: str, every: str) -> list[str]:
    """What is wrong with one stack, in the words of two macros."""
    period, first = side.moe_every, side.first_dense_layers
    if period < 0:
        return [f"{every} = {period}: 0 means dense"]
    if not period:
        return []
    rest = side.num_layers - first
    if first < 0:
        return [f"FIRST_DENSE_LAYERS = {first}: cannot be negative"]
    if first and rest < period:
        return [
            f"FIRST_DENSE_LAYERS = {first} leaves {rest} of {number} = "
            f"{side.num_layers} for a period of {every} = {period}"
        ]
    if rest % period:
        less = f" less FIRST_DENSE_LAYERS = {first}" if first else ""
        return [
            f"{number} = {side.num_layers}{less} is not a multiple of {every} = "
            f"{period}: layers repeat in periods of {every}"
        ]
    return []


def shortened(model: ModelSettings) -> ModelSettings:
    """Returns the same pattern in few layers: two at the bottom, two short periods."""
    short = {name: _shortened(side) for name, side in sides(model).items()}
    experts = tuple(n for side in short.values() for n in side.experts_per_layer)
    *other, last = short.values()
    encoder = other[0] if other else last
    return dataclasses.replace(
        last,
        shape=model.shape,
        experts_per_layer=experts,
        num_encoder_layers=encoder.num_layers,
        encoder_moe_every=encoder.moe_every,
    )


def _shortened(side: ModelSettings) -> ModelSettings:
    cycles = _each_once(
        side.attention_windows, side.attention_chunks, side.position_layers
    )
    side = dataclasses.replace(
        side,
        attention_windows=cycles[0],
        attention_chunks=cycles[1],
        position_layers=cycles[2],
    )
    cycle, twice = max(*map(len, cycles), 1), side.layer_sharing == "all"
    kinds = max(cycle, 2)
    if twice:  # so that they still repeat
        kinds = 2 * math.lcm(cycle, min(side.moe_every, 3) or 1)
    if not side.moe_every:
        return dataclasses.replace(side, num_layers=min(side.num_layers, kinds))
    first = min(side.first_dense_layers, 2)
    every = min(side.moe_every, 3)  # longer periods repeat dense layers
    periods = (side.num_layers - side.first_dense_layers) // side.moe_every
    if side.experts_per_layer:
        kinds = 2
    below = 0 if twice else first
    periods = max(min(periods, max(-(-(kinds - below) // every), 2)), 1)
    each = _extremes(side.experts_per_layer, periods)
    if each and twice:
        each, periods = tuple(sorted(each * 2, key=each.index)), 2 * len(each)
    return dataclasses.replace(
        side,
        first_dense_layers=first,
        moe_every=every,
        num_layers=first + periods * every,
        first_hash_layers=(
            periods
            if side.first_hash_layers == len(_sparse_layers(side))
            else min(side.first_hash_layers, 1)
        ),
        experts_per_layer=each,
    )


def _each_once(*cycles: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Patterns in which what stands beside one another does so once; () stays."""
    length = math.lcm(*(len(cycle) or 1 for cycle in cycles))
    beside = (
        tuple(cycle[n % len(cycle)] if cycle else 0 for cycle in cycles)
        for n in range(length)
    )
    once = list(zip(*dict.fromkeys(beside), strict=True))
    return [found if given else () for given, found in zip(cycles, once, strict=True)]


def _extremes(each: tuple[int, ...], number: int) -> tuple[int, ...]:
    """The least and the most in their order, or of one the most."""
    if not each or number == 1:
        return (max(each),) if each else ()
    return tuple(sorted((min(each), max(each)), key=each.index))


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
        name: _stack(side, routers[name], crosses=two and name == "decoder")
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


def _stack(side: ModelSettings, router: RouterSettings, *, crosses: bool) -> Stack:
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
    if layer in _sparse_layers(side)[: side.first_hash_layers]:
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
    layers = _sparse_layers(side)
    each = side.experts_per_layer or (side.num_experts,) * len(layers)
    return dict(zip(layers, each, strict=False))


def _sparse_layers(side: ModelSettings) -> range:
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
