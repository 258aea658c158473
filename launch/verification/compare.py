"""Two measurements of the same step: how far apart they are, and how far they may be.

Sums over devices have another order, so results differ by rounding: about 1e-6 of an
array's largest entry in float32. A fault is orders of magnitude larger: a missing
device is a half or a quarter of the sum.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from launch.verification.measure import Decisions, Evaluation, Start, Step

# Relative unless the quantity says otherwise; docs/verify.md gives the reasons.
TOLERANCES = {
    "loss": 1e-5,
    "norm": 1e-5,
    "metric": 2e-5,
    "gradient": 5e-5,
    "descent": 2e-5,
    "optimizer": 1e-3,  # of the learning rate
    "logits": 2e-5,
    "count": 0.0,
}
# A gradient that is zero but for rounding, such as that of a key bias, is measured by
# this part of the median array's largest entry.
_FLOOR = 0.1
# Entries of a gradient below this part of its array's largest, or of the largest of
# all, have no certain sign.
_SIGNLESS, _SIGNLESS_AMONG_ALL = 1e-3, 1e-5


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared quantity.

    Attributes:
        quantity: what it is: a metric, or "gradient" and the array.
        difference: how far apart.
        tolerance: how far it may be.
        note: what else there is to say.
    """

    quantity: str
    difference: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether they are the same; False if the difference is not a number."""
        return self.difference <= self.tolerance


def steps(expected: Step, actual: Step, start: Start) -> list[Row]:
    """Compares a train step with that of one device."""
    return [
        *_metrics(expected.metrics, actual.metrics),
        *gradients(expected.gradient, actual.gradient),
        _descent(expected, actual, start),
        _own(expected, actual),
        ledger(actual.metrics),
    ]


def _metrics(
    expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]
) -> list[Row]:
    """Every metric; losses and norms first, counts exactly."""
    first = ("loss/total", "loss/nats_per_token", "optimizer/gradient_norm")
    names = [*first, *(name for name in expected if name not in first)]
    rows = []
    for name in names:
        if name not in actual:
            rows.append(Row(name, float("nan"), 0.0, "is missing on the mesh"))
            continue
        kind = "metric"
        if name.startswith("ledger/") or expected[name].dtype.kind in "iu":
            kind = "count"
        elif name.startswith("loss/"):
            kind = "loss"
        elif name == "optimizer/gradient_norm":
            kind = "norm"
        one, other = (np.asarray(x[name], np.float64) for x in (expected, actual))
        note = f"{one:.6g} and {other:.6g}" if one.ndim == 0 else ""
        rows.append(Row(name, relative(one, other, floor=1e-3), TOLERANCES[kind], note))
    rows += [
        Row(name, float("nan"), 0.0, "is missing on one device")
        for name in actual
        if name not in expected
    ]
    return rows


def gradients(expected: Any, actual: Any) -> list[Row]:
    """Compares the gradient of each array with that array's largest entry.

    An array whose gradient is zero but for rounding is measured by the others.
    """
    largest = [float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected)]
    floor = _FLOOR * float(np.median([size for size in largest if size > 0] or [1.0]))
    rows = []
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(expected),
        jax.tree.leaves(actual),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        note = ""
        if np.max(np.abs(one)) < floor:
            note = "is zero but for rounding; measured by the other gradients"
        difference = relative(one, other, floor=floor)
        rows.append(Row(f"gradient {name}", difference, TOLERANCES["gradient"], note))
    return rows


def _descent(expected: Step, actual: Step, start: Start) -> Row:
    """Parameters after a clipped step of gradient descent: the worst array."""
    found = []
    for (path, one), other, before in zip(
        jax.tree_util.tree_leaves_with_path(expected.descended),
        jax.tree.leaves(actual.descended),
        jax.tree.leaves(start.params),
        strict=True,
    ):
        scale = float(np.max(np.abs(one - before)))
        found.append((relative(one, other, floor=scale), path))
    return _worst("parameters after gradient descent, clipped", found, "descent")


def _own(expected: Step, actual: Step) -> Row:
    """Parameters after the run's own optimizer, in learning rates: the worst array.

    The first step of Adam is a sign, and that of noise is noise: entries of the
    gradient that rounding may have turned are left out.
    """
    rate = float(expected.metrics["optimizer/learning_rate"])
    found, left_out, total = [], 0, 0
    for (path, one), other, g, other_g in zip(
        jax.tree_util.tree_leaves_with_path(expected.params),
        jax.tree.leaves(actual.params),
        jax.tree.leaves(expected.gradient),
        jax.tree.leaves(actual.gradient),
        strict=True,
    ):
        largest = max(
            np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected.gradient)
        )
        least = max(_SIGNLESS * np.max(np.abs(g)), _SIGNLESS_AMONG_ALL * largest)
        certain = np.abs(g) >= least
        certain |= (g == 0) & (other_g == 0)
        left_out, total = left_out + np.sum(~certain), total + g.size
        apart = np.where(certain, np.abs(one.astype(np.float64) - other), 0.0)
        found.append((float(np.max(apart)) / rate, path))
    row = _worst("parameters after the own optimizer", found, "optimizer")
    note = (
        f"{row.note}; of the learning rate; {left_out:,} of {total:,} entries have a "
    )
    return dataclasses.replace(row, note=note + "gradient too small to have a sign")


def _worst(quantity: str, found: list[tuple[float, Any]], kind: str) -> Row:
    """The row of the largest difference, which names its array."""
    # Not a number counts as the largest.
    difference, path = max(found, key=lambda pair: (pair[0] != pair[0], pair[0]))
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return Row(quantity, difference, TOLERANCES[kind], f"worst: {name}")


def ledger(metrics: Mapping[str, np.ndarray]) -> Row:
    """Whether every choice of the mesh's step is accounted for."""
    name = "ledger closes: routed = computed + dropped + padding"
    if "ledger/routed_choices" not in metrics:
        return Row(name, 0.0, 0.0, "no experts")
    routed, computed, dropped, padding = (
        np.asarray(metrics[f"ledger/{kind}_choices"], np.int64)
        for kind in ("routed", "computed", "dropped", "padding")
    )
    apart = np.max(np.abs(routed - computed - dropped - padding))
    share = dropped.sum() / max(routed.sum() - padding.sum(), 1)
    return Row(name, float(apart), 0.0, f"{share:.1%} of choices were dropped")


def decisions(expected: Decisions, actual: Decisions, num_selected: int) -> list[Row]:
    """Compares logits, and counts the choices that another mesh made otherwise."""
    rows = [
        Row(
            "logits of the model",
            relative(expected.logits_BLV, actual.logits_BLV),
            TOLERANCES["logits"],
        )
    ]
    if not expected.routers:
        return rows
    pairs = list(zip(expected.routers, actual.routers, strict=True))
    off = max(relative(one.logits_GSE, other.logits_GSE) for one, other in pairs)
    rows.append(Row("logits of the routers", off, TOLERANCES["logits"]))
    flips, margins, number = 0, [], 0
    for one, other in pairs:
        flipped = one.slot_of_choice_GSJ != other.slot_of_choice_GSJ
        number += flipped.size
        flips += int(flipped.sum())
        ranked = -np.sort(-np.asarray(one.logits_GSE), axis=-1)
        K = min(num_selected, ranked.shape[-1] - 1)
        margin = ranked[..., K - 1] - ranked[..., K]
        margins += [*margin[flipped.any(axis=-1)]]
    note = f"of {number:,}"
    if margins:
        note += f"; least margin of their logits {min(margins):.2g}"
    row = Row("choices that flipped", float(flips), TOLERANCES["count"], note)
    return [*rows, row]


def evaluations(expected: Evaluation, actual: Evaluation, what: str) -> list[Row]:
    """Compares scores of a batch; the worst of their sums, and the nats of targets."""
    # Of padding there may be more, and a device's rows are its own.
    mine = [
        name for name in expected.sums if "padding" not in name and "excess" not in name
    ]
    apart = [(relative(expected.sums[n], actual.sums[n], floor=1.0), n) for n in mine]
    difference, name = max(apart, key=lambda pair: (pair[0] != pair[0], pair[0]))
    L = min(expected.nats_BL.shape[1], actual.nats_BL.shape[1])
    nats = relative(expected.nats_BL[:, :L], actual.nats_BL[:, :L])
    return [
        Row(f"{what}: sums", difference, TOLERANCES["metric"], f"worst: {name}"),
        Row(f"{what}: nats of each target", nats, TOLERANCES["metric"]),
    ]


def collapsed(rows: list[Row], quantity: str) -> Row:
    """Makes one row of many: the one that is furthest beyond its tolerance."""

    def excess(row: Row) -> float:
        if row.difference != row.difference:
            return float("inf")
        return row.difference / max(row.tolerance, 1e-12)

    worst = max(rows, key=excess)
    return Row(quantity, worst.difference, worst.tolerance, f"worst: {worst.quantity}")


def relative(expected: Any, actual: Any, floor: float = 1e-30) -> float:
    """The largest difference, relative to the largest entry expected."""
    one, other = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if one.shape != other.shape:
        return float("nan")
    if one.size == 0:
        return 0.0
    scale = max(float(np.max(np.abs(one))), floor)
    return float(np.max(np.abs(one - other))) / scale
