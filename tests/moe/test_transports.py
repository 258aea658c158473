"""Each transport alone: there, through experts made of one number, and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe.dispatch import all_to_all, einsum, ragged, ring
from moe.dispatch.room import Room
from moe.routing.assignment import Assignment
from partitioning.settings import BATCH_AXES

G, S, E, C, M = 8, 6, 12, 3, 4
IDLE = (3, 4, 5)  # on four devices, all the experts of one
BY_GROUP = PartitionSpec(BATCH_AXES)


@functools.cache
def problem(J: int):
    """Seats drawn at random; three experts and one group have none."""
    rng = np.random.default_rng(J)
    choice_of_slot_GEC = np.full((G, E, C), -1, np.int32)
    slot_of_choice_GSJ = np.full((G, S, J), -1, np.int32)
    busy = [e for e in range(E) if e not in IDLE]
    for g in range(G):
        taken_E = [0] * E
        for s in range(S) if g != 5 else ():
            # Expert 0 is wanted by all, and soon full.
            experts = [0, *rng.permutation(busy[1:])][:J]
            for j, e in enumerate(experts):
                if taken_E[e] < C and rng.random() < 0.8:
                    choice_of_slot_GEC[g, e, taken_E[e]] = s * J + j
                    slot_of_choice_GSJ[g, s, j] = e * C + taken_E[e]
                    taken_E[e] += 1
    return {
        "choice_of_slot": choice_of_slot_GEC,
        "slot_of_choice": slot_of_choice_GSJ,
        "gate": rng.random((G, S, J)).astype(np.float32),
        "x": rng.normal(size=(G, S, M)).astype(np.float32),
        "d_y": rng.normal(size=(G, S, M)).astype(np.float32),
    }


def expected(p):
    """Expert e computes (e + 1)·x + 1."""
    y_GSM, d_x_GSM = np.zeros_like(p["x"]), np.zeros_like(p["x"])
    d_gate_GSJ = np.zeros_like(p["gate"])
    for g, s, j in zip(*np.nonzero(p["slot_of_choice"] >= 0), strict=True):
        e = p["slot_of_choice"][g, s, j] // C
        of_expert_M = (e + 1) * p["x"][g, s] + 1
        y_GSM[g, s] += p["gate"][g, s, j] * of_expert_M
        d_gate_GSJ[g, s, j] = p["d_y"][g, s] @ of_expert_M
        d_x_GSM[g, s] += p["gate"][g, s, j] * (e + 1) * p["d_y"][g, s]
    return y_GSM, d_x_GSM, d_gate_GSJ


def rows_of_devices(p, data: int, axis_size: int) -> np.ndarray:
    """Rows that come to each device."""
    filled_GE = np.sum(p["choice_of_slot"] >= 0, axis=2)
    filled = filled_GE.reshape(data, G // data, axis_size, E // axis_size)
    return filled.sum(axis=(1, 3)).reshape(-1)


def experts(rows, size_e, axis_size: int):
    """(e + 1)·x + 1, and nonsense in rows past the last expert's."""
    local = E // axis_size
    first = jax.lax.axis_index("expert") * local
    if size_e is None:
        return rows * (1 + first + jnp.arange(local))[:, None, None] + 1
    of_row_R = jnp.searchsorted(
        jnp.cumsum(size_e), jnp.arange(rows.shape[0]), side="right"
    )[:, None]
    return jnp.where(of_row_R < local, rows * (1 + first + of_row_R) + 1, 1e6)


def there_and_back(p, mesh, transport: str, room: Room):
    """y and excess of each round, and the gradients of Σ y·d_y by x and gates."""

    def core(x_gSM, gate_gSJ, choice_of_slot_gEC, slot_of_choice_gSJ):
        assignment = Assignment(choice_of_slot_gEC, slot_of_choice_gSJ, gate_gSJ, None)

        def one_round(y_GSM, first_row):
            rows, size_e, plan = TRANSPORTS[transport].dispatch(
                x_gSM, assignment, room, first_row
            )
            rows = experts(rows, size_e, room.axis_size)
            y_GSM += TRANSPORTS[transport].combine(rows, assignment, plan, room)
            return y_GSM, jnp.zeros((), int) if plan is None else plan.excess

        first_rows = jnp.arange(room.num_rounds) * room.num_rows
        gathered = room.axis_size if transport == "ring" else 1
        start_GSM = jnp.zeros((gathered * len(x_gSM), *x_gSM.shape[1:]))
        y_GSM, excess_N = jax.lax.scan(one_round, start_GSM, first_rows)
        y_gSM = TRANSPORTS[transport].finish(y_GSM, room, x_gSM.dtype)
        return y_gSM, excess_N[None]

    sharded = jax.shard_map(
        core,
        mesh=mesh,
        in_specs=(BY_GROUP,) * 4,
        out_specs=(BY_GROUP, BY_GROUP),
        check_vma=False,
    )

    def objective(x_GSM, gate_GSJ):
        y_GSM, excess_DN = sharded(
            x_GSM, gate_GSJ, p["choice_of_slot"], p["slot_of_choice"]
        )
        return jnp.sum(y_GSM * p["d_y"]), (y_GSM, excess_DN)

    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
        (d_x, d_gate), (y, excess) = jax.device_get(run(p["x"], p["gate"]))
    return y, d_x, d_gate, excess


TRANSPORTS = {
    "all_to_all": all_to_all,
    "einsum": einsum,
    "ring": ring,
    "ragged": ragged,
}
PLACES = {
    # mesh, J, rows, rounds: room for all at once, or for five rows at a time. With ten
    # choices sums over them are loops.
    "one_device": ("d1", 2, G * S * 2, 1),
    "one_round": ("d2e4", 2, 4 * S * 2, 1),
    "many_choices": ("d4e2", 10, 2 * S * 6, 1),
    "many_rounds": ("d2e4", 2, 5, 4),
}
CASES = [
    (place, transport)
    for place in PLACES
    for transport in TRANSPORTS
    # A rectangle has room for every row in one round.
    if place != "many_rounds" or transport in ("ring", "ragged")
]


@pytest.mark.parametrize(("place", "transport"), CASES)
def test_rows_meet_their_experts_and_come_home_weighed(meshes, place, transport):
    mesh, J, num_rows, num_rounds = PLACES[place]
    p, axis_size = problem(J), meshes[mesh].shape["expert"]
    room = Room(axis_size, num_rows, num_rounds, "cpu")
    y, d_x, d_gate, excess_DN = there_and_back(p, meshes[mesh], transport, room)
    y_GSM, d_x_GSM, d_gate_GSJ = expected(p)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(y, y_GSM)
    close(d_x, d_x_GSM, atol=1e-4)
    close(d_gate, d_gate_GSJ, atol=1e-4)

    rows_D = rows_of_devices(p, excess_DN.shape[0] // axis_size, axis_size)
    room_N = num_rows * (1 + np.arange(num_rounds))
    excess = np.maximum(rows_D[:, None] - room_N, 0)
    np.testing.assert_array_equal(excess_DN, excess)
    if num_rounds > 1:
        assert np.any(excess[:, -2] > 0), "every round is meant to be needed"
        assert np.any(rows_D == 0), "a device is meant to have no rows"
