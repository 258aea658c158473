"""The bytes that one chip must send in a step, by what for and over which axis.

Written from the algorithm: what each collective of the forward and the backward pass
moves, and how often. Compiled programs are compared with it in tests; what is left out
is router statistics and single numbers.

A collective over n chips sends, along a ring, (n-1)/n of what is gathered (its output),
scattered (its input) or exchanged, and a sum of all twice that. Weights are gathered
along one axis after the other, and the fastest moves nearly all (`Grid.gather`). Sums
are counted so too: only the part that one chip is left with crosses the slow network.
"""

import math
from collections.abc import Iterable, Sequence

from launch.config.settings import Settings
from launch.planning.cost import layer_traffic, local, muon
from launch.planning.cost.flow import (
    EXCHANGE,
    Flow,
    at_once,
    cuts_sequence,
    flow_of,
    forward_passes,
    joins,
)
from launch.planning.cost.local import BYTES, FLOAT32, Local, Weight
from moe.training.trained import is_trained
from partitioning.settings import FASTEST_FIRST


def flows(
    settings: Settings,
    chip: str = "tpu",
    fastest_first: Sequence[str] = FASTEST_FIRST,
) -> tuple[Flow, ...]:
    """Lists everything that a chip sends in a step, largest first.

    Args:
        settings: configuration of the run.
        chip: its name, or the platform; it decides the transport.
        fastest_first: the mesh axes by bandwidth, which decides over which of several
            most bytes go; see `topologies.fastest_first`.
    """
    *_, scored = sides = local.sides(settings, chip)
    parameters, _ = local.weights(settings, fastest_first)
    found = [
        *_weights(scored, parameters),
        *_gradients(scored, parameters),
        *_matrices(scored, fastest_first),
        *(flow for sizes in sides for flow in _tables(sizes, parameters)),
        *(flow for sizes in sides for flow in layer_traffic.attention(sizes)),
        *(flow for sizes in sides for flow in layer_traffic.feed_forwards(sizes)),
        *(flow for sizes in sides for flow in layer_traffic.experts(sizes)),
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


# -------------------------------------------------------------------------- weights


def _uses(sizes: Local, weight: Weight) -> int:
    """How often a pass gathers an array: for each of the layers that share it."""
    stack, *names = weight.path.split("/")
    if weight.num_layers > 1 or names[:1] != ["layers"]:
        return 1
    layers = sizes.settings.layers
    found = layers.ahead if stack == "ahead" else layers.stacks[stack]
    assert found is not None, weight.path
    return found.segments[int(names[1])].uses


def _weights(sizes: Local, parameters: tuple[Weight, ...]) -> list[Flow]:
    """Fully sharded weights are gathered for use, and their gradients scattered.

    Forward and backward gather, whatever remat keeps; with several microbatches each
    of them is computed forward twice. Logits that are formed in one piece, once, end
    the forward pass and begin the backward pass: there compilers gather once for both.
    """
    execution = sizes.settings.execution
    microbatches = sizes.settings.train.microbatches
    gathers = forward_passes(sizes) + microbatches
    at_once = execution.vocab_chunks == 1 and microbatches == 1
    found = []
    for axes, weights in _by_axes(parameters, gathered=True).items():
        table = "embedding" if sizes.settings.model.tie_embeddings else "head"
        of_logits = [w for w in weights if w.path == table]
        layers = [w for w in weights if "layers" in w.logical]
        for name, used, times in (
            ("weights", layers, gathers),
            ("output projection", of_logits, 1 if at_once else gathers),
        ):
            size = {w.path: w.gathered_size * _uses(sizes, w) for w in used}
            forward = sum(size[w.path] * _type(w, execution.dtype) for w in used)
            back = sum(
                size[w.path] * _type(w, execution.reduce_dtype)
                for w in used
                if is_trained(w.path, sizes.settings.optimizer)
            )
            found += [
                flow_of(
                    sizes,
                    f"{name} gathered",
                    axes,
                    forward,
                    times,
                    f"elements × bytes of {execution.dtype}, {times} times",
                ),
                flow_of(
                    sizes,
                    f"gradients of {name} scattered",
                    axes,
                    back,
                    microbatches,
                    f"elements × bytes of {execution.reduce_dtype}, × {microbatches} "
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
    optimizer = sizes.settings.optimizer
    parameters = tuple(w for w in parameters if is_trained(w.path, optimizer))
    for axes, weights in _by_axes(parameters, gathered=False).items():
        whole = sum(weight.local_size * weight.itemsize for weight in weights)
        found.append(
            flow_of(
                sizes,
                "gradients of replicas" if axes == ("replica",) else "gradients summed",
                at_once(axes, sizes.sizes),
                whole,
                2,
                "elements of a chip × bytes of a parameter, scattered and gathered",
            )
        )
    return found


def _matrices(sizes: Local, fastest_first: Sequence[str]) -> list[Flow]:
    """Muon exchanges pieces of matrices for whole ones, and back."""
    moved: dict[tuple[str, ...], int] = {}
    for share in muon.shares(sizes.settings, fastest_first):
        for axes in share.exchanged_over:
            moved[axes] = moved.get(axes, 0) + share.pieces_bytes
    return [
        flow_of(
            sizes,
            "matrices made whole",
            at_once(axes, sizes.sizes),
            pieces,
            2,
            "elements of a chip × 4, there and back",
            EXCHANGE,
        )
        for axes, pieces in moved.items()
    ]


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
    times = 1 + sizes.num_ahead  # modules that look ahead embed and predict too
    scored = sizes.name == sizes.settings.layers.scored
    found = [
        flow_of(
            sizes,
            "ids gathered",
            axes,
            shares * sizes.tokens * 4,
            times * passes,
            "int32 of all chips' tokens, forward",
        ),
        flow_of(
            sizes,
            "embeddings exchanged",
            at_once(axes, sizes.sizes),
            sizes.residual_tokens * model.model_dim * d,
            times * both,
            "tokens × M × d, forward and backward",
            EXCHANGE,
        ),
        flow_of(
            sizes,
            "embeddings over the vocabulary",
            ("model",),
            stream,
            times * both * joins(sizes),
            "tokens × M × d, scattered forward, gathered backward",
        ),
        flow_of(
            sizes,
            "activations for logits" if scored else "activations for the decoder",
            ("model",),
            stream,
            times * both if cuts_sequence(sizes) else 0,
            "tokens × M × d, gathered forward, scattered backward",
        ),
        flow_of(
            sizes,
            "softmax over the vocabulary",
            ("model",),
            sizes.tokens * FLOAT32 if scored else 0,
            times * 2 * (5 * passes + 2 * sizes.settings.train.microbatches),
            "5 float32 sums or maxima per token forward, 2 backward",
        ),
    ]
    return found
