"""What each kind of sublayer must know of itself.

`moe/architecture.py` makes these of the flat words that a user writes. Standard library
only.
"""

import dataclasses
import math
from typing import Literal

from moe.settings.router import RouterSettings


@dataclasses.dataclass(frozen=True)
class NormSettings:
    """A normalisation.

    Attributes:
        kind: "rms" (arXiv:1910.07467); "rms_plus_one", whose scales are one more than
            their weights (Gemma); or "layer" (arXiv:1607.06450), which has a bias.
        epsilon: added to the mean square.
        place: "before" a sublayer; on its "output", before that is added; "both"; or
            "after" the sum with its input.
    """

    kind: Literal["rms", "rms_plus_one", "layer"] = "rms"
    epsilon: float = 1e-6
    place: Literal["before", "both", "output", "after"] = "before"

    @property
    def names(self) -> tuple[str, ...]:
        """Names among a sublayer's weights of its norms; all but one are of `norm`."""
        return {
            "both": ("norm", "output_norm"),
            "output": ("output_norm",),
        }.get(self.place, ("norm",))


@dataclasses.dataclass(frozen=True)
class PositionSettings:
    """How attention sees positions.

    Attributes:
        kind: "rotary" turns queries and keys (arXiv:2104.09864); "distance" adds a
            bias by bucket of distance to the scores (T5, arXiv:1910.10683); "alibi"
            takes the distance from them, times a slope of each head
            (arXiv:2108.12409); "none".
        rotary_base: base of the angles.
        buckets: buckets of distance.
        max_distance: distance from which on all share the last bucket.
        two_sided: whether half of the buckets are for tokens ahead; else these are all
            in the first.
        fraction: share of a head's numbers that are turned, the first of them.
        pairs: numbers that turn together: (d, d + D/2), "halves", or "neighbours",
            (2d, 2d + 1) (arXiv:2104.09864, eq. 34).
        scaling: how angles reach beyond the length that was learnt: "linear" divides
            all by `factor` (arXiv:2306.15595, eq. 4); "by_parts" those that turn less
            than `slow_turns` times in it, and by degrees those of up to `fast_turns`
            (arXiv:2309.00071, section 3.2); "yarn" has these degrees along d, and
            makes scores larger (section 3.4).
        factor: lengths to reach, over the one that was learnt.
        original_length: the length that was learnt.
        fast_turns: turns in it from which on an angle stays as it is.
        slow_turns: turns up to which it is divided by all of `factor`.
        attention_factor: factor of turned queries and keys of "yarn"; 0 takes
            0.1·ln(factor) + 1.
        truncate: whether "yarn" begins and ends its degrees at whole d.
    """

    kind: Literal["rotary", "distance", "alibi", "none"] = "none"
    rotary_base: float = 10_000.0
    buckets: int = 32
    max_distance: int = 128
    two_sided: bool = False
    fraction: float = 1.0
    pairs: Literal["halves", "neighbours"] = "halves"
    scaling: Literal["none", "linear", "by_parts", "yarn"] = "none"
    factor: float = 1.0
    original_length: int = 0
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True

    @property
    def yarn_factor(self) -> float:
        """What turned queries and keys are multiplied by, each (arXiv:2309.00071)."""
        if self.scaling != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * math.log(self.factor) + 1

    def turned(self, width: int) -> int:
        """Returns how many of a head's numbers are turned."""
        return round(self.fraction * width)


@dataclasses.dataclass(frozen=True)
class HeadsSettings:
    """Multi-head attention of tokens to one another, or to those of another stack.

    Attributes:
        num_heads: N, heads of queries.
        kv_heads: U, heads of keys and values, each shared by N / U of queries.
        head_dim: D.
        biases: whether queries, keys and values have biases.
        output_bias: whether what is made of the mixed values has one.
        positions: how it sees positions.
        window: places, its own among them, that a token sees back (arXiv:2310.06825,
            section 2), and ahead if it is not causal; 0 sees all.
        causal: whether tokens see none that follow.
        shares_bias: whether the bias by distance is the stack's, and not its own.
        init_scale: variance of the initial weights, times their fan-in.
        qk_norm: what of queries and of keys is normalised together, with learned
            weights, before they are turned: each "head" (arXiv:2010.04245), or all
            heads, the "width"; "unit" divides each head of turned ones by its root mean
            square, without weights; "none".
        norm: that norm's kind and epsilon.
        sinks: whether every softmax has a learned score of its head that no key has.
        cap: bound of the scores; 0 sets none. See `Scoring`.
        score_scale: factor of the products of queries and keys; 0 takes D^-0.5.
        gated: whether mixed values are multiplied by a sigmoid of the same input
            (arXiv:2505.06708, eq. 5).
        chunk: positions of the pieces that a segment falls into, none of which sees
            another; 0 does not cut it.
        growth: factor g of what queries of position p are multiplied by, where they
            know none: 1 + g·ln(1 + ⌊(p + 1) / s⌋) (arXiv:2501.19399); 0 leaves them
            alone.
        growth_length: number s of positions.
    """

    num_heads: int
    kv_heads: int
    head_dim: int
    biases: bool = False
    output_bias: bool = False
    positions: PositionSettings = PositionSettings()
    window: int = 0
    causal: bool = True
    shares_bias: bool = False
    init_scale: float = 1.0
    qk_norm: Literal["none", "head", "width", "unit"] = "none"
    norm: NormSettings = NormSettings()
    sinks: bool = False
    cap: float = 0.0
    score_scale: float = 0.0
    gated: bool = False
    chunk: int = 0
    growth: float = 0.0
    growth_length: int = 0

    def reach(self, length: int) -> int:
        """Returns the most keys that one of so many queries sees."""
        length = min(self.chunk or length, length)
        return _reach(self.window, length, causal=self.causal)

    @property
    def key_width(self) -> int:
        """Width of a head's queries and keys."""
        return self.head_dim

    @property
    def value_width(self) -> int:
        """X, width of a head's values."""
        return self.head_dim

    def own_kv_heads(self, devices: int) -> int:
        """Returns the heads of keys that one of so many devices attends to.

        Where they divide they are cut. Where the devices are a multiple of them, the
        queries of each need one; else each has one of its own for every query.
        """
        if self.kv_heads % devices == 0:
            return self.kv_heads // devices
        return 1 if devices % self.kv_heads == 0 else -(-self.num_heads // devices)

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.score_scale or self.head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class LatentSettings:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Keys and values of all heads are made of one narrow vector for each token, and of
    one key that carries the positions.

    Attributes:
        num_heads: N.
        head_dim: D, part of a head's queries and keys that knows no positions.
        rope_dim: R, part that does; all heads share one such key.
        value_dim: X, width of a head's values.
        kv_latent: C, width of what keys and values are made of.
        query_latent: width of what queries are made of; 0 makes them of the input.
        positions: how queries and the shared key see positions.
        norm: normalisation of what keys and values, and queries, are made of.
        window: places that a token sees back, as in `HeadsSettings`.
        causal: whether tokens see none that follow.
        init_scale: variance of the initial weights, times their fan-in.
        sinks: whether every softmax has a learned score, as in `HeadsSettings`.
        cap: bound of the scores, likewise.
        score_scale: factor of the products of queries and keys; 0 takes (D + R)^-0.5.
        gated: whether mixed values are multiplied by a sigmoid, likewise.
        chunk: positions of pieces that do not see one another, likewise.
    """

    num_heads: int
    head_dim: int
    rope_dim: int
    value_dim: int
    kv_latent: int
    query_latent: int = 0
    positions: PositionSettings = PositionSettings()
    norm: NormSettings = NormSettings()
    window: int = 0
    causal: bool = True
    init_scale: float = 1.0
    sinks: bool = False
    cap: float = 0.0
    score_scale: float = 0.0
    gated: bool = False
    chunk: int = 0

    def reach(self, length: int) -> int:
        """Returns the most keys that one of so many queries sees."""
        length = min(self.chunk or length, length)
        return _reach(self.window, length, causal=self.causal)

    def absorbs(self, length: int) -> bool:
        """Whether so many queries are cheaper in the latent space than keys out of it.

        For each key and head, L·(2C + R) there; else L·(D + R + X), and C·(D + X) to
        make key and value.
        """
        made = self.head_dim + self.value_dim
        return length * (2 * self.kv_latent - made) <= self.kv_latent * made

    def own_kv_heads(self, devices: int) -> int:
        """Returns the heads of keys that one of so many devices attends to."""
        return -(-self.num_heads // devices)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, once they are made."""
        return self.num_heads

    @property
    def key_width(self) -> int:
        """Width of a head's queries and keys."""
        return self.head_dim + self.rope_dim

    @property
    def value_width(self) -> int:
        """X, width of a head's values."""
        return self.value_dim

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by.

        YaRN's factors count in both parts, as in DeepSeek-V2's own code.
        """
        scale = self.score_scale or self.key_width**-0.5
        return scale * self.positions.yarn_factor**2


def _reach(window: int, length: int, *, causal: bool) -> int:
    seen = window if causal else 2 * window - 1
    return min(seen, length) if window else length


@dataclasses.dataclass(frozen=True)
class DenseSettings:
    """A two-layer feed-forward.

    Attributes:
        mlp_dim: F.
        activation: key of `PLAIN` or `GATED` in `moe/model/feed_forward/dense.py`.
        biases: whether both products have biases.
        init_scale: variance of the initial weights, times their fan-in.
    """

    mlp_dim: int
    activation: str
    biases: bool = False
    init_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class SparseSettings:
    """Experts, and how tokens come to them.

    Attributes:
        num_experts: E.
        experts: one expert.
        router: how tokens choose.
        shared: the expert that every token visits; None without.
        shared_gate: whether its output is multiplied by a gate of the token.
        dropout: probability of zeroing a hidden activation of an expert.
        vocab_size: V, which the hash router's table covers.
    """

    num_experts: int
    experts: DenseSettings
    router: RouterSettings
    shared: DenseSettings | None = None
    shared_gate: bool = False
    dropout: float = 0.0
    vocab_size: int = 0


@dataclasses.dataclass(frozen=True)
class EmbeddingSettings:
    """From ids to activations, and from activations to logits.

    Attributes:
        vocab_size: V, rows of the table.
        width: M.
        max_positions: rows of a table of positions; 0 has none.
        tied: whether the output projection is the table.
        init_scale: variance of an output projection of its own, times its fan-in.
        scale: factor of the embeddings of tokens.
        logit_scale: factor of the logits.
        token_types: rows of a table of token types; 0 has none.
        norm: normalisation of the sum of all of these; None without.
        transform: activation of a dense layer before the output projection, which a
            norm like `output_norm` follows; "" has neither.
        output_norm: that norm.
        output_bias: whether logits have a bias.
        logit_cap: bound of the logits, which come as cap·tanh(logit / cap) (Gemma 2,
            arXiv:2408.00118, section 2); 0 sets none.
        image_size: height and width of an image, in pixels; 0 has none.
        patch_size: the same of a patch of it.
        image_channels: numbers of a pixel.
    """

    vocab_size: int
    width: int
    max_positions: int = 0
    tied: bool = False
    init_scale: float = 1.0
    scale: float = 1.0
    logit_scale: float = 1.0
    token_types: int = 0
    norm: NormSettings | None = None
    transform: str = ""
    output_norm: NormSettings = NormSettings()
    output_bias: bool = False
    logit_cap: float = 0.0
    image_size: int = 0
    patch_size: int = 1
    image_channels: int = 3

    @property
    def num_patches(self) -> int:
        """P, patches of an image, each in the place of a token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """How many numbers a patch has."""
        return self.patch_size**2 * self.image_channels
