"""What one chip computes in a step: operations, and the memory that they touch.

Part by part, because a chip is bound by one or the other in each: experts with few rows
by memory, attention's projections by arithmetic.
"""

import dataclasses
import functools

from launch.config.settings import Settings
from launch.planning.cost import local, muon
from launch.planning.cost.flow import forward_passes, repeats
from launch.planning.cost.local import BYTES, FLOAT32, Attention, Local
from moe.layers import Block, of_kind
from moe.routing.capacity import mean_choices
from moe.settings import DenseSettings, SparseSettings
from moe.training.trained import is_trained

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
        settings: configuration of the run.
        chip: its name, or the platform; it decides the transport.
        load: rows of the busiest chip's experts, over the mean. Slots of fixed
            capacity are computed whether they are full or not.
    """
    found: dict[str, list[Part]] = {}
    for sizes in local.sides(settings, chip):
        for name, kind in (
            ("attention projections", _projections),
            ("attention scores", _scores),
            ("feed-forward", _dense),
            ("router", _router),
            ("experts", functools.partial(_experts, load=load)),
            ("rows in and out", functools.partial(_rows, load=load)),
            ("shared experts", _shared),
        ):
            for block, layers in sizes.stack.kinds_of_layers.items():
                found.setdefault(name, []).extend(kind(sizes, block, layers))
        found.setdefault("norms and sums", []).append(_stream(sizes))
    found["logits"] = [_head(sizes)]
    if sizes.num_ahead:
        M = sizes.stack.width
        shape = sizes.residual_tokens, 2 * M, M
        found["tokens ahead"] = [_product(sizes, "", shape, number=sizes.num_ahead)]
    joined = [_joined(name, parts) for name, parts in found.items() if parts]
    return (*joined, _optimizer(settings))


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
        sizes: dimensions on one chip, of one microbatch and one stack.
        name: label of the part.
        shape: t, k and n, of one microbatch.
        number: count of such products in a forward pass, over all layers.
        again: forward passes of it that remat adds in a step.
        stacked: matrices of the shape [k, n] that the t rows meet, each some.
        model_tokens: t without padding, if that is less.
        cost: number of operations in `dtype` that take as long as one.
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


def _projections(sizes: Local, block: Block, layers: int) -> list[Part]:
    """[T, M] × [M, (n + 2u)·D] and back, or down to latents and up from them."""
    M, found = sizes.stack.width, []
    again = repeats(sizes, block, kept_by=("none", "minimal"))
    latent = repeats(sizes, block, kept_by=("none",))
    for a in sizes.attentions(block):
        mixed = sizes.cut_heads(a.settings.num_heads) * a.settings.value_width
        for t, k, n, of_latent in sizes.projections(a):
            more = latent if of_latent else again
            found.append(_product(sizes, "", (t, k, n), number=layers, again=more))
        out = sizes.tokens, mixed, M
        found.append(_product(sizes, "", out, number=layers, again=again))
    return found


def _scores(sizes: Local, block: Block, layers: int) -> list[Part]:
    """4·T·L·n·D per layer, of blocks that are not skipped; 2·(K + X) is 4·D.

    With `context`, of the chip that has the ends of sequences, which sees most. Remat
    makes them again, and blocks once more. Kernels touch no memory for scores.
    """
    microbatches = sizes.settings.train.microbatches
    found = []
    for a in sizes.attentions(block):
        s, kernel = a.settings, sizes.attention_kernel(a)
        kept = ("none",) if kernel is None else ("none", "minimal")
        runs = forward_passes(sizes) + 2 * microbatches
        runs += microbatches if sizes.attention_block(a) else 0
        runs += repeats(sizes, block, kept_by=kept)
        pairs = layers * sizes.tokens * sizes.cut_heads(s.num_heads)
        seen, width = pairs * _keys_seen(sizes, a), s.key_width + s.value_width
        # QK_CLIP forms products of queries and keys once more, and keeps nothing.
        measured = forward_passes(sizes) if sizes.settings.optimizer.qk_clip else 0
        found.append(
            Part(
                "",
                model_flops=2 * pairs * s.reach(a.keys) * width * microbatches,
                flops=2 * seen * (width * runs + s.key_width * measured),
                touched_bytes=0 if kernel else seen * BYTES_PER_SCORE * runs,
            )
        )
    return found


def _keys_seen(sizes: Local, a: Attention) -> float:
    """Keys that a query is compared with: all, or those of blocks not skipped."""
    s, L, size = a.settings, a.keys, sizes.attention_block(a)
    if not size or sizes.settings.data.prefix_attention == "bidirectional":
        return L
    if not s.causal:
        blocks = -(-L // size)
        back = -(-(s.window - 1) // size) if s.window else blocks
        blocks_seen = min(2 * back + 1, blocks, -(-(s.chunk or L) // size))
        return L * blocks_seen / blocks
    keys, queries = -(-L // size), -(-sizes.length // size)
    back = -(-(s.reach(L) - 1) // size)  # blocks before the query's own
    piece = -(-(s.chunk or L) // size)
    seen = [min(block % piece, back) + 1 for block in range(keys - queries, keys)]
    return L * sum(seen) / (queries * keys)


def _dense(sizes: Local, block: Block, layers: int) -> list[Part]:
    """The feed-forwards of dense layers."""
    return [
        part
        for s in of_kind(block, "dense")
        for part in _feed_forward(sizes, block, layers, s)
    ]


def _shared(sizes: Local, block: Block, layers: int) -> list[Part]:
    """The experts that every token visits, and [p·T, M] × [M, 1] of their gates."""
    again = repeats(sizes, block, kept_by=("none", "minimal"))
    gate = (sizes.piece_tokens, sizes.stack.width, 1)
    found = []
    for s in of_kind(block, "sparse"):
        if s.shared is not None:
            found += _feed_forward(sizes, block, layers, s.shared)
            number = layers if s.shared_gate else 0
            found.append(_product(sizes, "", gate, number=number, again=again))
    return found


def _feed_forward(
    sizes: Local, block: Block, layers: int, s: DenseSettings
) -> list[Part]:
    """[T, M] × [M, pair·f], [T, f] × [f, M]; remat repeats the first alone."""
    M, width = sizes.stack.width, sizes.cut_width(s)
    again = repeats(sizes, block, kept_by=("none", "minimal"))
    up = (sizes.tokens, M, local.pair(s) * width)
    down = (sizes.tokens, width, M)
    return [
        _product(sizes, "", up, number=layers, again=again),
        _product(sizes, "", down, number=layers),
    ]


def _router(sizes: Local, block: Block, layers: int) -> list[Part]:
    """[p·T, M] × [M, E] in float32."""
    again = repeats(sizes, block, kept_by=("none", "minimal"))
    found = []
    for s in of_kind(block, "sparse"):
        cost = HIGHEST_PRECISION if s.router.logit_dtype == "float32" else 1
        shape = (sizes.piece_tokens, sizes.stack.width, s.num_experts)
        number = layers if s.router.reads_logits else 0
        found.append(_product(sizes, "", shape, number=number, again=again, cost=cost))
    return found


def computed_rows(sizes: Local, s: SparseSettings, load: float) -> float:
    """Rows that the experts of the busiest chip compute, before any gather."""
    if sizes.is_padded(s):
        return sizes.expert_rows(s)
    choices = mean_choices(s.router, s.num_experts)
    return min(sizes.piece_tokens * float(choices) * load, sizes.most_rows(s))


def _experts(sizes: Local, block: Block, layers: int, load: float) -> list[Part]:
    """[R, M] × [M, pair·f] and back, over the matrices of this chip's experts."""
    M, cut = sizes.stack.width, sizes.expert_model_cut
    again = repeats(sizes, block, kept_by=("none", "minimal"))
    found = []
    for s in of_kind(block, "sparse"):
        E, width = s.num_experts, sizes.cut_expert(s)
        rows = cut * computed_rows(sizes, s, load)
        real = cut * sizes.piece_tokens * float(mean_choices(s.router, E))
        found += [
            _product(
                sizes,
                "",
                (rows, k, n),
                number=layers,
                again=again,
                stacked=-(-E // sizes.settings.mesh.expert),
                model_tokens=real,
            )
            for k, n in ((M, local.pair(s.experts) * width), (width, M))
        ]
    return found


def _rows(sizes: Local, block: Block, layers: int, load: float) -> list[Part]:
    """Moving rows in and out of their places: memory alone."""
    runs = forward_passes(sizes) + sizes.settings.train.microbatches
    runs += repeats(sizes, block, kept_by=("none", "minimal"))
    found = []
    for s in of_kind(block, "sparse"):
        computed = sizes.expert_model_cut * computed_rows(sizes, s, load)
        rows = sizes.sent_rows(s) + computed
        touched = ROW_TOUCHES / 2 * rows * sizes.stack.width * sizes.dtype_bytes
        found.append(Part("", 0, 0, touched * runs * layers))
    return found


def _head(sizes: Local) -> Part:
    """[T, M] × [M, V / model]; in pieces of the vocabulary once more, for memory."""
    embedding, settings = sizes.settings.layers.embedding, sizes.settings
    in_pieces = settings.execution.vocab_chunks > 1
    again = settings.train.microbatches if in_pieces else 0
    width = -(-embedding.vocab_size // settings.mesh.model)
    shape, heads = (sizes.tokens, embedding.width, width), 1 + sizes.num_ahead
    product = _product(sizes, "logits", shape, number=heads, again=again)
    runs = forward_passes(sizes) + settings.train.microbatches + again
    scores = 2 * FLOAT32 * heads * sizes.tokens * width * runs  # written, and read
    return dataclasses.replace(product, touched_bytes=product.touched_bytes + scores)


def _stream(sizes: Local) -> Part:
    """Norms and sums of the residual stream: memory alone."""
    width = sizes.stack.width
    once = sizes.residual_tokens * width * sizes.dtype_bytes * STREAM_TOUCHES
    runs = sum(
        layers
        * (
            forward_passes(sizes)
            + 2 * sizes.settings.train.microbatches
            + repeats(sizes, block, kept_by=("none",))
        )
        for block, layers in sizes.stack.kinds_of_layers.items()
    )
    return Part("norms and sums", 0, 0, once * runs)


def _optimizer(settings: Settings) -> Part:
    """Parameters and state read and written, gradients written and read twice.

    Gathered weights are written once for each use, and read by the products above.
    Muon's products are none of the model's.
    """
    parameters, others = local.weights(settings)
    kept = sum(w.local_size * w.itemsize for w in (*parameters, *others))
    gradient = BYTES[settings.execution.param_dtype]
    optimizer = settings.optimizer
    trained = sum(w.local_size for w in parameters if is_trained(w.path, optimizer))
    gradients = trained * gradient
    products = sum(
        s.flops(settings.optimizer.muon_steps) for s in muon.shares(settings)
    )
    return Part("optimizer", 0, products, 2 * kept + 3 * gradients)
