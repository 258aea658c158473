"""Predicts the bytes that one chip holds, by what they are for, without compiling.

Arguments of the step (state and batch) are exact. What comes and goes during the step
is arithmetic on the algorithm of `moe/model`, with the formula beside each line; what a
compiler fuses, copies or prefetches is in a few factors, named below.

Letters beside formulas, of one chip and one microbatch: b sequences; l tokens of each
in attention, T = b·l in all, p·T on this chip's piece; M width; n, u heads of queries
and of keys; D head width; f hidden width, doubled (pair) where gated; R rows of
experts; v part of the vocabulary; d bytes of an activation.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from launch.config.settings import Settings
from launch.planning.cost import local, muon
from launch.planning.cost.local import BYTES, FLOAT32, Attention, Local, Weight
from moe.layers import Block, of_kind
from moe.model.transformer import feature_axes
from moe.routing.capacity import capacity
from moe.settings import DenseSettings, HeadsSettings, SparseSettings
from moe.training.trained import is_trained
from tasks import layouts

# How often something is in memory at once, where the compiler decides. Few, so that
# they can be measured.
LOGITS_AT_ONCE = 2  # the logits and their gradient
SCORES_AT_ONCE = 2  # float32: scores and a gradient; the rest is fused
ROWS_AT_ONCE = 4  # sent, received, computed, returned; gradients take their places
EVALUATED_ROWS_AT_ONCE = 2  # of these, where no gradient needs any again
ROUTING_AT_ONCE = 4  # logits, probabilities, their gradient, places in the queues
ACTIVATIONS_AT_ONCE = 2  # a product's output and its gradient
# Of the largest gradient that is scattered: once more, in the order of its pieces.
SCATTERED_AT_ONCE = 1


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one chip.

    Attributes:
        parameters: as they are kept.
        optimizer: its state.
        counters: the rest of the state.
        batch: arrays of tokens.
        host: optimizer state that is kept in the host's memory instead.
        moments: per part of the step, what it holds beyond the arguments.
    """

    parameters: int
    optimizer: int
    counters: int
    batch: int
    host: int
    moments: Mapping[str, Mapping[str, int]]

    @property
    def arguments(self) -> int:
        """Bytes held in the whole step, and between steps too."""
        return self.parameters + self.optimizer + self.counters + self.batch

    @property
    def fullest(self) -> str:
        """The part of the step that holds most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def temporaries(self) -> int:
        """What comes and goes, at its most."""
        return sum(self.moments[self.fullest].values())

    @property
    def total(self) -> int:
        """The most that is held at once."""
        return self.arguments + self.temporaries

    @property
    def categories(self) -> dict[str, int]:
        """What the total is made of, largest first."""
        found = {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "counters": self.counters,
            "batch": self.batch,
            **self.moments[self.fullest],
        }
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def predict(settings: Settings, chip: str = "tpu") -> MemoryPlan:
    """Predicts the memory of one chip.

    Args:
        settings: configuration of the run; its mesh says how many chips there are.
        chip: its name, or the platform. TPUs pad small arrays, and transports differ.
    """
    sides = local.sides(settings, chip)
    platform = sides[-1].platform
    parameters, others = local.weights(settings)
    held = {True: 0, False: 0}
    for weight in others:
        held[weight.path.startswith("opt_state")] += _kept(weight, platform)
    away = settings.optimizer.offload
    return MemoryPlan(
        parameters=sum(_kept(weight, platform) for weight in parameters),
        optimizer=0 if away else held[True],
        counters=held[False],
        batch=_batch(settings, platform),
        host=held[True] if away else 0,
        moments=_moments(sides, parameters, others),
    )


def _kept(weight: Weight, platform: str) -> int:
    """Bytes of an array of the state."""
    if platform == "tpu":
        return local.tiled_bytes(weight.local_shape, weight.itemsize)
    return weight.local_size * weight.itemsize


def _batch(settings: Settings, platform: str) -> int:
    """Features [B / shards, L / context], and the number of the batch."""
    rows = -(-settings.train.batch_size // settings.mesh.batch_shards)
    tiled = platform == "tpu"
    found = local.tiled_bytes((), 4) if tiled else 4
    for name, length in layouts.features(settings.data).items():
        size = 1 if layouts.type_of(name) == "uint8" else 4
        cuts = settings.mesh.context if "length" in feature_axes(name) else 1
        shape = (rows, -(-length // cuts))
        found += local.tiled_bytes(shape, size) if tiled else math.prod(shape) * size
    return found


# ------------------------------------------------------------ during the step


def _moments(
    sides: list[Local], parameters: tuple[Weight, ...], others: tuple[Weight, ...]
) -> dict[str, dict[str, int]]:
    """What each part of the step holds beyond state and batch.

    Of two stacks both have kept their activations when the backward pass begins.
    """
    *_, scored = sides
    settings = scored.settings
    gradients = sum(
        _gradient(weight, settings)
        for weight in parameters
        if is_trained(weight.path, settings.optimizer)
    )
    many = settings.train.microbatches > 1
    # The scan over layers stacks its gradients before they are added to those so far.
    in_backward = gradients * (2 if many else 1)
    activations = sum(map(saved, sides))
    # The compiler brings weights to the products' type before it enters the loop.
    copies = sum(_copy(weight, settings) for weight in parameters) if many else 0
    found: dict[str, dict[str, int]] = {
        "logits": {
            "gradients": gradients if many else 0,
            "copies of weights": copies,
            "activations": activations,
            **_logits(scored, parameters),
        },
        "optimizer": {
            "gradients": gradients,
            "optimizer temporaries": _update(settings, parameters, others),
        },
    }
    common = {
        "gradients": in_backward,
        "copies of weights": copies,
        "activations": activations,
    }
    for sizes in sides:
        for name, layer in _layers(sizes, parameters):
            held = common | layer
            if sum(held.values()) > sum(found.get(name, {}).values()):
                found[name] = held
    scoring = [dataclasses.replace(sizes, train=False) for sizes in sides]
    return found | _evaluation(scoring, parameters)


def _layers(
    sizes: Local, parameters: tuple[Weight, ...]
) -> Iterator[tuple[str, dict[str, int]]]:
    """What each part of each kind of layer needs beside."""
    for block in sizes.stack.kinds_of_layers:
        kind = "sparse layer" if of_kind(block, "sparse") else "dense layer"
        used = _weights_in_use(sizes, parameters, block)
        again = {"recomputed": _recomputed(sizes, block), "weights": used}
        parts = [("attention", _attention(sizes, a)) for a in sizes.attentions(block)]
        parts += [
            ("feed-forward", _feed_forward(sizes, s)) for s in of_kind(block, "dense")
        ]
        parts += [
            ("feed-forward", _experts(sizes, s)) for s in of_kind(block, "sparse")
        ]
        for part, own in parts:
            yield f"{part} of a {kind}", again | own


def _evaluation(
    sides: list[Local], parameters: tuple[Weight, ...]
) -> dict[str, dict[str, int]]:
    """What a sparse layer holds in the scoring of a microbatch.

    It has its own capacity and transport: where nothing drops, padded rows are as many
    as tokens for every expert. All else is less than in training: there is no gradient,
    and nothing is kept for one.
    """
    found = [
        {"weights": _weights_in_use(sizes, parameters, block)} | _experts(sizes, s)
        for sizes in sides
        for block in sizes.stack.kinds_of_layers
        for s in of_kind(block, "sparse")
    ]
    if not found:
        return {}
    fullest = max(found, key=lambda held: sum(held.values()))
    return {"evaluation of a sparse layer": fullest}


def _copy(weight: Weight, settings: Settings) -> int:
    """Bytes of a weight in the type of the products, if it is kept in another."""
    execution = settings.execution
    if weight.gathered_over or execution.dtype == execution.param_dtype:
        return 0
    return weight.local_size * BYTES[execution.dtype]


def _gradient(weight: Weight, settings: Settings) -> int:
    """Bytes of a gradient: of the parameter's type and place.

    With `fsdp` "optimizer" it is whole while it is added up.
    """
    return weight.local_size * BYTES[settings.execution.param_dtype]


def _update(
    settings: Settings, parameters: tuple[Weight, ...], others: tuple[Weight, ...]
) -> int:
    """Adam is fused with the step it makes; others measure their updates first.

    Adafactor and Muon: float32 updates, of all arrays: the compiler takes none of them
    before the last is made. Muon: the largest array as whole matrices, too, before and
    after. Stochastic rounding: random bits of the largest array.
    Offloading: the moments of one array, there and back.
    """
    largest = max(weight.local_size for weight in parameters) * FLOAT32
    every = sum(weight.local_size for weight in parameters) * FLOAT32
    found = every if settings.optimizer.name in ("adafactor", "muon") else 0
    found += max((2 * share.pieces_bytes for share in muon.shares(settings)), default=0)
    if settings.optimizer.rounding == "stochastic":
        found += largest
    if settings.optimizer.offload:
        found += 2 * max(w.local_size * w.itemsize for w in others)
    return found


def saved(sizes: Local) -> int:
    """Bytes of activations kept for the backward pass, of all layers."""
    return sum(
        layers * saved_per_layer(sizes, sizes.remat(block), block)
        for block, layers in sizes.stack.kinds_of_layers.items()
    )


def saved_per_layer(sizes: Local, remat: str, block: Block) -> int:
    """Bytes that one layer keeps under a remat policy."""
    stream = sizes.residual_tokens * sizes.stack.width * sizes.dtype_bytes
    if remat == "full":
        return stream  # p·T·M·d, the layer's input
    kept = stream + _minimal(sizes, block)
    if remat == "minimal":
        return kept
    return kept + _rest(sizes, block)


def _minimal(sizes: Local, block: Block) -> int:
    """Products without batch dimensions, and what travelled.

    T·(n + 2u)·D·d of queries, keys and values, T·M·d of the attention's output before
    its sum over `model`, then T·pair·f·d of a dense layer; or p·T·E·4 of the router,
    T·pair·f·d of a shared expert, R·M·d of rows dispatched (and again if gathered over
    `model`), as much returned, R·pair·f·d inside the experts.
    """
    M, d, T = sizes.stack.width, sizes.dtype_bytes, sizes.tokens
    found = sum(_projected(sizes, a) + T * M for a in sizes.attentions(block)) * d
    found += sum(T * _hidden(sizes, s) * d for s in of_kind(block, "dense"))
    return found + sum(_minimal_of_experts(sizes, s) for s in of_kind(block, "sparse"))


def _minimal_of_experts(sizes: Local, s: SparseSettings) -> int:
    """The part of the experts in `_minimal`."""
    M, d = sizes.stack.width, sizes.dtype_bytes
    found = sizes.piece_tokens * s.num_experts * FLOAT32
    if s.shared is not None:
        found += sizes.tokens * _hidden(sizes, s.shared) * d
    rows, cut = sizes.expert_rows(s), sizes.expert_model_cut
    if sizes.transport(s)[0] != "ring":
        found += (rows + sizes.sent_rows(s)) * M * d
    elif sizes.settings.mesh.expert > 1:  # tokens of the axis, and their outputs
        found += (sizes.settings.mesh.expert + 1) * sizes.piece_tokens * M * d
    if cut > 1:
        found += cut * rows * M * d
    return found + cut * rows * _expert_hidden(sizes, s) * d


def _rest(sizes: Local, block: Block) -> int:
    """What "none" keeps beside: norms, turned heads, scores if whole, activations.

    The norms' inputs in float32 and outputs, p·T·M·(4 + d) each, gathered T·M·d each;
    T·(2n + u)·D·d; b·n·l·L·(4 + d) unless blocked; T·f·d, or R·(M + f)·d.
    """
    M, d, T = sizes.stack.width, sizes.dtype_bytes, sizes.tokens
    norms = sum(len(each.norm.names) for each in block)
    found = norms * sizes.residual_tokens * M * (FLOAT32 + d) + len(block) * T * M * d
    for a in sizes.attentions(block):
        s = a.settings
        found += sum(t * n * d for t, _, n, again in sizes.projections(a) if again)
        heads, kv_heads = sizes.cut_heads(s.num_heads), sizes.kv_heads(s)
        found += T * heads * (s.key_width + s.value_width) * d
        found += a.key_tokens * kv_heads * s.key_width * d
        if s.gated:  # the sigmoid, and what it multiplies
            found += 2 * T * heads * s.value_width * d
        if isinstance(s, HeadsSettings) and s.qk_norm != "none":
            normed = (T * heads + a.key_tokens * kv_heads) * s.head_dim
            found += normed * (FLOAT32 + d)
        if not sizes.attention_block(a):
            scores = sizes.rows * heads * sizes.length * a.keys
            found += scores * (FLOAT32 + d)
    for s in of_kind(block, "dense"):
        found += T * sizes.cut_width(s) * d
    for s in of_kind(block, "sparse"):
        rows = sizes.expert_model_cut * sizes.expert_rows(s)
        found += rows * (M + sizes.cut_expert(s)) * d
    return found


def _recomputed(sizes: Local, block: Block) -> int:
    """Under "full", what the layer before it makes again of one layer."""
    return _minimal(sizes, block) if sizes.remat(block) == "full" else 0


def _weights_in_use(sizes: Local, parameters: tuple[Weight, ...], block: Block) -> int:
    """Bytes of one layer: matrices whole in d bytes, gradients in `reduce_dtype`.

    Evaluation has no gradients. Where nothing is gathered, the copy in d bytes alone,
    unless all layers' are there.
    """
    execution = sizes.settings.execution
    copied = sizes.train and sizes.settings.train.microbatches > 1
    found = []
    for other, weights in local.by_block(parameters, sizes.name, sizes.stack):
        if other != block:
            continue
        used = largest = 0
        for weight in weights:
            size = weight.gathered_size // weight.num_layers
            if weight.gathered_over:
                gradient = size * BYTES[execution.reduce_dtype] * sizes.train
                used += size * sizes.dtype_bytes + gradient
                largest = max(largest, gradient)
            elif not copied:
                used += _copy(weight, sizes.settings) // weight.num_layers
        found.append(used + SCATTERED_AT_ONCE * largest)
    return max(found, default=0)


def _attention(sizes: Local, a: Attention) -> dict[str, int]:
    """Heads and their gradients, keys of all of a sequence, one block of scores."""
    s, d, T = a.settings, sizes.dtype_bytes, sizes.tokens
    M, both, L = sizes.stack.width, s.key_width + s.value_width, a.keys
    heads, kv_heads = sizes.cut_heads(s.num_heads), sizes.kv_heads(s)
    # (T·2n + T'·2u)·D·d twice: queries, keys, values and what they are mixed to.
    mixed = T * heads + a.key_tokens * kv_heads  # K + X is 2·D
    work = ACTIVATIONS_AT_ONCE * mixed * both * d
    if sizes.settings.mesh.context > 1:  # b·L·2u·D·d, and its gradient
        whole = sizes.settings.partition.context_attention == "all_gather"
        seen = sizes.rows * L if whole else 2 * a.key_tokens
        work += ACTIVATIONS_AT_ONCE * seen * kv_heads * both * d
    # T·M·d of gathered input and its gradient; the norm's, in float32.
    work += ACTIVATIONS_AT_ONCE * (T * M * d + sizes.residual_tokens * M * FLOAT32)
    kernel = sizes.attention_kernel(a)
    if kernel == "splash":  # it writes what scores add up to 128 times over
        return {"attention": work, "scores": sizes.rows * heads * L * 128 * FLOAT32}
    if kernel == "cudnn":  # its mask
        return {"attention": work, "scores": sizes.rows * L * L * BYTES["bfloat16"]}
    queries, keys = sizes.length, L
    if block := sizes.attention_block(a):
        queries, keys = min(block, queries), block
    scores = SCORES_AT_ONCE * sizes.rows * heads * queries * keys * FLOAT32
    return {"attention": work, "scores": scores}


def _feed_forward(sizes: Local, s: DenseSettings) -> dict[str, int]:
    """T·(2·pair + 1)·f·d: hidden, activated, gradients; T·M·d of input and output."""
    wide = ACTIVATIONS_AT_ONCE * _hidden(sizes, s) + sizes.cut_width(s)
    stream = ACTIVATIONS_AT_ONCE * sizes.stack.width
    return {"feed-forward": sizes.tokens * (wide + stream) * sizes.dtype_bytes}


def _experts(sizes: Local, s: SparseSettings) -> dict[str, int]:
    """Rows on their way, hidden rows and their gradients, and the router's arrays."""
    E, M, d = s.num_experts, sizes.stack.width, sizes.dtype_bytes
    cut, here = sizes.expert_model_cut, sizes.expert_rows(s)
    rows = max(here, sizes.sent_rows(s))
    buffers = (ROWS_AT_ONCE if sizes.train else EVALUATED_ROWS_AT_ONCE) * rows * M * d
    if cut > 1:  # gathered over `model`, and their outputs before the sum
        buffers += 2 * cut * here * M * d
    if sizes.transport(s)[0] == "ring":  # tokens of the whole axis, and their sums
        buffers += 2 * sizes.settings.mesh.expert * sizes.carried_tokens(s) * M * d
    if s.router.gate_place == "input":
        buffers += sizes.carried_tokens(s) * M * d
    wide = hidden = _expert_hidden(sizes, s)
    if sizes.train:
        wide = ACTIVATIONS_AT_ONCE * hidden + sizes.cut_expert(s)
    choices = sizes.piece_tokens * E * FLOAT32
    slots = capacity(s.router, E, train=sizes.train)
    groups = -(-sizes.piece_tokens // s.router.group_size)
    maps = groups * E * slots * 4
    shared = 0 if s.shared is None else _hidden(sizes, s.shared)
    return {
        "dispatch": buffers,
        "experts": cut * here * wide * d,
        "routing": ROUTING_AT_ONCE * choices + maps,
        "feed-forward": ACTIVATIONS_AT_ONCE * sizes.tokens * shared * d,
    }


def _logits(sizes: Local, parameters: tuple[Weight, ...]) -> dict[str, int]:
    """One piece of the vocabulary: logits T·v·4, the table's part M·v, its gradient."""
    embedding, T = sizes.settings.layers.embedding, sizes.tokens
    M, chunks = embedding.width, sizes.settings.execution.vocab_chunks
    part = -(-embedding.vocab_size // (sizes.settings.mesh.model * chunks))
    table = next(
        weight
        for weight in parameters
        if weight.path == ("embedding" if embedding.tied else "head")
    )
    in_use = M * part * sizes.dtype_bytes
    if table.gathered_over:
        in_use += M * part * BYTES[sizes.settings.execution.reduce_dtype]
    kept = LOGITS_AT_ONCE * T * part * FLOAT32
    kept += sizes.num_ahead * T * part * FLOAT32 if chunks == 1 else 0
    if chunks == 1:  # nothing is made again, so that the gradient of the table is here
        kept += 0 if table.gathered_over else _gradient(table, sizes.settings)
    stream = ACTIVATIONS_AT_ONCE * T * M * (sizes.dtype_bytes + FLOAT32)
    return {"logits": kept, "weights": in_use, "attention": stream}


def _projected(sizes: Local, a: Attention) -> int:
    """(T·n + T'·2u)·D of queries, maybe gates, and keys and values of T' tokens.

    Of latents T·(C + R + C'), and T·n·K of queries that are made of the input.
    """
    return sum(t * n for t, _, n, again in sizes.projections(a) if not again)


def _hidden(sizes: Local, s: DenseSettings) -> int:
    """pair·f of a dense layer cut over `model`."""
    return local.pair(s) * sizes.cut_width(s)


def _expert_hidden(sizes: Local, s: SparseSettings) -> int:
    """pair·f of an expert."""
    return local.pair(s.experts) * sizes.cut_expert(s)
