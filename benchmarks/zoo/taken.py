"""What training took, as papers publish it, and what that is computed from.

Each figure has the convention that its authors chose: two of different conventions
cannot be compared.
"""

from typing import NamedTuple

from moe import energy
from moe.layers import Layers, Stack
from moe.model.feed_forward.dense import GATED
from moe.settings import DenseSettings

_DAY = 24.0


class Days(NamedTuple):
    """Petaflop-days of a training run by a rule of thumb.

    Attributes:
        what: the run.
        parameters: N, those that a token meets.
        tokens: D.
        convention: rule of `moe.energy.training_flops`.
        published: what the paper says; None where it says nothing.
        source: where it says so.
    """

    what: str
    parameters: float
    tokens: float
    convention: energy.Convention
    published: float | None
    source: str

    @property
    def counted(self) -> float:
        """By the rule."""
        flops = energy.training_flops(
            self.parameters, self.tokens, convention=self.convention
        )
        return energy.pf_days(flops)


class Energy(NamedTuple):
    """Energy of a training run, from chips, hours and power.

    Attributes:
        what: the run.
        chips: how many there were.
        hours: how long they ran.
        watts: mean power of one.
        pue: power of the data centre over that of its machines.
        published: megawatt hours that the paper says.
        source: where it says so.
    """

    what: str
    chips: float
    hours: float
    watts: float
    pue: float
    published: float
    source: str

    @property
    def counted(self) -> float:
        """Their product, in megawatt hours."""
        return energy.megawatt_hours(
            chips=self.chips, hours=self.hours, watts=self.watts, pue=self.pue
        )


_D1 = "arXiv:2005.14165, table D.1"
_T4 = "arXiv:2104.10350, table 4"
_GLAM = "arXiv:2112.06905"

DAYS = (
    Days("GPT-3 Small", 125e6, 300e9, "6ND", 2.60, _D1),
    Days("GPT-3 Medium", 356e6, 300e9, "6ND", 7.42, _D1),
    Days("GPT-3 Large", 760e6, 300e9, "6ND", 15.8, _D1),
    Days("GPT-3 XL", 1.32e9, 300e9, "6ND", 27.5, _D1),
    Days("GPT-3 2.7B", 2.65e9, 300e9, "6ND", 55.2, _D1),
    Days("GPT-3 6.7B", 6.66e9, 300e9, "6ND", 139, _D1),
    Days("GPT-3 13B", 12.85e9, 300e9, "6ND", 268, _D1),
    Days("GPT-3 175B", 174.6e9, 300e9, "6ND", 3640, _D1),
    Days("T5-11B", 11e9, 1e12, "3ND", 382, _D1),
    Days("Yuan 1.0", 245.73e9, 180e9, "8ND", 4095, "arXiv:2110.04725"),
    Days("Yuan 1.0", 245.73e9, 180e9, "6ND", None, ""),
    Days("GLaM 64B/64E, 600 billion tokens", 96.6e9, 600e9, "6ND", None, ""),
    Days("GLaM 64B/64E, 280 billion tokens", 96.6e9, 280e9, "6ND", None, ""),
    Days("MT-NLG 530B, 270 billion tokens", 530e9, 270e9, "6ND", None, ""),
)

ENERGY = (
    Energy("T5-11B", 512, 20 * _DAY, 310, 1.12, 85.7, _T4),
    Energy("Meena", 1024, 30 * _DAY, 289, 1.09, 232, _T4),
    Energy("GShard 600B", 1024, 3.1 * _DAY, 288, 1.09, 24.1, _T4),
    Energy("Switch-C", 1024, 27 * _DAY, 245, 1.10, 179, _T4),
    Energy("GPT-3 175B", 10_000, 14.8 * _DAY, 330, 1.10, 1287, _T4),
    Energy("GLaM, 280 billion tokens", 1024, 574, 326, 1.11, 213, _GLAM),
    Energy("GLaM, 600 billion tokens", 1024, 574 * 600 / 280, 326, 1.11, 456, _GLAM),
)

# GFLOPs of a sequence of 512 tokens of inputs and 114 of targets, forward. Switch:
# arXiv:2101.03961, table 9; ST-MoE: arXiv:2202.08906, table 11, whose 645 of ST-MoE-L
# do not follow from its sizes.
SEQUENCE_GFLOPS = {
    "t5_base": 124,
    "t5_large": 425,
    "t5_1_1_xxl": 6_300,
    "switch_c": 890,
    "st_moe_32b": 20_200,
}


def sequence_flops(layers: Layers, inputs: int = 512, targets: int = 114) -> float:
    """Returns operations of a forward pass as the papers of Switch and ST-MoE count.

    Each side's weights meet its own tokens, those of keys and values across included;
    attention's scores count half, routers nothing. `moe.accounting` leaves nothing out.

    Args:
        layers: an encoder and a decoder.
        inputs: tokens of the encoder.
        targets: tokens of the decoder.
    """
    encoder, decoder = layers.encoder, layers.decoder
    assert encoder is not None, "the papers count two stacks"
    assert decoder is not None, "the papers count two stacks"
    table = layers.embedding.vocab_size * layers.embedding.width
    products = _weights(encoder) * inputs + (_weights(decoder) + table) * targets
    scores = sum(2 * s.num_heads * s.head_dim for s in encoder.settings("heads"))
    total = 2 * products + scores * inputs * inputs
    for kind, seen in (("heads", targets), ("cross", inputs)):
        each = sum(2 * s.num_heads * s.head_dim for s in decoder.settings(kind))
        total += each * targets * seen
    return total


def _weights(stack: Stack) -> int:
    """Weights of a stack that a token meets in products, but for routers."""
    found = 0
    for kind in ("heads", "cross"):
        for s in stack.settings(kind):
            found += 2 * stack.width * (s.num_heads + s.kv_heads) * s.head_dim
    found += sum(_feed_forward(s, stack.width) for s in stack.settings("dense"))
    for s in stack.settings("sparse"):
        found += s.router.num_selected * _feed_forward(s.experts, stack.width)
    return found


def _feed_forward(s: DenseSettings, width: int) -> int:
    return (3 if s.activation in GATED else 2) * width * s.mlp_dim
