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
    ModelSettings,
    NormSettings,
    PositionSettings,
    RouterSettings,
    SparseSettings,
)

EPSILONS = {"rms": 1e-6, "layer": 1e-5}


def has_experts(model: ModelSettings) -> bool:
    """Whether any layer is sparse."""
    return model.moe_every > 0


def has_dense(model: ModelSettings) -> bool:
    """Whether any layer is dense."""
    return model.moe_every != 1 or model.first_dense_layers > 0


def experts_of(model: ModelSettings) -> dict[int, int]:
    """Returns the number of experts of each sparse layer, by the layer's number."""
    sparse = [n for n in range(model.num_layers) if _is_sparse(model, n)]
    each = model.experts_per_layer or (model.num_experts,) * len(sparse)
    return dict(zip(sparse, each, strict=False))


def told(model: ModelSettings, num_experts: int) -> str:
    """Says where a layer's number of experts was set."""
    if model.experts_per_layer:
        return f"{num_experts} of EXPERTS_PER_LAYER = {model.experts_per_layer}"
    return f"NUM_EXPERTS = {num_experts}"


def problems(model: ModelSettings) -> list[str]:
    """Lists what is wrong with the number of layers, and with which are sparse."""
    each, period = model.experts_per_layer, model.moe_every
    if period < 0:
        return [f"MOE_EVERY = {period}: 0 means dense"]
    if not period:
        unused = (
            f"EXPERTS_PER_LAYER = {each} means nothing to MOE_EVERY = 0: set it to ()"
        )
        return [unused] if each else []
    first, rest = model.first_dense_layers, model.num_layers - model.first_dense_layers
    if first < 0:
        return [f"FIRST_DENSE_LAYERS = {first}: cannot be negative"]
    if first and rest < period:
        return [
            f"FIRST_DENSE_LAYERS = {first} leaves {rest} of NUM_LAYERS = "
            f"{model.num_layers} for a period of MOE_EVERY = {period}"
        ]
    if rest % period:
        less = f" less FIRST_DENSE_LAYERS = {first}" if first else ""
        return [
            f"NUM_LAYERS = {model.num_layers}{less} is not a multiple of MOE_EVERY = "
            f"{period}: layers repeat in periods of MOE_EVERY"
        ]
    if each and (len(each) != rest // period or min(each) < 1):
        return [
            f"EXPERTS_PER_LAYER = {each}: must have a number of at least 1 for each of "
            f"the {rest // period} sparse layers, or be () for NUM_EXPERTS in all"
        ]
    if each and max(each) != model.num_experts:
        return [
            f"NUM_EXPERTS = {model.num_experts} must be the largest of "
            f"EXPERTS_PER_LAYER = {each}: set it to {max(each)}"
        ]
    return []


def shortened(model: ModelSettings) -> ModelSettings:
    """Returns the same pattern in few layers: two at the bottom, two short periods."""
    windows = tuple(dict.fromkeys(model.attention_windows))
    if not model.moe_every:
        return dataclasses.replace(
            model, num_layers=min(model.num_layers, 2), attention_windows=windows
        )
    first = min(model.first_dense_layers, 2)
    every = min(model.moe_every, 3)  # longer periods repeat dense layers
    periods = (model.num_layers - model.first_dense_layers) // model.moe_every
    periods = max(min(periods, 2), 1)
    return dataclasses.replace(
        model,
        first_dense_layers=first,
        moe_every=every,
        num_layers=first + periods * every,
        experts_per_layer=_extremes(model.experts_per_layer, periods),
        attention_windows=windows,
    )


def _extremes(each: tuple[int, ...], number: int) -> tuple[int, ...]:
    """The least and the most in their order, or of one the most."""
    if not each or number == 1:
        return (max(each),) if each else ()
    return tuple(sorted((min(each), max(each)), key=each.index))


@functools.lru_cache(maxsize=256)
def describe(model: ModelSettings, router: RouterSettings) -> Layers:
    """Makes layers of flat words that break no rule.

    Args:
        model: flat words.
        router: how tokens choose, in every sparse layer.
    """
    norm = NormSettings(model.norm, EPSILONS[model.norm])
    shared = model.positions == "relative"
    return Layers(
        EmbeddingSettings(
            vocab_size=model.vocab_size,
            width=model.model_dim,
            max_positions=model.max_positions if model.positions == "learned" else 0,
            tied=model.tie_embeddings,
            init_scale=model.init_scale,
        ),
        Stack(
            _segments(model, router, norm),
            width=model.model_dim,
            norm=norm,
            shared_positions=_positions(model) if shared else None,
            dropout=model.dropout,
        ),
    )


def _segments(
    model: ModelSettings, router: RouterSettings, norm: NormSettings
) -> tuple[Segment, ...]:
    """Dense layers at the bottom, then sparse layers once a period."""
    first = model.first_dense_layers if model.moe_every else 0
    blocks = [_block(model, router, norm, n) for n in range(model.num_layers)]
    below = _repeating(blocks[:first], 1, 0)
    return below + _repeating(blocks[first:], max(model.moe_every, 1), first)


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
    model: ModelSettings, router: RouterSettings, norm: NormSettings, layer: int
) -> Block:
    """Attention, then experts or a dense feed-forward."""
    attention = Sublayer("attention", "heads", _heads(model, layer), norm)
    if _is_sparse(model, layer):
        sparse = _sparse(model, router, experts_of(model)[layer])
        return attention, Sublayer("sparse", "sparse", sparse, norm)
    dense = DenseSettings(
        model.mlp_dim, model.activation, model.mlp_biases, model.init_scale
    )
    return attention, Sublayer("dense", "dense", dense, norm)


def _is_sparse(model: ModelSettings, layer: int) -> bool:
    above = layer - model.first_dense_layers
    if not model.moe_every or above < 0:
        return False
    place = 0 if model.moe_position == "first" else model.moe_every - 1
    return above % model.moe_every == place


def _heads(model: ModelSettings, layer: int) -> HeadsSettings:
    windows = model.attention_windows or (0,)
    return HeadsSettings(
        num_heads=model.num_heads,
        kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.head_dim,
        biases=model.attention_biases,
        positions=_positions(model),
        window=windows[layer % len(windows)],
        shares_bias=model.positions == "relative",
        init_scale=model.init_scale,
    )


def _positions(model: ModelSettings) -> PositionSettings:
    if model.positions == "rotary":
        return PositionSettings("rotary", rotary_base=model.rope_base)
    if model.positions in ("relative", "relative_per_layer"):
        return PositionSettings(
            "distance",
            buckets=model.relative_buckets,
            max_distance=model.relative_max_distance,
        )
    return PositionSettings("none")


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
        dropout=model.expert_dropout,
        vocab_size=model.vocab_size if router.family == "hashed" else 0,
    )
