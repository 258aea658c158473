"""The sparse layer: route, dispatch, experts, combine, on each device of a mesh.

The three parts never see each other: a router returns an Assignment, a transport moves
tokens by it, experts see rows.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe.model.exchange import exchange_of
from moe.model.execution import Execution
from moe.model.feed_forward import dense, experts
from moe.model.parameters import Spec, matrix, vector
from moe.model.products import product
from moe.model.rounds import in_rounds
from moe.model.view import Routed, View
from moe.routing import hashed
from moe.routing.assignment import Assignment, RouterContext, RouterSums, Trace
from moe.routing.capacity import capacity
from moe.routing.logits import Keys, group_keys, logits_of
from moe.settings import RouterSettings, SparseSettings

ROUTER_STDDEV = 0.02

Weights = dict[str, Any]


def specs(s: SparseSettings, width: int) -> dict[str, Any]:
    """Describes the router, the experts, and the expert that all tokens visit."""
    M, E = width, s.num_experts
    found: dict[str, Any] = {"experts": experts.specs(s.experts, E, M)}
    if s.router.reads_logits:
        axes = ("embed", "routed")
        found["router"] = Spec((M, E), axes, (0,), (1,), stddev=ROUTER_STDDEV)
        if s.router.logit_bias:
            found["router_bias"] = vector((E,), ("routed",))
    if s.router.selection_bias:
        # Moved by loads after each step, by less than bfloat16 can tell.
        bias = vector((E,), ("routed",))
        found["selection_bias"] = dataclasses.replace(
            bias, dtype="float32", per_layer=True
        )
    if s.shared is not None:
        found["shared"] = dense.specs(s.shared, M)
        if s.shared_gate:
            axes, scale = ("embed", "routed"), s.shared.init_scale  # as a router's
            found["shared_gate"] = matrix((M, 1), axes, (0,), (1,), scale)
    return found


def memory(s: SparseSettings) -> dict[str, Spec]:
    """Nothing is kept of tokens that came before."""
    del s
    return {}


def apply(
    w: Weights,
    x_BLM: jax.Array,
    view: View,
    memory: None,
    s: SparseSettings,
    key: jax.Array | None,
    number: jax.Array,
    execution: Execution,
) -> tuple[jax.Array, None, RouterSums]:
    """Sends every token through the experts that its router picks.

    Args:
        w: weights, as `specs` describes; of the experts, this device's.
        x_BLM: this device's cut of the residual stream, normalised.
        view: what routers are told of the tokens.
        memory: None; experts remember nothing.
        s: record of the layer.
        key: PRNG key of this sublayer and step; None outside training.
        number: the layer's number, for hash routing.
        execution: transport, row budget and mesh.
    Returns:
        y_BLM, zero for dropped tokens but for what a shared expert adds; None; and the
        router's sums per group.
    """
    grid = execution.grid
    # Where the activations are whole on all of `model`, each device routes a piece.
    cut_here = not (
        execution.tokens_replicated or grid.cuts_sequence or grid.size("model") == 1
    )
    if cut_here:
        x_BLM = grid.piece(x_BLM, ["model"], 1)
    y_BLM, sums = sparse_layer(w, x_BLM, view.routed, key, number, s, execution)
    return grid.gather(y_BLM, ["model"], 1) if cut_here else y_BLM, None, sums


def sparse_layer(
    w: Weights,
    x_BLM: jax.Array,
    routed: Routed,
    key: jax.Array | None,
    number: jax.Array | int,
    s: SparseSettings,
    execution: Execution,
) -> tuple[jax.Array, RouterSums]:
    """What one device does: its pieces of sequences, its experts; see `apply`.

    A group is the same cut of `group_rows` consecutive sequences, `group_size` tokens
    in all: the same set of tokens on every mesh.
    """
    B, L, M = x_BLM.shape
    router, grid = s.router, execution.grid
    rows, length = router.group_rows, router.group_length
    cuts = () if execution.tokens_replicated else ("context", "model")
    here = L // length  # groups of this device's pieces of the same rows
    first = grid.index(*cuts) * here + jnp.arange(here)
    block_B = routed.row_B[::rows] // rows
    group_BG = block_B[:, None] * (grid.size(*cuts) * here) + first

    def grouped(x_BL: jax.Array) -> jax.Array:
        x_BrGL = x_BL.reshape(B // rows, rows, here, length, *x_BL.shape[2:])
        return x_BrGL.swapaxes(1, 2).reshape(-1, router.group_size, *x_BL.shape[2:])

    x_GSM, mask_GS = grouped(x_BLM), grouped(routed.mask_BL)
    keys = None if key is None else group_keys(key, group_BG.reshape(-1))
    assignment = route(w, x_GSM, mask_GS, grouped(routed.id_BL), keys, number, s)
    y_GSM, sums = _compute(w["experts"], x_GSM, assignment, keys, s, execution)
    if execution.traces_routers:
        sums = dataclasses.replace(sums, trace=assignment.trace)
    y_BGrLM = y_GSM.reshape(B // rows, here, rows, length, M)
    y_BLM = y_BGrLM.swapaxes(1, 2).reshape(B, L, M)
    if s.shared is not None:
        shared_BLM = _shared(w["shared"], x_BLM, s.shared.activation, execution)
        if s.shared_gate:
            logit_BL1 = product(x_BLM, w["shared_gate"], result=jnp.float32)
            shared_BLM *= jax.nn.sigmoid(logit_BL1).astype(x_BLM.dtype)
        y_BLM += shared_BLM
    return y_BLM, sums


def route(
    w: Weights,
    x_GSM: jax.Array,
    mask_GS: jax.Array,
    id_GS: jax.Array,
    keys: Keys | None,
    number: jax.Array | int,
    s: SparseSettings,
) -> Assignment:
    """Forms logits, and has the router choose by them, or by the tokens' ids."""
    context = RouterContext(
        mask_GS=mask_GS,
        key_G=None if keys is None else keys["route"],
        bias_E=w.get("selection_bias"),
        token_GS=id_GS,
    )
    if s.router.family == "hashed":
        order_V = hashed.vocabulary_order(
            s.router.hash_seed, jnp.asarray(number), s.vocab_size
        )
        context = dataclasses.replace(context, order_V=order_V)
    logits_GSE = jnp.zeros((*mask_GS.shape, s.num_experts))
    if s.router.reads_logits:
        logits_GSE, clean_GSE = logits_of(x_GSM, w, keys, s.router)
        context = dataclasses.replace(context, clean_logits_GSE=clean_GSE)
    slots = capacity(s.router, s.num_experts, train=keys is not None)
    assignment = route_of(s.router)(
        logits_GSE, context, s.router, capacity=slots, **s.router.options
    )
    trace = Trace(logits_GSE, assignment.slot_of_choice_GSJ)
    return dataclasses.replace(assignment, trace=trace)


def route_of(router: RouterSettings) -> Callable[..., Assignment]:
    """Returns the function of a router: the user's own, or `route` of its file."""
    if router.own is not None:
        return router.own.route
    return importlib.import_module(f"moe.routing.{router.family}").route


def _compute(
    w: Weights,
    x_GSM: jax.Array,
    assignment: Assignment,
    keys: Keys | None,
    s: SparseSettings,
    execution: Execution,
) -> tuple[jax.Array, RouterSums]:
    """Dispatch, experts, combine."""
    G, S, M = x_GSM.shape
    sums = assignment.sums
    transport, _, room = exchange_of(s, execution, G * S, train=keys is not None)
    drawn = keys is not None and s.dropout > 0
    dropout_G = keys["dropout"] if keys is not None and drawn else None
    gates_inputs = s.router.gate_place == "input"
    if gates_inputs:
        x_GSM, assignment = _gated(x_GSM, assignment)

    def one_round(
        x_GSM: jax.Array, first_row: jax.Array | int
    ) -> tuple[jax.Array, jax.Array]:
        rows, size_e, plan = transport.dispatch(x_GSM, assignment, room, first_row)
        rows = experts.compute(w, rows, size_e, dropout_G, room, s, execution)
        y_GSM = transport.combine(rows, assignment, plan, room)
        if gates_inputs:  # a token's choices are side by side
            y_GSM = jnp.sum(y_GSM.reshape(len(y_GSM), S, -1, M), axis=2)
        return y_GSM, jnp.zeros((), jnp.int32) if plan is None else plan.excess

    if execution.in_rounds and room.num_rounds > 1:
        y_GSM = in_rounds(one_round, x_GSM, assignment, room, execution.grid)
        return transport.finish(y_GSM, room, x_GSM.dtype), sums
    y_GSM, excess = one_round(x_GSM, 0)
    sums = dataclasses.replace(sums, excess_G=sums.excess_G.at[0].set(excess))
    return transport.finish(y_GSM, room, x_GSM.dtype), sums


def _gated(x_GSM: jax.Array, assignment: Assignment) -> tuple[jax.Array, Assignment]:
    """Makes of each choice a token of its own, its gate times what it was.

    Choices keep their numbers, s·J + j, so both maps stay as they are; and a transport
    that multiplies outputs has nothing to multiply by.

    Returns:
        x_GtM, where t counts the S·J choices; and their Assignment, with gates of 1.
    """
    G, _, M = x_GSM.shape
    gated_GSJM = assignment.gate_GSJ[..., None] * x_GSM[:, :, None].astype(jnp.float32)
    slot_Gt1 = assignment.slot_of_choice_GSJ.reshape(G, -1, 1)
    return gated_GSJM.reshape(G, -1, M).astype(x_GSM.dtype), dataclasses.replace(
        assignment,
        slot_of_choice_GSJ=slot_Gt1,
        gate_GSJ=jnp.ones(slot_Gt1.shape, jnp.float32),
    )


def _shared(
    w: Weights, x_BLM: jax.Array, activation: str, execution: Execution
) -> jax.Array:
    """The expert that every token visits: a dense layer, cut over `model`."""
    grid = execution.grid
    if execution.tokens_replicated:
        add_up = functools.partial(grid.sum, axes=["model"])
    else:
        x_BLM = grid.gather(x_BLM, ["model"], 1)
        add_up = functools.partial(grid.scatter_sum, axes=["model"], dim=1)
    return dense.feed_forward(w, x_BLM, activation, add_up)
