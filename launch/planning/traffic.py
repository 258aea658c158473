"""The bytes that one chip must send in a step, by what for and over which axis.

Written from the algorithm: what each collective of the forward and the backward pass
moves, and how often. Compiled programs are compared with it in tests; what is left out
is router statistics and single numbers.

A collective over n chips sends, along a ring, (n-1)/n of what is gathered (its output),
scattered (its input) or exchanged, and a sum of all twice that. Over several axes it
goes along one after the other, so that of a sum over slices only the part that one
chip is left with crosses the slow network.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from launch.planning import local
from launch.planning.local import BYTES, FLOAT32, Local, Weight
from launch.settings import Settings
from moe.dispatch import choice
from moe.settings import capacity

EXCHANGE = "all_to_all"
RING = "ring"


@dataclasses.dataclass(frozen=True)
class Flow:
    """One purpose of sending.

    Attributes:
        purpose: what for.
        axes: mesh axes larger than 1 that it goes over.
        whole_bytes: of one collective, what is gathered, scattered or exchanged.
        times: collectives per step; a sum of all counts as two.
        pattern: "ring" for gathers and sums, "all_to_all".
        formula: how `whole_bytes` and `times` come about.
    """

    purpose: str
    axes: tuple[str, ...]
    whole_bytes: int
    times: int
    pattern: str
    formula: str
    sizes: dict[str, int] = dataclasses.field(repr=False)

    @property
    def by_axis(self) -> dict[str, float]:
        """Bytes that one chip sends in a step over each axis.

        The largest moves the whole, the next what is left of it when it has been cut,
        `replica` the last rest; together they send (n-1)/n of the whole.
        """
        found, rest = {}, float(self.whole_bytes)
        for axis in sorted(self.axes, key=lambda a: (a == "replica", -self.sizes[a])):
            size = self.sizes[axis]
            found[axis] = self.times * rest * (size - 1) / size
            rest /= size
        return found

    @property
    def sent_bytes(self) -> float:
        """Bytes that one chip sends in a step."""
        return sum(self.by_axis.values())


def flows(settings: Settings, platform: str = "tpu") -> tuple[Flow, ...]:
    """Lists everything that a chip sends in a step, largest first.

    Args:
        settings: of the run.
        platform: which decides the transport.
    """
    sizes = local.local(settings, platform)
    parameters, _ = local.weights(settings)
    found = [
        *_weights(sizes, parameters),
        *_gradients(sizes, parameters),
        *_tables(sizes, parameters),
        *_attention(sizes),
        *_feed_forwards(sizes),
        *_experts(sizes),
    ]
    kept = (flow for flow in found if flow.sent_bytes)
    return tuple(sorted(kept, key=lambda flow: -flow.sent_bytes))


def by_axis(found: Iterable[Flow]) -> dict[str, dict[str, float]]:
    """Adds up the bytes of flows: axis to pattern to bytes per chip and step."""
    total: dict[str, dict[str, float]] = {}
    for flow in found:
        for axis, sent in flow.by_axis.items():
            patterns = total.setdefault(axis, {})
            patterns[flow.pattern] = patterns.get(flow.pattern, 0.0) + sent
    return total


def _flow(
    sizes: Local,
    purpose: str,
    axes: Sequence[str],
    whole_bytes: int,
    times: int,
    formula: str,
    pattern: str = RING,
) -> Flow:
    large = tuple(axis for axis in axes if sizes.sizes[axis] > 1)
    return Flow(purpose, large, whole_bytes, times, pattern, formula, sizes.sizes)


# ------------------------------------------------------------------------ how often


def forward_passes(sizes: Local) -> int:
    """Forward passes per step: each microbatch, if there are several, once more."""
    microbatches = sizes.settings.train.microbatches
    return microbatches * (2 if microbatches > 1 else 1)


def repeats(sizes: Local, *, sparse: bool, kept_by: Sequence[str]) -> int:
    """Forward passes of a layer's part that its remat policy adds, per step."""
    model = sizes.settings.model
    remat = model.remat
    if sparse and model.sparse_remat != "same":
        remat = model.sparse_remat
    return 0 if remat in kept_by else sizes.settings.train.microbatches


def _times(
    sizes: Local, layers: int, *, sparse: bool, kept_by: Sequence[str] = ("none",)
) -> int:
    """Forward, backward, and forward again under the remat policies not named."""
    backward = sizes.settings.train.microbatches
    again = repeats(sizes, sparse=sparse, kept_by=kept_by)
    return layers * (forward_passes(sizes) + backward + again)


# -------------------------------------------------------------------------- weights


def _weights(sizes: Local, parameters: tuple[Weight, ...]) -> list[Flow]:
    """Fully sharded weights are gathered for use, and their gradients scattered.

    Forward and backward gather, whatever remat keeps; with several microbatches each
    of them is computed forward twice. Logits that are formed in one piece, once, end
    the forward pass and begin the backward pass: there compilers gather once for both.
    """
    model, microbatches = sizes.settings.model, sizes.settings.train.microbatches
    gathers = forward_passes(sizes) + microbatches
    at_once = model.vocab_chunks == 1 and microbatches == 1
    found = []
    for axes, weights in _by_axes(parameters, gathered=True).items():
        table = "embedding" if model.tie_embeddings else "head"
        of_logits = [w for w in weights if w.path == table]
        layers = [w for w in weights if "layers" in w.logical]
        for name, used, times in (
            ("weights", layers, gathers),
            ("output projection", of_logits, 1 if at_once else gathers),
        ):
            forward = sum(w.gathered_size * _type(w, model.dtype) for w in used)
            back = sum(w.gathered_size * _type(w, model.reduce_dtype) for w in used)
            found += [
                _flow(
                    sizes,
                    f"{name} gathered",
                    axes,
                    forward,
                    times,
                    f"elements × bytes of {model.dtype}, {times} times",
                ),
                _flow(
                    sizes,
                    f"gradients of {name} scattered",
                    axes,
                    back,
                    microbatches,
                    f"elements × bytes of {model.reduce_dtype}, × {microbatches} "
                    "microbatches",
                ),
            ]
    return found


def _type(weight: Weight, dtype: str) -> int:
    """Routers travel as they are kept."""
    return weight.itemsize if "routed" in weight.logical else BYTES[dtype]


def _gradients(sizes: Local, parameters: tuple[Weight, ...]) -> list[Flow]:
    """Once a step, gradients are summed over all chips that hold the same part.

    With `fsdp` "optimizer" the sum leaves each chip the part whose moments it has, and
    new parameters are gathered: as many bytes.
    """
    found = []
    for axes, weights in _by_axes(parameters, gathered=False).items():
        whole = sum(weight.local_size * weight.itemsize for weight in weights)
        found.append(
            _flow(
                sizes,
                "gradients of replicas" if axes == ("replica",) else "gradients summed",
                axes,
                whole,
                2,
                "elements of a chip × bytes of a parameter, scattered and gathered",
            )
        )
    return found


def _by_axes(
    parameters: tuple[Weight, ...], *, gathered: bool
) -> dict[tuple[str, ...], list[Weight]]:
    found: dict[tuple[str, ...], list[Weight]] = {}
    for weight in parameters:
        axes = weight.gathered_over if gathered else weight.whole_over
        if axes:
            found.setdefault(axes, []).append(weight)
    return found


def _tables(sizes: Local, parameters: tuple[Weight, ...]) -> list[Flow]:
    """Tokens to the columns of the embedding and back; activations to the logits."""
    model, d = sizes.settings.model, sizes.dtype_bytes
    embedding = next(w for w in parameters if w.path == "embedding")
    axes = embedding.gathered_over
    shares = math.prod(sizes.sizes[axis] for axis in axes)
    passes = forward_passes(sizes)
    both = passes + sizes.settings.train.microbatches
    stream = sizes.tokens * model.model_dim * d
    found = [
        _flow(
            sizes,
            "ids gathered",
            axes,
            shares * sizes.tokens * 4,
            passes,
            "int32 of all chips' tokens, forward",
        ),
        _flow(
            sizes,
            "embeddings exchanged",
            axes,
            sizes.residual_tokens * model.model_dim * d,
            both,
            "tokens × M × d, forward and backward",
            EXCHANGE,
        ),
        _flow(
            sizes,
            "embeddings over the vocabulary",
            ("model",),
            stream,
            both * _joins(sizes),
            "tokens × M × d, scattered forward, gathered backward",
        ),
        _flow(
            sizes,
            "activations for logits",
            ("model",),
            stream,
            both if _cuts_sequence(sizes) else 0,
            "tokens × M × d, gathered forward, scattered backward",
        ),
        _flow(
            sizes,
            "softmax over the vocabulary",
            ("model",),
            sizes.tokens * FLOAT32,
            2 * (5 * passes + 2 * sizes.settings.train.microbatches),
            "5 float32 sums or maxima per token forward, 2 backward",
        ),
    ]
    return found


# ------------------------------------------------------------------- tensor parallel


def _cuts_sequence(sizes: Local) -> bool:
    partition = sizes.settings.partition
    return partition.sequence_parallel and sizes.settings.mesh.model > 1


def _joins(sizes: Local) -> int:
    """Collectives that leave a product cut over `model`: a scatter, or a whole sum."""
    return 1 if _cuts_sequence(sizes) else 2


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
    leaving = (both + (0 if last else again)) * _joins(sizes)
    entering = both + again if _cuts_sequence(sizes) else 0
    return _flow(
        sizes,
        purpose,
        ("model",),
        stream,
        entering + leaving,
        f"tokens × M × d, {layers} layers: gathered and scattered forward and backward"
        if _cuts_sequence(sizes)
        else f"tokens × M × d, {layers} layers: summed forward and backward",
    )


def _attention(sizes: Local) -> list[Flow]:
    """Over `model` activations, over `context` keys and values."""
    model, dense = sizes.settings.model, sizes.num_dense_layers
    kept = sizes.rows * sizes.settings.data.length * sizes.cut_heads(model.kv_heads)
    partition, microbatches = (
        sizes.settings.partition,
        sizes.settings.train.microbatches,
    )
    # The steps of a ring are made again on the way back, whatever the layer keeps.
    round_again = microbatches if partition.context_attention == "ring" else 0
    found = []
    for sparse, layers in ((False, dense), (True, model.num_sparse_layers)):
        kind = "sparse" if sparse else "dense"
        purpose = f"attention of {kind} layers"
        found.append(_cut_layers(sizes, purpose, layers, sparse=sparse, last=False))
        found.append(
            _flow(
                sizes,
                f"keys and values of {kind} layers",
                ("context",),
                2 * kept * model.head_dim * sizes.dtype_bytes,
                _times(sizes, layers, sparse=sparse) + layers * round_again,
                f"2 × b × L × u × D × d, {layers} layers: gathered, or passed round, "
                "forward and backward",
            )
        )
    return found


def _feed_forwards(sizes: Local) -> list[Flow]:
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
            _flow(
                sizes,
                "shared experts",
                ("model",),
                stream,
                2 * both + again,
                f"tokens × M × d, {sparse} layers: gathered and scattered",
            )
        )
    if not _cuts_sequence(
        sizes
    ):  # each chip of `model` routed a piece of what all have
        found.append(
            _flow(
                sizes,
                "pieces of sparse layers joined",
                ("model",),
                stream,
                _times(sizes, sparse, sparse=True, kept_by=("none", "minimal", "full")),
                f"tokens × M × d, {sparse} layers, forward and backward",
            )
        )
    return found


# --------------------------------------------------------------------------- experts


def _experts(sizes: Local) -> list[Flow]:
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
    times = 2 * _times(sizes, layers, sparse=True, kept_by=saving)
    told = f"{layers} layers, there and back, forward and backward"
    if sizes.transport == "ring":
        whole = sizes.settings.mesh.expert * sizes.piece_tokens * M * d
        fewer = times - layers * repeats(sizes, sparse=True, kept_by=saving)
        rows = _flow(
            sizes, "tokens gathered", ("expert",), whole, fewer, f"all tokens; {told}"
        )
    else:
        kind = "slots" if sizes.transport in choice.PADDED else "choices"
        rows = _flow(
            sizes,
            "rows exchanged",
            ("expert",),
            sizes.sent_rows * M * d,
            times,
            f"{sizes.sent_rows:,} {kind} × M × d; {told}",
            EXCHANGE,
        )
    found = [rows, *_maps(sizes, layers)]
    if sizes.expert_model_cut > 1:
        whole = sizes.expert_model_cut * sizes.expert_rows * M * d
        found.append(
            _flow(
                sizes,
                "rows of experts cut over model",
                ("model",),
                whole,
                times,
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
    times = layers * (forward_passes(sizes) + again)
    if sizes.transport == "ragged":
        whole, told = axis_size * E * 4, f"int32 rows per expert, {layers} layers"
        return [_flow(sizes, "sizes gathered", ("expert",), whole, times, told)]
    choices = sizes.piece_tokens * router.num_choices(E)
    whole = axis_size * choices * (FLOAT32 + 4)
    told = f"float32 gate and int32 slot of all choices, {layers} layers"
    gates = _flow(sizes, "maps gathered", ("expert",), whole, times, told)
    slots = capacity(router, E, train=True)
    whole = -(-sizes.piece_tokens // router.group_size) * E * slots * 4
    told = f"int32 choice of every slot, {layers} layers"
    return [
        gates,
        _flow(sizes, "maps exchanged", ("expert",), whole, times, told, EXCHANGE),
    ]
