"""What one chip computes in a step: operations, and the memory that they touch.

Part by part, because a chip is bound by one or the other in each: experts with few rows
by memory, attention's projections by arithmetic.
"""

import dataclasses

from launch.planning import local
from launch.planning.flow import forward_passes, repeats
from launch.planning.local import BYTES, FLOAT32, Local
from launch.settings import Settings
from moe.dispatch import choice

# A float32 product of highest precision is so many of bfloat16 on a TPU.
HIGHEST_PRECISION = 6
# Bytes written and read per score of attention where no kernel fuses them: float32
# scores written and read, their softmax written and read in 2 bytes.
BYTES_PER_SCORE = 12
# Times that norms, sums and activations of one layer read or write the residual stream,
# forward; backward as many again, twice. A rough count of what XLA leaves unfused.
STREAM_TOUCHES = 8
# The same of rows: seated, sent, received, returned, weighed.
ROW_TOUCHES = 8


@dataclasses.dataclass(frozen=True)
class Part:
    """One kind of work in a step of one chip.

    Attributes:
        name: what it is.
        model_flops: forward, of the model alone: no padding, nothing twice.
        flops: executed, forward and backward.
        touched_bytes: read from or written to the chip's memory.
    """

    name: str
    model_flops: float
    flops: float
    touched_bytes: float


def parts(settings: Settings, chip: str, load: float = 1.0) -> tuple[Part, ...]:
    """Lists the work of a step of the busiest chip.

    Args:
        settings: of the run.
        chip: its name, or the platform; it decides the transport.
        load: rows of the busiest chip's experts, over the mean. Slots of fixed
            capacity are computed whether they are full or not.
    """
    sizes = local.local(settings, chip)
    model = settings.model
    found = [_projections(sizes), _scores(sizes)]
    if sizes.num_dense_layers:
        found.append(_dense(sizes, "feed-forward", model.mlp_dim, sparse=False))
    if model.num_sparse_layers:
        found += [_router(sizes), _experts(sizes, load), _rows(sizes, load)]
        if model.shared_expert_mlp_dim:
            width = model.shared_expert_mlp_dim
            found.append(_dense(sizes, "shared experts", width, sparse=True))
    return (*found, _head(sizes), _stream(sizes), _optimizer(settings))


def _product(
    sizes: Local,
    name: str,
    shape: tuple[float, int, int],
    *,
    number: float = 1,
    again: float = 0,
    stacked: int = 1,
    model_tokens: float | None = None,
    cost: float = 1,
) -> Part:
    """Work of products [t, k] × [k, n], forward, twice that backward, and repeated.

    Args:
        sizes: of the chip.
        name: of the part.
        shape: t, k and n, of one microbatch.
        number: of such products in a forward pass, over all layers.
        again: forward passes of it that remat adds in a step.
        stacked: matrices of the shape [k, n] that the t rows meet, each some.
        model_tokens: t without padding, if that is less.
        cost: of one operation, in those of `dtype`.
    """
    t, k, n = shape
    microbatches = sizes.settings.train.microbatches
    runs = forward_passes(sizes) + 2 * microbatches + again
    useful = t if model_tokens is None else model_tokens
    touched = (t * k + stacked * k * n + t * n) * sizes.dtype_bytes
    return Part(
        name,
        model_flops=2 * useful * k * n * number * microbatches,
        flops=2 * t * k * n * number * runs * cost,
        touched_bytes=touched * number * runs,
    )


def _joined(name: str, found: list[Part]) -> Part:
    return Part(
        name,
        model_flops=sum(part.model_flops for part in found),
        flops=sum(part.flops for part in found),
        touched_bytes=sum(part.touched_bytes for part in found),
    )


def _per_kind(sizes: Local, kept_by: tuple[str, ...]) -> list[tuple[int, int]]:
    """Per kind of layer how many there are, and their repeated forward passes."""
    dense, sparse = sizes.num_dense_layers, sizes.settings.model.num_sparse_layers
    return [
        (dense, repeats(sizes, sparse=False, kept_by=kept_by)),
        (sparse, repeats(sizes, sparse=True, kept_by=kept_by)),
    ]


def _projections(sizes: Local) -> Part:
    """[T, M] × [M, (n + 2u)·D] and back."""
    model = sizes.settings.model
    heads, kv_heads = sizes.cut_heads(model.num_heads), sizes.cut_heads(model.kv_heads)
    inward, outward = (heads + 2 * kv_heads) * model.head_dim, heads * model.head_dim
    found = []
    for layers, again in _per_kind(sizes, ("none", "minimal")):
        for k, n in ((model.model_dim, inward), (outward, model.model_dim)):
            shape = (sizes.tokens, k, n)
            found.append(_product(sizes, "", shape, number=layers, again=again))
    return _joined("attention projections", found)


def _scores(sizes: Local) -> Part:
    """4·T·L·n·D per layer, of blocks that are not skipped.

    With `context`, of the chip that has the ends of sequences, which sees most. Remat
    makes them again, and blocks once more.
    """
    model, settings = sizes.settings.model, sizes.settings
    L, heads = settings.data.length, sizes.cut_heads(model.num_heads)
    scores = sizes.tokens * L * heads
    seen, blocked = 1.0, sizes.is_blocked
    if blocked and settings.data.prefix_attention != "bidirectional":
        block = model.attention_block or sizes.length
        keys, queries = -(-L // block), -(-sizes.length // block)
        seen = (keys - (queries - 1) / 2) / keys
    microbatches = settings.train.microbatches
    runs = model.num_layers * (forward_passes(sizes) + 2 * microbatches)
    runs += model.num_layers * microbatches * blocked
    for layers, again in _per_kind(sizes, ("none",)):
        runs += layers * again
    flops = 4 * scores * model.head_dim
    return Part(
        "attention scores",
        model_flops=flops * model.num_layers * microbatches,
        flops=flops * seen * runs,
        touched_bytes=scores * seen * BYTES_PER_SCORE * runs,
    )


def _dense(sizes: Local, name: str, mlp_dim: int, *, sparse: bool) -> Part:
    """[T, M] × [M, pair·f], [T, f] × [f, M]; remat repeats the first alone."""
    model = sizes.settings.model
    layers = model.num_sparse_layers if sparse else sizes.num_dense_layers
    width = -(-mlp_dim // sizes.settings.mesh.model)
    again = repeats(sizes, sparse=sparse, kept_by=("none", "minimal"))
    up = (sizes.tokens, model.model_dim, sizes.dense_pair * width)
    down = (sizes.tokens, width, model.model_dim)
    return _joined(
        name,
        [
            _product(sizes, "", up, number=layers, again=layers and again),
            _product(sizes, "", down, number=layers),
        ],
    )


def _router(sizes: Local) -> Part:
    """[p·T, M] × [M, E] in float32."""
    model, router = sizes.settings.model, sizes.settings.router
    if router.family == "hashed":
        return Part("router", 0, 0, 0)
    cost = HIGHEST_PRECISION if router.logit_dtype == "float32" else 1
    again = repeats(sizes, sparse=True, kept_by=("none", "minimal"))
    shape = (sizes.piece_tokens, model.model_dim, model.num_experts)
    return _product(
        sizes, "router", shape, number=model.num_sparse_layers, again=again, cost=cost
    )


def computed_rows(sizes: Local, load: float) -> float:
    """Rows that the experts of the busiest chip compute, before any gather."""
    if sizes.transport in choice.PADDED:
        return sizes.expert_rows
    choices = sizes.settings.router.mean_choices(sizes.settings.model.num_experts)
    return min(sizes.piece_tokens * float(choices) * load, sizes.most_rows)


def _experts(sizes: Local, load: float) -> Part:
    """[R, M] × [M, pair·f] and back, over the matrices of this chip's experts."""
    model, router = sizes.settings.model, sizes.settings.router
    E, M, cut = model.num_experts, model.model_dim, sizes.expert_model_cut
    width = -(-model.expert_mlp_dim // cut)
    rows = cut * computed_rows(sizes, load)
    real = cut * sizes.piece_tokens * float(router.mean_choices(E))
    again = repeats(sizes, sparse=True, kept_by=("none", "minimal"))
    found = [
        _product(
            sizes,
            "",
            (rows, k, n),
            number=model.num_sparse_layers,
            again=again,
            stacked=-(-E // sizes.settings.mesh.expert),
            model_tokens=real,
        )
        for k, n in ((M, sizes.expert_pair * width), (width, M))
    ]
    return _joined("experts", found)


def _rows(sizes: Local, load: float) -> Part:
    """Moving rows in and out of their places: memory alone."""
    model = sizes.settings.model
    rows = sizes.sent_rows + sizes.expert_model_cut * computed_rows(sizes, load)
    runs = forward_passes(sizes) + sizes.settings.train.microbatches
    runs += repeats(sizes, sparse=True, kept_by=("none", "minimal"))
    touched = ROW_TOUCHES / 2 * rows * model.model_dim * sizes.dtype_bytes
    return Part("rows in and out", 0, 0, touched * runs * model.num_sparse_layers)


def _head(sizes: Local) -> Part:
    """[T, M] × [M, V / model]; in pieces of the vocabulary once more, for memory."""
    model = sizes.settings.model
    again = sizes.settings.train.microbatches if model.vocab_chunks > 1 else 0
    width = -(-model.vocab_size // sizes.settings.mesh.model)
    shape = (sizes.tokens, model.model_dim, width)
    product = _product(sizes, "logits", shape, again=again)
    runs = forward_passes(sizes) + sizes.settings.train.microbatches + again
    scores = 2 * FLOAT32 * sizes.tokens * width * runs  # written, and read
    return dataclasses.replace(product, touched_bytes=product.touched_bytes + scores)


def _stream(sizes: Local) -> Part:
    """Norms and sums of the residual stream: memory alone."""
    model = sizes.settings.model
    once = sizes.residual_tokens * model.model_dim * sizes.dtype_bytes * STREAM_TOUCHES
    runs = model.num_layers * (
        forward_passes(sizes) + 2 * sizes.settings.train.microbatches
    )
    for layers, again in _per_kind(sizes, ("none",)):
        runs += layers * again
    return Part("norms and sums", 0, 0, once * runs)


def _optimizer(settings: Settings) -> Part:
    """Parameters and state read and written, gradients written and read twice.

    Gathered weights are written once for each use, and read by the products above.
    """
    parameters, others = local.weights(settings)
    kept = sum(w.local_size * w.itemsize for w in (*parameters, *others))
    gradient = BYTES[settings.model.param_dtype]
    gradients = sum(w.local_size for w in parameters) * gradient
    return Part("optimizer", 0, 0, 2 * kept + 3 * gradients)
