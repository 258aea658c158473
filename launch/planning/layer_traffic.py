"""What the layers of a chip send: activations, keys and values, rows of experts."""

from launch.planning.flow import (
    EXCHANGE,
    Flow,
    cuts_sequence,
    flow_of,
    forward_passes,
    joins,
    repeats,
    times,
)
from launch.planning.local import FLOAT32, Local
from moe.dispatch import choice
from moe.settings import capacity


def _cut_layers(
    sizes: Local, purpose: str, layers: int, *, sparse: bool, last: bool
) -> Flow:
    """Activations that enter and leave products cut over `model`.

    With sequences cut, a gather and a scatter forward, their transposes backward, and
    under remat the gather again, and the scatter if what follows it is computed again.
    Without, a sum forward and one backward, and again in the same case.
    """
    stream = sizes.tokens * sizes.settings.model.model_dim * sizes.dtype_bytes
    again = layers * repeats(sizes, sparse=sparse, kept_by=("none",))
    both = layers * (forward_passes(sizes) + sizes.settings.train.microbatches)
    leaving = (both + (0 if last else again)) * joins(sizes)
    entering = both + again if cuts_sequence(sizes) else 0
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
    model, dense = sizes.settings.model, sizes.num_dense_layers
    kept = sizes.rows * sizes.settings.data.length * sizes.cut_heads(model.kv_heads)
    partition, microbatches = (
        sizes.settings.partition,
        sizes.settings.train.microbatches,
    )
    ring = partition.context_attention == "ring"
    # The steps of a ring are made again on the way back, whatever the layer keeps.
    round_again = microbatches if ring else 0
    found = []
    for sparse, layers in ((False, dense), (True, model.num_sparse_layers)):
        kind = "sparse" if sparse else "dense"
        purpose = f"attention of {kind} layers"
        found.append(_cut_layers(sizes, purpose, layers, sparse=sparse, last=False))
        found.append(
            flow_of(
                sizes,
                f"keys and values of {kind} layers",
                ("context",),
                2 * kept * model.head_dim * sizes.dtype_bytes,
                times(sizes, layers, sparse=sparse) + layers * round_again,
                f"2 × b × L × u × D × d, {layers} layers: gathered, or passed round, "
                "forward and backward",
            )
        )
        found.append(
            flow_of(
                sizes,
                f"whose the keys of {kind} layers are",
                ("context",),
                sizes.rows * sizes.settings.data.length * 4,
                times(sizes, layers, sparse=sparse) if ring else 0,
                f"int32 of b × L, {layers} layers: passed round with the keys",
            )
        )
    return found


def feed_forwards(sizes: Local) -> list[Flow]:
    """Over `model` the activations of dense layers, shared experts and whole pieces."""
    model, sparse = sizes.settings.model, sizes.settings.model.num_sparse_layers
    dense = _cut_layers(
        sizes,
        "feed-forward of dense layers",
        sizes.num_dense_layers,
        sparse=False,
        last=True,
    )
    found = [dense]
    stream = sizes.tokens * model.model_dim * sizes.dtype_bytes
    if model.shared_expert_mlp_dim:
        again = sparse * repeats(sizes, sparse=True, kept_by=("none",))
        both = sparse * (forward_passes(sizes) + sizes.settings.train.microbatches)
        found.append(
            flow_of(
                sizes,
                "shared experts",
                ("model",),
                stream,
                2 * both + again,
                f"tokens × M × d, {sparse} layers: gathered and scattered",
            )
        )
    if not cuts_sequence(sizes):  # each chip of `model` routed a piece of what all have
        found.append(
            flow_of(
                sizes,
                "pieces of sparse layers joined",
                ("model",),
                stream,
                times(sizes, sparse, sparse=True, kept_by=("none", "minimal", "full")),
                f"tokens × M × d, {sparse} layers, forward and backward",
            )
        )
    return found


# --------------------------------------------------------------------------- experts


def experts(sizes: Local) -> list[Flow]:
    """Rows to their experts and back, forward and backward.

    Two collectives forward and two backward per sparse layer and microbatch; two more
    where remat is "full", and two more where microbatches are computed forward twice.
    A ring's sums over devices come after all that a gradient needs: "full" repeats its
    gather alone.
    """
    model, d = sizes.settings.model, sizes.dtype_bytes
    layers, M = model.num_sparse_layers, sizes.settings.model.model_dim
    if not layers:
        return []
    saving = ("none", "minimal")
    number = 2 * times(sizes, layers, sparse=True, kept_by=saving)
    told = f"{layers} layers, there and back, forward and backward"
    if sizes.transport == "ring":
        whole = sizes.settings.mesh.expert * sizes.piece_tokens * M * d
        fewer = number - layers * repeats(sizes, sparse=True, kept_by=saving)
        rows = flow_of(
            sizes, "tokens gathered", ("expert",), whole, fewer, f"all tokens; {told}"
        )
    else:
        kind = "slots" if sizes.transport in choice.PADDED else "choices"
        rows = flow_of(
            sizes,
            "rows exchanged",
            ("expert",),
            sizes.sent_rows * M * d,
            number,
            f"{sizes.sent_rows:,} {kind} × M × d; {told}",
            EXCHANGE,
        )
    found = [rows, *_maps(sizes, layers)]
    if sizes.expert_model_cut > 1:
        whole = sizes.expert_model_cut * sizes.expert_rows * M * d
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


def _maps(sizes: Local, layers: int) -> list[Flow]:
    """Who sits where: gates and slots of all tokens (ring), or sizes alone (ragged)."""
    if sizes.transport not in ("ring", "ragged"):
        return []
    router, E = sizes.settings.router, sizes.settings.model.num_experts
    axis_size = sizes.settings.mesh.expert
    again = repeats(sizes, sparse=True, kept_by=("none", "minimal"))
    number = layers * (forward_passes(sizes) + again)
    if sizes.transport == "ragged":
        whole, told = axis_size * E * 4, f"int32 rows per expert, {layers} layers"
        return [flow_of(sizes, "sizes gathered", ("expert",), whole, number, told)]
    choices = sizes.piece_tokens * router.num_choices(E)
    whole = axis_size * choices * (FLOAT32 + 4)
    told = f"float32 gate and int32 slot of all choices, {layers} layers"
    gates = flow_of(sizes, "maps gathered", ("expert",), whole, number, told)
    slots = capacity(router, E, train=True)
    whole = -(-sizes.piece_tokens // router.group_size) * E * slots * 4
    told = f"int32 choice of every slot, {layers} layers"
    return [
        gates,
        flow_of(sizes, "maps exchanged", ("expert",), whole, number, told, EXCHANGE),
    ]
