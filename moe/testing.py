"""What a test of a router or a transport needs: meshes, an oracle, contract checks.

Importable by users who write their own router. The oracle walks one token at a time in
plain NumPy, in float64, with its gradients written out by hand.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from moe.routing.assignment import Assignment
from moe.settings import RouterSettings
from partitioning.settings import MeshSettings

MESHES: Mapping[str, MeshSettings] = {
    "d1": MeshSettings(),
    "d8": MeshSettings(data=8),
    "e8": MeshSettings(expert=8),
    "d2e4": MeshSettings(data=2, expert=4),
    "d4e2": MeshSettings(data=4, expert=2),
}


@dataclasses.dataclass
class OracleResult:
    """What the oracle computed: outputs, gradients of the objective, and counts."""

    y_GSM: np.ndarray
    d_x_GSM: np.ndarray
    d_router_ME: np.ndarray
    d_up_EMF: np.ndarray
    d_down_EFM: np.ndarray
    probability_GE: np.ndarray
    z_G: np.ndarray
    chosen_GE: np.ndarray
    kept_GE: np.ndarray
    padding_G: np.ndarray


def one_token_at_a_time(
    x_GSM: np.ndarray,
    mask_GS: np.ndarray,
    router_ME: np.ndarray,
    up_EMF: np.ndarray,
    down_EFM: np.ndarray,
    settings: RouterSettings,
    capacity: int,
    *,
    d_y_GSM: np.ndarray,
    d_probability_GE: np.ndarray,
    d_z: float,
) -> OracleResult:
    """A sparse layer with ReLU experts, in loops that can be believed at sight.

    The objective whose gradients are returned is
    Σ y·d_y + Σ probability·d_probability + d_z·Σ z.
    """
    G, S, M = x_GSM.shape
    E, K = router_ME.shape[1], settings.num_selected
    x_GSM, router_ME = x_GSM.astype(np.float64), router_ME.astype(np.float64)
    up_EMF, down_EFM = up_EMF.astype(np.float64), down_EFM.astype(np.float64)
    out = OracleResult(
        y_GSM=np.zeros((G, S, M)),
        d_x_GSM=np.zeros((G, S, M)),
        d_router_ME=np.zeros((M, E)),
        d_up_EMF=np.zeros_like(up_EMF),
        d_down_EFM=np.zeros_like(down_EFM),
        probability_GE=np.zeros((G, E)),
        z_G=np.zeros(G),
        chosen_GE=np.zeros((G, E), int),
        kept_GE=np.zeros((G, E), int),
        padding_G=K * np.sum(~mask_GS, axis=1),
    )
    for g in range(G):
        probability = {}
        choices = {}
        for s in range(S):
            if mask_GS[g, s]:
                logits = x_GSM[g, s] @ router_ME
                exponent = np.exp(logits - logits.max())
                probability[s] = exponent / exponent.sum()
                choices[s] = sorted(range(E), key=lambda e: (-probability[s][e], e))[:K]

        kept = set()
        for s, k in _arrivals(choices, K, settings.slot_order):
            e = choices[s][k]
            out.chosen_GE[g, e] += 1
            if out.kept_GE[g, e] < capacity:
                out.kept_GE[g, e] += 1
                kept.add((s, k))

        for s, p in probability.items():
            out.probability_GE[g] += p
            gates = [
                p[e] / (sum(p[i] for i in choices[s]) if settings.renormalize else 1.0)
                for e in choices[s]
            ]
            d_gates = np.zeros(K)
            for k, e in enumerate(choices[s]):
                if (s, k) in kept:
                    d_gates[k] = _one_expert(
                        out, (g, s, e), x_GSM, up_EMF, down_EFM, gates[k], d_y_GSM[g, s]
                    )

            d_p = d_probability_GE[g] + _through_gates(
                p, choices[s], gates, d_gates, settings.renormalize
            )
            log_z = np.log(np.sum(np.exp(x_GSM[g, s] @ router_ME)))
            out.z_G[g] += log_z**2
            d_logits = p * (d_p - p @ d_p) + d_z * 2 * log_z * p
            out.d_router_ME += np.outer(x_GSM[g, s], d_logits)
            out.d_x_GSM[g, s] += router_ME @ d_logits
    return out


def _one_expert(
    out: OracleResult,
    place: tuple[int, int, int],
    x_GSM: np.ndarray,
    up_EMF: np.ndarray,
    down_EFM: np.ndarray,
    gate: float,
    d_y: np.ndarray,
) -> float:
    """Adds one expert's share of one token; returns the gradient of its gate."""
    g, s, e = place
    before = x_GSM[g, s] @ up_EMF[e]
    hidden = np.maximum(before, 0)
    y = hidden @ down_EFM[e]
    out.y_GSM[g, s] += gate * y
    d_hidden = gate * (down_EFM[e] @ d_y) * (before > 0)
    out.d_down_EFM[e] += gate * np.outer(hidden, d_y)
    out.d_up_EMF[e] += np.outer(x_GSM[g, s], d_hidden)
    out.d_x_GSM[g, s] += up_EMF[e] @ d_hidden
    return float(d_y @ y)


def _through_gates(
    p: np.ndarray,
    chosen: list[int],
    gates: list[float],
    d_gates: np.ndarray,
    renormalize: bool,
) -> np.ndarray:
    """Gradient of the probabilities from that of the gates, gate = p / mass."""
    d_p = np.zeros_like(p)
    for e, gate, d_gate in zip(chosen, gates, d_gates, strict=True):
        mass = p[e] / gate
        d_p[e] += d_gate / mass
        if renormalize:
            for other in chosen:
                d_p[other] -= d_gate * p[e] / mass**2
    return d_p


def _arrivals(
    choices: Mapping[int, list[int]], num_selected: int, slot_order: str
) -> list[tuple[int, int]]:
    """Pairs (token, choice number) in the order in which slots are given out."""
    pairs = [(s, k) for s in sorted(choices) for k in range(num_selected)]
    if slot_order == "choice_major":
        pairs.sort(key=lambda pair: pair[::-1])
    return pairs


def check_assignment(assignment: Assignment, mask_GS: np.ndarray) -> None:
    """Asserts what every router must keep to.

    The two maps invert each other, padding holds no slot, no gate is negative, and the
    ledger closes in every group.
    """
    choice_of_slot = np.asarray(assignment.choice_of_slot_GEC)
    slot_of_choice = np.asarray(assignment.slot_of_choice_GSJ)
    G, _, C = choice_of_slot.shape
    J = slot_of_choice.shape[-1]
    assert choice_of_slot.dtype == slot_of_choice.dtype == np.int32
    assert assignment.gate_GSJ.dtype == np.float32
    assert np.all(np.asarray(assignment.gate_GSJ) >= 0)
    for g in range(G):
        from_slots = {
            (choice, slot)
            for slot, choice in enumerate(choice_of_slot[g].reshape(-1))
            if choice >= 0
        }
        from_choices = {
            (choice, slot)
            for choice, slot in enumerate(slot_of_choice[g].reshape(-1))
            if slot >= 0
        }
        assert from_slots == from_choices, f"the maps of group {g} do not invert"
        assert np.all(slot_of_choice[g][~mask_GS[g]] == -1), "padding holds a slot"
    sums = jax.tree.map(np.asarray, assignment.sums)
    np.testing.assert_array_equal(
        sums.kept_GE, np.sum(choice_of_slot >= 0, axis=2), "kept_GE"
    )
    assert np.all(sums.kept_GE <= np.minimum(sums.chosen_GE, C))
    np.testing.assert_array_equal(sums.tokens_G, mask_GS.sum(axis=1))
    np.testing.assert_array_equal(sums.padding_G, J * (~mask_GS).sum(axis=1))
