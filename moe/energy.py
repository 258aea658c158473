"""What training takes: PF-days, utilisation, energy and carbon. Standard library only.

The figures of papers differ by convention more than by substance, so a convention is
always an argument, and a `Ledger` keeps what went into a figure, not the figure.
"""

import dataclasses
from typing import Literal

PF_DAY = 10**15 * 24 * 3600  # operations of a petaFLOP per second in a day

Convention = Literal["3ND", "6ND", "8ND"]
# Operations per active parameter and token, without attention's scores. "6ND": 2 in the
# forward pass, 4 in the backward (arXiv:2001.08361); GPT-3's 3,640 PF-days. "8ND": the
# forward pass is computed again; Yuan 1.0's 4,095, of which 6ND is 3,072. "3ND": an
# encoder-decoder, half of whose parameters each token meets; GPT-3's figure for T5.
_PER_PARAMETER = {"3ND": 3, "6ND": 6, "8ND": 8}


def training_flops(active: float, tokens: float, *, convention: Convention) -> float:
    """Returns operations of training by a rule of thumb.

    Args:
        active: N, parameters that a token meets.
        tokens: D.
        convention: which rule; figures of two rules cannot be compared.
    """
    if convention not in _PER_PARAMETER:
        raise ValueError(
            f"convention is one of {', '.join(_PER_PARAMETER)}, not {convention!r}"
        )
    return _PER_PARAMETER[convention] * active * tokens


def pf_days(flops: float) -> float:
    """Returns days of one petaFLOP per second."""
    return flops / PF_DAY


def utilisation(
    flops: float, *, chips: float, hours: float, peak_flops: float
) -> float:
    """Returns the fraction of the chips' peak (arXiv:2204.02311, appendix B).

    MFU if the operations are the model's, hardware utilisation if they are those that
    were executed.

    Args:
        flops: operations of all chips together.
        chips: how many there are.
        hours: how long they ran.
        peak_flops: peak operations per second of one chip, in the type of the
            products.
    """
    return flops / (chips * hours * 3600 * peak_flops)


def megawatt_hours(*, chips: float, hours: float, watts: float, pue: float) -> float:
    """Returns the energy that a data centre draws for a run (arXiv:2104.10350).

    Args:
        chips: how many there are.
        hours: how long they ran.
        watts: mean power of one chip and its share of the host, measured or rated.
        pue: power of the data centre over that of its machines: 1.1 is good.
    """
    return chips * hours * watts * pue / 1e6


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What was spent on training, each quantity by itself.

    Attributes:
        flops: operations of the whole run.
        convention: how they were counted: a rule of `training_flops`, or "model",
            "executed" or "compiled" of `moe.accounting`.
        scores: which of attention's scores are in them; no rule of thumb has any.
        routers: whether the routers' products are in them.
        chip_hours: chips times hours.
        watts: mean power of a chip.
        pue: power of the data centre over that of its machines.
        tonnes_per_mwh: carbon intensity of the energy, as CO2 equivalents; net of what
            was bought free of carbon, or gross, as `carbon` says.
        carbon: "net" or "gross".
        origin: whether the hours were measured, or estimated from a plan.
    """

    flops: float
    convention: Literal["3ND", "6ND", "8ND", "model", "executed", "compiled"]
    chip_hours: float
    watts: float
    pue: float
    tonnes_per_mwh: float
    scores: Literal["none", "causal", "full"] = "none"
    routers: bool = True
    carbon: Literal["net", "gross"] = "net"
    origin: Literal["measured", "published", "estimated"] = "estimated"

    def __post_init__(self) -> None:
        wrong = {
            name: getattr(self, name)
            for name in ("flops", "chip_hours", "watts", "tonnes_per_mwh")
            if getattr(self, name) < 0
        }
        if wrong:
            raise ValueError(f"none of these can be negative: {wrong}")
        if self.pue < 1:
            raise ValueError(
                f"pue = {self.pue:g}: a data centre draws at least what its machines do"
            )

    @property
    def pf_days(self) -> float:
        """Operations in days of one petaFLOP per second."""
        return pf_days(self.flops)

    @property
    def megawatt_hours(self) -> float:
        """Energy that the data centre drew."""
        return megawatt_hours(
            chips=1, hours=self.chip_hours, watts=self.watts, pue=self.pue
        )

    @property
    def tonnes_co2e(self) -> float:
        """Carbon dioxide, and what else warms as much."""
        return self.megawatt_hours * self.tonnes_per_mwh

    def utilisation(self, peak_flops: float) -> float:
        """Returns the fraction of the peak, as `utilisation` does."""
        return utilisation(
            self.flops, chips=1, hours=self.chip_hours, peak_flops=peak_flops
        )
