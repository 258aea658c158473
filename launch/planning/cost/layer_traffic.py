"""What the layers of a chip send: activations, keys and values, rows of experts."""

from launch.planning.cost.flow import (
    EXCHANGE,
    Flow,
    cuts_sequence,
    flow_of,
    forward_passes,
    joins,
    repeats,
    times,
)
from launch.planning.cost.local import FLOAT32, Local
from moe.layers import Block, of_kind
from moe.routing.capacity import capacity
from moe.settings import LatentSettings, SparseSettings


def _cut_layers(
    sizes: Local,
    purpose: str,
    block: Block,
    layers: int,
    *,
    last: bool,
    enters: bool = True,
) -> Flow:
    """Activations that enter and leave products cut over `model`.

    With sequences cut, a gather and a scatter forward, their transposes backward, and
    under remat the gather again, and the scatter if what follows it is computed again.
    Without, a sum forward and one backward, and again in the same case.
    """
    stream = sizes.tokens * sizes.stack.width * sizes.dtype_bytes
    again = layers * repeats(sizes, block, kept_by=("none",))
    both = layers * (forward_passes(sizes) + sizes.settings.train.microbatches)
    leaving = (both + (0 if last else again)) * joins(sizes)
    entering = both + again if cuts_sequence(sizes) and enters else 0
    return flow_of(
        sizes,
        purpose,
        ("model",),
        stream,
        entering + leaving,
        f"tokens × M × d, {layers} layers: gathered and scattered forward and backward"
        if cuts_sequence(sizes)
        else f"tokens × M × d, {layers} layers: summed forward and backward",
    )


def attention(sizes: Local) -> list[Flow]:
    """Over `model` activations, over `context` keys and values."""
    ring = sizes.settings.partition.context_attention == "ring"
    # The steps of a ring are made again on the way back, whatever the layer keeps.
    round_again = sizes.settings.train.microbatches if ring else 0
    found = []
    for block, layers in sizes.stack.kinds_of_layers.items():
        kind = "sparse" if of_kind(block, "sparse") else "dense"
        for a in sizes.attentions(block):
            purpose = f"attention of {kind} layers"
            s, rows = a.settings, sizes.rows * a.keys
            latent = isinstance(s, LatentSettings)
            found.append(
                _cut_layers(
                    sizes, purpose, block, layers, last=False, enters=not latent
                )
            )
            if isinstance(s, LatentSettings):
                found.append(_latents(sizes, kind, block, layers, s))
            kept = sizes.kv_heads(s) * (s.key_width + s.value_width)
            formula = "2 × b × L × u × D × d"
            if isinstance(s, LatentSettings) and not ring:
                kept, formula = s.kv_latent + s.rope_dim, "b × L × (C + R) × d"
            found.append(
                flow_of(
                    sizes,
                    f"keys and values of {kind} layers",
                    ("context",),
                    rows * kept * sizes.dtype_bytes,
                    times(sizes, block, layers) + layers * round_again,
                    f"{formula}, {layers} layers: gathered, or passed round, forward "
                    "and backward",
                )
            )
            found.append(
                flow_of(
                    sizes,
                    f"whose the keys of {kind} layers are",
                    ("context",),
                    rows * 4,
                    times(sizes, block, layers) if ring else 0,
                    f"int32 of b × L, {layers} layers: passed round with the keys",
                )
            )
            measures = ring and sizes.settings.optimizer.qk_clip > 0
            found.append(
                flow_of(
                    sizes,
                    f"keys whose logits are measured, of {kind} layers",
                    ("context",),
                    rows * (sizes.kv_heads(s) * s.key_width * sizes.dtype_bytes + 4),
                    layers * forward_passes(sizes) if measures else 0,
                    f"b × L × u × D × d, {layers} layers: passed round forward",
                )
            )
    return found


def _latents(
    sizes: Local, kind: str, block: Block, layers: int, s: LatentSettings
) -> Flow:
    """What enters latent attention where sequences are cut, instead of the stream."""
    width = s.query_latent + s.kv_latent + s.rope_dim
    if s.gated or not s.query_latent:
        width += sizes.stack.width
    return flow_of(
        sizes,
        f"latents of {kind} layers",
        ("model",),
        sizes.tokens * width * sizes.dtype_bytes,
        times(sizes, block, layers) if cuts_sequence(sizes) else 0,
        f"tokens × (C' + C + R) × d, {layers} layers: gathered forward, scattered "
        "backward",
    )


def feed_forwards(sizes: Local) -> list[Flow]:
    """Over `model` the activations of dense layers, shared experts and whole pieces."""
    stream = sizes.tokens * sizes.stack.width * sizes.dtype_bytes
    found = []
    for block, layers in sizes.stack.kinds_of_layers.items():
        for _ in of_kind(block, "dense"):
            purpose = "feed-forward of dense layers"
            found.append(_cut_layers(sizes, purpose, block, layers, last=True))
        for s in of_kind(block, "sparse"):
            if s.shared is not None:
                again = layers * repeats(sizes, block, kept_by=("none",))
                both = forward_passes(sizes) + sizes.settings.train.microbatches
                found.append(
                    flow_of(
                        sizes,
                        "shared experts",
                        ("model",),
                        stream,
                        2 * layers * both + again,
                        f"tokens × M × d, {layers} layers: gathered and scattered",
                    )
                )
            if not cuts_sequence(sizes):  # each chip of `model` routed a piece
                kept_by = ("none", "minimal", "full")
                found.append(
                    flow_of(
                        sizes,
                        "pieces of sparse layers joined",
                        ("model",),
                        stream,
                        times(sizes, block, layers, kept_by=kept_by),
                        f"tokens × M × d, {layers} layers, forward and backward",
                    )
                )
    return found


# --------------------------------------------------------------------------- experts


def experts(sizes: Local) -> list[Flow]:
    """Rows to their experts and back, forward and backward, of all sparse layers."""
    return [
        flow
        for block, layers in sizes.stack.kinds_of_layers.items()
        for s in of_kind(block, "sparse")
        for flow in _experts(sizes, block, layers, s)
    ]


def _experts(sizes: Local, block: Block, layers: int, s: SparseSettings) -> list[Flow]:
    """Rows of layers that are alike.

    Two collectives forward and two backward per sparse layer and microbatch; two more
    where remat is "full", and two more where microbatches are computed forward twice.
    A ring's sums over devices come after all that a gradient needs: "full" repeats its
    gather alone.
    """
    M, d = sizes.stack.width, sizes.dtype_bytes
    saving = ("none", "minimal")
    number = 2 * times(sizes, block, layers, kept_by=saving)
    told = f"{layers} layers, there and back, forward and backward"
    if sizes.transport(s)[0] == "ring":
        # What gates multiply goes out, and sums of tokens come back.
        tokens = (sizes.carried_tokens(s) + sizes.piece_tokens) // 2
        whole = sizes.settings.mesh.expert * tokens * M * d
        fewer = number - layers * repeats(sizes, block, kept_by=saving)
        rows = flow_of(
            sizes, "tokens gathered", ("expert",), whole, fewer, f"all tokens; {told}"
        )
    else:
        kind = "slots" if sizes.is_padded(s) else "choices"
        rows = flow_of(
            sizes,
            "rows exchanged",
            ("expert",),
            sizes.sent_rows(s) * M * d,
            number,
            f"{sizes.sent_rows(s):,} {kind} × M × d; {told}",
            EXCHANGE,
        )
    found = [rows, *_maps(sizes, block, layers, s)]
    if sizes.expert_model_cut > 1:
        whole = sizes.expert_model_cut * sizes.expert_rows(s) * M * d
        found.append(
            flow_of(
                sizes,
                "rows of experts cut over model",
                ("model",),
                whole,
                number,
                f"rows of all of model × M × d; gathered and scattered, {told}",
            )
        )
    return found


def _maps(sizes: Local, block: Block, layers: int, s: SparseSettings) -> list[Flow]:
    """Who sits where: gates and slots of all tokens (ring), or sizes alone (ragged)."""
    transport, _ = sizes.transport(s)
    if transport not in ("ring", "ragged"):
        return []
    E, axis_size = s.num_experts, sizes.settings.mesh.expert
    again = repeats(sizes, block, kept_by=("none", "minimal"))
    number = layers * (forward_passes(sizes) + again)
    if transport == "ragged":
        whole, told = axis_size * E * 4, f"int32 rows per expert, {layers} layers"
        return [flow_of(sizes, "sizes gathered", ("expert",), whole, number, told)]
    choices = sizes.piece_tokens * s.router.num_choices(E)
    whole = axis_size * choices * (FLOAT32 + 4)
    told = f"float32 gate and int32 slot of all choices, {layers} layers"
    gates = flow_of(sizes, "maps gathered", ("expert",), whole, number, told)
    slots = capacity(s.router, E, train=True)
    whole = -(-sizes.piece_tokens // s.router.group_size) * E * slots * 4
    told = f"int32 choice of every slot, {layers} layers"
    return [
        gates,
        flow_of(sizes, "maps exchanged", ("expert",), whole, number, told, EXCHANGE),
    ]
