"""Embedding and scores on pieces of two tables, compared with whole ones in NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe.model.embedding import look_up
from moe.model.execution import Execution
from moe.model.head import Head, score_targets
from moe.settings import ExecutionSettings
from partitioning import rules
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings, PartitionSettings

B, L, M, V = 8, 8, 8, 24
# Sizes of data, context, expert and model; what is cut beside the batch; pieces of V.
GRIDS = {
    "alone": ((1, 1, 1, 1), {}, 1),
    "alone_in_pieces": ((1, 1, 1, 1), {}, 3),
    "model": ((2, 1, 1, 4), {}, 1),
    "model_whole_sequence": ((2, 1, 1, 4), {"sequence_parallel": False}, 2),
    "fsdp": ((2, 2, 2, 1), {"fsdp": "data_expert"}, 1),
    "fsdp_model": ((2, 2, 1, 2), {"fsdp": "data"}, 3),
    "expert_model": (
        (2, 1, 2, 2),
        {"fsdp": "data_expert", "sequence_parallel": False},
        1,
    ),
}
CAPS = {"fsdp_model": 6.0}  # of logits up to 9; 0 elsewhere
FAST = ("alone_in_pieces", "fsdp_model", "expert_model")
CASES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in GRIDS
]


def execution_of(name: str) -> Execution:
    (data, context, expert, model), partition, chunks = GRIDS[name]
    mesh = MeshSettings(data=data, context=context, expert=expert, model=model)
    settings = ExecutionSettings(dtype="float32", vocab_chunks=chunks)
    return Execution(settings, make_mesh(mesh), PartitionSettings(**partition))


@functools.cache
def problem() -> dict[str, np.ndarray]:
    """Tables of small whole numbers, of which many logits are equal."""
    rng = np.random.default_rng(0)
    problem = {
        "table": rng.integers(-2, 3, (V, M)).astype(np.float32),
        "x": rng.integers(-1, 2, (B, L, M)).astype(np.float32),
        "id": rng.integers(0, V, (B, L)).astype(np.int32),
        "d_embedded": rng.normal(size=(B, L, M)).astype(np.float32),
        "d_log_z": rng.normal(size=(B, L)).astype(np.float32),
        "d_target_logit": rng.normal(size=(B, L)).astype(np.float32),
    }
    problem["x"][0, 0] = 0  # all logits are 0: the first id of all is the likeliest
    return problem


def expected(cap: float) -> dict[str, np.ndarray]:
    """By one token at a time, in float64."""
    p = {name: array.astype(np.float64) for name, array in problem().items()}
    id_BL = problem()["id"]
    found = {name: np.zeros((B, L)) for name in ("log_z", "target_logit", "likeliest")}
    found |= {name: np.zeros((V, M)) for name in ("d_table", "d_head")}
    found |= {"embedded": np.zeros((B, L, M)), "d_x": np.zeros((B, L, M))}
    for at in np.ndindex(B, L):
        x_M, target = p["x"][at], id_BL[at]
        found["embedded"][at] = p["table"][target]
        found["d_table"][target] += p["d_embedded"][at]
        logits_V = p["table"] @ x_M
        slope_V = np.ones(V)
        if cap:
            logits_V = cap * np.tanh(logits_V / cap)
            slope_V = 1 - (logits_V / cap) ** 2
        exponent_V = np.exp(logits_V)
        found["log_z"][at] = np.log(exponent_V.sum())
        found["target_logit"][at] = logits_V[target]
        found["likeliest"][at] = np.flatnonzero(logits_V == logits_V.max())[0]
        d_logits_V = p["d_log_z"][at] * exponent_V / exponent_V.sum()
        d_logits_V[target] += p["d_target_logit"][at]
        d_logits_V *= slope_V
        found["d_x"][at] = d_logits_V @ p["table"]
        found["d_head"] += np.outer(d_logits_V, x_M)
    return found


def on_grid(name: str) -> dict[str, np.ndarray]:
    execution = execution_of(name)
    grid = execution.grid
    table = rules.table(grid.partition)
    tokens = rules.spec(["batch", "length"])
    stream = rules.spec(["batch", "piece" if grid.cuts_sequence else "length"])

    embed = grid.run(
        lambda table, id_BL: look_up(table, id_BL, execution),
        in_specs=(rules.spec(["vocab", "embed"], table), tokens),
        out_specs=stream,
    )
    scored = grid.run(
        lambda head, x_BLM, target: score_targets(
            Head(head, None, cap=CAPS.get(name, 0.0)), x_BLM, target, execution
        ),
        in_specs=(rules.spec(["embed", "vocab"], table), tokens, tokens),
        out_specs=tokens,
    )

    def objective(table_VM, head_VM, x_BLM):
        p = problem()
        embedded_BLM = embed(table_VM, p["id"])
        scores = scored(head_VM.T, x_BLM, p["id"])
        value = jnp.sum(embedded_BLM * p["d_embedded"])
        value += jnp.sum(scores.log_z_BL * p["d_log_z"])
        value += jnp.sum(scores.target_logit_BL * p["d_target_logit"])
        return value, (embedded_BLM, scores)

    run = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))
    p = problem()
    (d_table, d_head, d_x), (embedded, scores) = jax.device_get(
        run(p["table"], p["table"], p["x"])
    )
    return {
        "embedded": embedded,
        "log_z": scores.log_z_BL,
        "target_logit": scores.target_logit_BL,
        "likeliest": scores.likeliest_BL,
        "d_table": d_table,
        "d_head": d_head,
        "d_x": d_x,
    }


@pytest.mark.parametrize("name", CASES)
def test_pieces_of_tables_embed_and_score_as_whole_ones_do(name):
    actual, wanted = on_grid(name), expected(CAPS.get(name, 0.0))
    assert actual.keys() == wanted.keys()
    for quantity, array in wanted.items():
        np.testing.assert_allclose(
            actual[quantity], array, rtol=1e-5, atol=2e-5, err_msg=quantity
        )


@pytest.mark.fast
def test_equal_largest_logits_lie_in_several_pieces_and_on_several_devices():
    # What the test above is worth: ties between the pieces of every cut of V in use.
    p = problem()
    logits_BLV = p["x"] @ p["table"].T
    is_most_BLV = logits_BLV == logits_BLV.max(axis=-1, keepdims=True)
    for cuts in {GRIDS[name][0][3] * GRIDS[name][2] for name in GRIDS} - {1}:
        in_piece = is_most_BLV.reshape(B, L, cuts, -1).any(axis=-1)
        assert np.sum(in_piece.sum(axis=-1) > 1) >= 5


def test_a_table_that_is_cut_is_never_whole():
    execution = execution_of("fsdp")
    grid = execution.grid
    spec = rules.spec(["vocab", "embed"], rules.table(grid.partition))
    tokens = rules.spec(["batch", "length"])
    embed = grid.run(
        lambda table, id_BL: look_up(table, id_BL, execution),
        in_specs=(spec, tokens),
        out_specs=tokens,
    )
    run = jax.jit(
        jax.grad(lambda table, id_BL: jnp.sum(embed(table, id_BL) ** 2)),
        in_shardings=[NamedSharding(grid.mesh, cut) for cut in (spec, tokens)],
        out_shardings=NamedSharding(grid.mesh, spec),
    )
    text = run.lower(problem()["table"], problem()["id"]).compile().as_text()
    assert f"f32[{V},{M // 8}]" in text
    assert f"f32[{V},{M}]" not in text
    # Forward and backward; the ids are gathered.
    assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == 2
    gathered = re.findall(r"= (\w+)\[.* all-gather(?:-start)?\(", text)
    assert gathered
    assert set(gathered) == {"s32"}
