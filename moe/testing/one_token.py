"""The oracle of a sparse layer: one token and one expert at a time, in float64."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from moe.settings import RouterSettings
from moe.testing.decisions import (
    Decision,
    Told,
    decide,
    held_gates,
    probabilities,
    router_sums,
    slope,
    z_loss,
)

Weights = Mapping[str, np.ndarray]


@dataclasses.dataclass
class OracleResult:
    """What the oracle computed.

    Attributes:
        y_GSM: outputs.
        d_x_GSM: gradient of the objective with respect to the inputs.
        d_router_ME: with respect to the router; zero for a hash router.
        d_router_bias_E: gradient with respect to the bias of its logits.
        d_experts: with respect to the arrays of the experts, by name.
        sums: router sums, by name without suffix, each [G] or [G, E], where G counts
            the rows of each group.
        decisions: one per group.
    """

    y_GSM: np.ndarray
    d_x_GSM: np.ndarray
    d_router_ME: np.ndarray
    d_router_bias_E: np.ndarray
    d_experts: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]
    decisions: list[Decision]


def one_token_at_a_time(
    x_GSM: np.ndarray,
    router_ME: np.ndarray,
    experts: Weights,
    told_G: Sequence[Told],
    settings: RouterSettings,
    capacity: int,
    *,
    activation: str = "relu",
    router_bias_E: np.ndarray | None = None,
    d_y_GSM: np.ndarray,
    d_probability_GE: np.ndarray,
    d_z: float,
) -> OracleResult:
    """Computes a sparse layer in loops that can be believed at sight.

    The objective whose gradients are returned is
    Σ y·d_y + Σ probability·d_probability + d_z·Σ z.

    Args:
        x_GSM: inputs, in groups.
        router_ME: zeros for a hash router.
        experts: "up" [E, M, F], or [E, M, 2, F] if gated, "down" [E, F, M], and maybe
            "up_bias" and "down_bias".
        told_G: mask, and what else the router knows, of each group.
        settings: options of the router.
        capacity: C, slots per expert per group.
        activation: nonlinearity of the experts.
        router_bias_E: bias of the logits; None without.
        d_y_GSM: weights of the outputs in the objective.
        d_probability_GE: weights of the summed probabilities, likewise.
        d_z: weight of the summed z, likewise.
    """
    G, S, _ = x_GSM.shape
    x_GSM, router_ME = x_GSM.astype(np.float64), router_ME.astype(np.float64)
    experts = {name: array.astype(np.float64) for name, array in experts.items()}
    d_y_GSM = d_y_GSM.astype(np.float64)
    logits_GSE = x_GSM @ router_ME
    if router_bias_E is not None:
        logits_GSE = logits_GSE + router_bias_E.astype(np.float64)
    decisions = [decide(logits_GSE[g], told_G[g], settings, capacity) for g in range(G)]
    sums_G = [
        router_sums(logits_GSE[g], told_G[g], decisions[g], settings, row)
        for g in range(G)
        for row in range(settings.group_rows)
    ]
    out = OracleResult(
        y_GSM=np.zeros_like(x_GSM),
        d_x_GSM=np.zeros_like(x_GSM),
        d_router_ME=np.zeros_like(router_ME),
        d_router_bias_E=np.zeros(router_ME.shape[1]),
        d_experts={name: np.zeros_like(array) for name, array in experts.items()},
        sums={name: np.array([sums[name] for sums in sums_G]) for name in sums_G[0]},
        decisions=decisions,
    )
    tokens = [(g, s) for g in range(G) for s in range(S) if told_G[g].mask_S[s]]
    for g, s in tokens:
        picked, held = decisions[g].picked[s], decisions[g].held(s)
        gates = held_gates(logits_GSE[g, s], picked, held, settings)
        d_gates = {}
        for j, e in held.items():
            of_expert = {name: array[e] for name, array in experts.items()}
            # A gate multiplies what the expert is given, or what it makes of it.
            inward = gates[j] if settings.gate_place == "input" else 1.0
            outward = gates[j] / inward
            y_M, d_x_M, d_expert = one_expert(
                of_expert, inward * x_GSM[g, s], outward * d_y_GSM[g, s], activation
            )
            out.y_GSM[g, s] += outward * y_M
            out.d_x_GSM[g, s] += inward * d_x_M
            for name, d_array in d_expert.items():
                out.d_experts[name][e] += d_array
            d_gates[j] = float(
                x_GSM[g, s] @ d_x_M
                if settings.gate_place == "input"
                else d_y_GSM[g, s] @ y_M
            )

        d_logits_E = d_logits(
            logits_GSE[g, s],
            (picked, held),
            settings,
            d_gates=d_gates,
            d_probability_E=d_probability_GE[g],
            d_z=d_z,
        )
        out.d_router_ME += np.outer(x_GSM[g, s], d_logits_E)
        out.d_router_bias_E += d_logits_E
        out.d_x_GSM[g, s] += router_ME @ d_logits_E
    return out


def d_logits(
    logits_E: np.ndarray,
    decided: tuple[list[int], dict[int, int]],
    settings: RouterSettings,
    *,
    d_gates: Mapping[int, float],
    d_probability_E: np.ndarray,
    d_z: float,
) -> np.ndarray:
    """Gradient of Σ gate·d_gate + Σ probability·d_probability + d_z·z of one token.

    What was decided, the experts picked and those held, stays as it is.
    """
    picked, held = decided
    d_probability_E = np.asarray(d_probability_E, np.float64)

    def objective(logits_E: np.ndarray) -> float:
        gates = held_gates(logits_E, picked, held, settings)
        value = sum(float(d_gates[j]) * gate for j, gate in gates.items())
        value += float(probabilities(logits_E, settings) @ d_probability_E)
        if settings.reads_logits:
            value += d_z * z_loss(logits_E, settings)
        return value

    return slope(objective, np.asarray(logits_E, np.float64))


def one_expert(
    w: Weights, x_M: np.ndarray, d_y_M: np.ndarray, activation: str
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """A feed-forward of one token: y, and the gradients of y·d_y.

    Returns:
        y_M, d_x_M, and the gradient of each array.
    """
    up_MIF = w["up"].reshape(len(x_M), -1, w["up"].shape[-1])  # I is 2 if gated
    before_IF = np.einsum("M,MIF->IF", x_M, up_MIF)
    if "up_bias" in w:
        before_IF = before_IF + w["up_bias"].reshape(before_IF.shape)
    hidden_F = _activate(before_IF, activation)
    y_M = hidden_F @ w["down"]
    if "down_bias" in w:
        y_M = y_M + w["down_bias"]

    d_hidden_F = w["down"] @ d_y_M
    d_before_IF = np.zeros_like(before_IF)
    for i in range(len(before_IF)):  # elementwise, so that all F move at once
        step_IF = np.zeros_like(before_IF)
        step_IF[i] = 1e-5
        rise_F = _activate(before_IF + step_IF, activation) - _activate(
            before_IF - step_IF, activation
        )
        d_before_IF[i] = d_hidden_F * rise_F / 2e-5
    d_up = np.einsum("M,IF->MIF", x_M, d_before_IF).reshape(w["up"].shape)
    d_w = {"up": d_up, "down": np.outer(hidden_F, d_y_M)}
    if "up_bias" in w:
        d_w["up_bias"] = d_before_IF.reshape(w["up_bias"].shape)
    if "down_bias" in w:
        d_w["down_bias"] = d_y_M
    return y_M, np.einsum("MIF,IF->M", up_MIF, d_before_IF), d_w


def _activate(before_IF: np.ndarray, activation: str) -> np.ndarray:
    """Hidden activations; gated ones take the second row times f of the first."""
    first_F = before_IF[0]
    if activation.startswith("relu"):
        return np.maximum(first_F, 0) ** (2 if activation == "relu_squared" else 1)
    if activation == "swiglu_clamped":
        gate_F, linear_F = np.minimum(first_F, 7), np.clip(before_IF[1], -7, 7)
        return gate_F / (1 + np.exp(-1.702 * gate_F)) * (linear_F + 1)
    if activation == "swiglu":
        return first_F / (1 + np.exp(-first_F)) * before_IF[1]
    # gelu by its usual tanh, as in jax.nn.gelu
    inner_F = math.sqrt(2 / math.pi) * (first_F + 0.044715 * first_F**3)
    gelu_F = 0.5 * first_F * (1 + np.tanh(inner_F))
    return gelu_F * before_IF[1] if activation == "geglu" else gelu_F
