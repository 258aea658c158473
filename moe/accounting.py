"""Parameters and floating-point operations, counted from the model's own shapes.

Operations are counted in three ways, which must not be compared with one another:

- those of the *model*: what the paper's formula asks for, whatever computes it.
  Utilisation (MFU) is of these;
- those that are *executed*: with the empty slots that transports of fixed capacity make
  the experts compute, without choices that were dropped, with what the backward pass
  computes again;
- those that the *compiler* reports of its program, under conventions of its own.

`moe.energy` makes days, energy and carbon of them.
"""

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import jax

from moe.layers import Layers, Stack
from moe.model import inventory
from moe.routing.capacity import capacity, mean_choices
from moe.settings import HeadsSettings, LatentSettings


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sizes of a model, and the operations of its forward pass per token of a row.

    A row of an encoder-decoder has tokens on both sides, each of which meets the layers
    of its own.

    Attributes:
        total: parameters; those that layers share once.
        active: parameters that one token meets: all, but of the experts only those
            that it chooses, or that choose it on average; of shared ones in one layer.
        embedding: parameters of the input embedding, a part of `total`.
        positions: parameters of tables of positions.
        products: weights in matrix products outside the experts; a tied embedding is
            one. With two stacks, the mean over the tokens of both.
        expert_products: weights of one expert of every sparse layer; likewise.
        chosen: experts that compute a token in a sparse layer, if none is full; the
            mean over layers, by their products, where they differ.
        slots: rows of fixed capacity there, C·E / S for each token; likewise.
        scores: operations of attention's scores and mixing, 4·N·D·L in each layer, as
            if every token saw as many as the last. Heads that share keys share none.
            Of latent attention as it is trained: 2·N·(D + R + X)·L.
        causal_scores: the same of the pairs that see each other: of tokens that see all
            before them (L + 1) / 2 of L on average.
        ahead: parameters of the modules that predict tokens after the next, in no other
            number here: published counts leave them out, as scoring and drawing do.
        ahead_flops: operations of their forward pass, in training alone.
    """

    total: int
    active: int
    embedding: int
    positions: int
    products: int
    expert_products: int
    chosen: Fraction
    slots: Fraction
    scores: int
    causal_scores: int
    ahead: int = 0
    ahead_flops: int = 0

    @property
    def non_embedding(self) -> int:
        """Parameters without input embedding and positions (arXiv:2001.08361).

        An output that has a matrix of its own is in it.
        """
        return self.total - self.embedding - self.positions

    @property
    def forward_flops_per_token(self) -> int:
        """The model's, with scores as if nothing were masked.

        2 per active parameter in a matrix product, and attention's 4·N·D·L per layer
        (arXiv:2204.02311, appendix B). Norms, softmax and gates are left out.
        """
        return self.model_flops_per_token(causal=False)

    @property
    def executed_forward_flops_per_token(self) -> int:
        """The same with the slots of transports of fixed capacity, empty or not."""
        return self.executed_flops_per_token(padded=True)

    @property
    def train_flops_per_token(self) -> int:
        """Forward and backward: three times the forward pass, tokens ahead too."""
        return 3 * (self.forward_flops_per_token + self.ahead_flops)

    def model_flops_per_token(self, *, causal: bool) -> int:
        """Returns what the model asks of a forward pass.

        Args:
            causal: whether scores that are masked are left out. PaLM's utilisation
                leaves them in, and so does `forward_flops_per_token`.
        """
        scores = self.causal_scores if causal else self.scores
        return 2 * self._products(self.chosen) + scores

    def executed_flops_per_token(self, *, padded: bool, dropped: float = 0.0) -> int:
        """Returns what a forward pass executes; scores as if nothing were masked.

        Args:
            padded: whether the transport computes slots of fixed capacity (those in
                `moe.dispatch.choice.PADDED`): all of them, so drops do not matter. The
                others compute the rows that were not dropped.
            dropped: fraction of choices, measured or of `moe.expected_drops`.
        Raises:
            ValueError: a fraction outside [0, 1].
        """
        if not 0 <= dropped <= 1:
            raise ValueError(f"dropped is a fraction from 0 to 1, not {dropped:g}")
        rows = self.slots if padded else self.chosen * (1 - Fraction(dropped))
        return 2 * self._products(rows) + self.scores

    def executed_train_flops_per_token(
        self, *, padded: bool, dropped: float = 0.0, recomputed: bool
    ) -> int:
        """Returns what a training step executes.

        Args:
            padded: as in `executed_flops_per_token`.
            dropped: likewise.
            recomputed: whether the backward pass repeats the whole forward pass, as
                REMAT = "full" does: 4 forward passes' worth instead of 3.
        """
        forward = self.executed_flops_per_token(padded=padded, dropped=dropped)
        forward += self.ahead_flops
        return (4 if recomputed else 3) * forward

    def _products(self, rows: Fraction) -> int:
        """Parameters met in products by a token that so many experts compute."""
        return self.products + int(self.expert_products * rows)


def count(layers: Layers, length: int, encoder_length: int = 0) -> Counts:
    """Counts a model without allocating it.

    Args:
        layers: what it is.
        length: L of the stack that is scored, for the cost of attention.
        encoder_length: L of the encoder beside a decoder.
    """
    if layers.ahead is not None:
        return _with_ahead(layers, layers.ahead, length)
    described, (*_, last) = inventory.specs(layers), layers.stacks
    lengths = dict.fromkeys(layers.stacks, encoder_length) | {last: length}
    share = {name: Fraction(n, sum(lengths.values())) for name, n in lengths.items()}
    embedding = math.prod(described["embedding"].shape)
    tables = {name: tree for name, tree in described.items() if name not in share}
    if not layers.embedding.tied:
        del tables["embedding"]
    products = _sizes(tables)[1] * share[last]
    if patches := described.get("patches"):  # which other tokens do not meet
        others = Fraction(length - layers.embedding.num_patches, length)
        products -= _sizes(patches)[1] * others
    for name, stack in layers.stacks.items():
        products += _sizes(described[name])[1] * share[name]
        for segment, blocks in zip(
            stack.segments, described[name]["layers"], strict=True
        ):
            products += _sizes(blocks)[1] * (segment.uses - 1) * share[name]
    one_of_each, met, seated, idle = (Fraction(0),) * 4
    for place in layers.sparse():
        s, blocks = place.sublayer.settings, described[place.stack]["layers"]
        weights = blocks[place.segment][place.block][place.sublayer.name]
        all_sizes, all_products = _sizes(weights["experts"])
        all_products *= layers.stacks[place.stack].segments[place.segment].uses
        products -= all_products * share[place.stack]
        chosen = mean_choices(s.router, s.num_experts)
        slots = capacity(s.router, s.num_experts, train=True) * s.num_experts
        one = all_products // s.num_experts * share[place.stack]
        one_of_each += one
        met += one * chosen
        seated += one * Fraction(slots, s.router.group_size)
        idle += int(all_sizes - all_sizes * chosen / s.num_experts)
    scores = causal_scores = Fraction(0)
    for name, stack in layers.stacks.items():
        for s in (*stack.settings("heads"), *stack.settings("latent")):
            each = 2 * s.num_heads * (s.key_width + s.value_width) * share[name]
            scores += each * s.reach(lengths[name])
            causal_scores += each * Fraction(_pairs(s, lengths[name]), lengths[name])
        for s in stack.settings("cross"):
            across = 4 * s.num_heads * s.head_dim * share[name] * encoder_length
            scores, causal_scores = scores + across, causal_scores + across
            # Keys and values are made of the encoder's tokens.
            made = 2 * stack.width * s.kv_heads * s.head_dim
            products += made * (share["encoder"] - share[name])
    total = _sizes(described)[0]
    own = described.get("positions")
    return Counts(
        total=total,
        active=total - int(idle),
        embedding=embedding,
        positions=math.prod(own.shape) if own else 0,
        products=int(products),
        expert_products=int(one_of_each),
        chosen=met / (one_of_each or 1),
        slots=seated / (one_of_each or 1),
        scores=int(scores),
        causal_scores=int(causal_scores),
    )


def _with_ahead(layers: Layers, ahead: Stack, length: int) -> Counts:
    """Counts what predicts tokens after the next apart: their layers, as a model."""
    counts = count(layers._replace(ahead=None), length)
    text = dataclasses.replace(layers.embedding, image_size=0)
    alone = count(Layers(text, None, ahead, None), length)
    modules, M = len(ahead.segments), ahead.width
    logits = 2 * M * layers.embedding.vocab_size
    joined = 2 * 2 * M * M
    return dataclasses.replace(
        counts,
        ahead=_sizes(inventory.specs(layers)["ahead"])[0],
        ahead_flops=alone.forward_flops_per_token
        + (modules - 1) * logits
        + modules * joined,
    )


def _pairs(s: HeadsSettings | LatentSettings, length: int) -> int:
    """Pairs of tokens of a row of which the first sees the second."""

    def of(length: int) -> int:
        window = min(s.window or length, length)
        back = length * window - window * (window - 1) // 2
        return back if s.causal else 2 * back - length

    piece = min(s.chunk or length, length)
    pieces, rest = divmod(length, piece)
    return pieces * of(piece) + of(rest)


def _sizes(specs: Any) -> tuple[int, int]:
    """Parameters of a tree, and of them those in matrices."""
    found = jax.tree.leaves(specs)
    return (
        sum(math.prod(spec.shape) for spec in found),
        sum(math.prod(spec.shape) for spec in found if spec.is_matrix),
    )


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a compiled program.

    Attributes:
        flops: what XLA says of its body, in which loops are counted once.
        trips: how often the body runs.
        inner: loops in the body.
    """

    flops: float
    trips: int
    inner: tuple["Loop", ...] = ()

    @property
    def missing(self) -> float:
        """Operations beyond those of one run of everything in it."""
        inside = sum(loop.missing for loop in self.inner)
        return self.trips * (self.flops + inside) - self.flops


def compiled_flops(reported: float, loops: Iterable[Loop] = ()) -> float:
    """Returns the operations of a program for XLA, its loops in full.

    `cost_analysis()["flops"]` of a compiled step is of one device's program; of one
    that is only lowered, of all devices' together. XLA counts 2 for a multiplication
    with an addition and 1 for each elementwise operation, those of norms and softmax
    included, and everything that runs: what is masked, padding, what is computed again.
    The body of a loop it counts once, however often it runs: of a stack of layers that
    is one period. On CPU it passes over products that became calls of a library, so ask
    the lowered program there.

    Args:
        reported: what XLA says of the whole program.
        loops: those that are in no other loop.
    Raises:
        ValueError: XLA reports a negative number where it does not know.
    """
    if reported < 0:
        raise ValueError(f"XLA does not know: it reports {reported:g} operations")
    return reported + sum(loop.missing for loop in loops)
