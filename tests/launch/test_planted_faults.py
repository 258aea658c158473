"""Faults that parallel code has, planted in the real code: `verify` sees each of them
and names what it breaks."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from test_verify import DEVICES, config

from launch.config import edit
from launch.verification import examine
from launch.verification.shrink import shrink
from moe.dispatch import all_to_all
from moe.model import head, sparse
from moe.model.attention import blocks
from moe.model.attention.blocks import Ring
from moe.training import losses
from partitioning.grid import Grid
from partitioning.settings import BATCH_AXES

KNOBS = (
    "NUM_SELECTED_EXPERTS=2 TRANSPORT=all_to_all AUX_LOSS_SCOPE=global "
    "AUX_LOSS_FACTOR=1.0 TRAIN_CAPACITY_FACTOR=1.0"
)
MESHES = ("data=2", "expert=2", "model=2", "context=2")
CLEAR = 20  # times what a quantity may differ by: no rounding does that


@functools.cache
def shrunk(partition: str):
    asked = [edit.parse_mesh(mesh)[0] for mesh in MESHES]
    settings = config(f"{KNOBS} {partition}").settings
    return shrink(settings, asked, "runs/tiny.gin", DEVICES)


@functools.cache
def reference():
    """One device's step, which knows nothing of partitions: the same for all faults."""
    small = shrunk("")
    return examine.Reference(config(KNOBS), small.on_one_device(), small.tail, 0)


class Fault(NamedTuple):
    """What is planted, the mesh on which it shows, and some of what it breaks."""

    plant: object
    mesh: str
    breaks: tuple[str, ...]
    spares: tuple[str, ...]
    partition: str = ""


def scale_gradients_of_experts_by_the_axis(patch):
    real = sparse._compute

    def compute(w, *given):
        size = given[-1].mesh.shape["expert"]

        def scaled(x):
            return size * x - lax.stop_gradient((size - 1) * x)

        return real(jax.tree.map(scaled, w), *given)

    patch.setattr(sparse, "_compute", compute)


def leave_gradients_unsummed_over_data(patch):
    real = Grid.scatter_sum

    def scatter_sum(grid, x, axes, dim):
        cut = grid.piece if "data" in axes else functools.partial(real, grid)
        return cut(x, axes, dim)

    patch.setattr(Grid, "scatter_sum", scatter_sum)


def drop_the_gradient_of_gates(patch):
    real = all_to_all.combine

    def combine(rows, assignment, *given):
        gate_GSJ = lax.stop_gradient(assignment.gate_GSJ)
        fixed = dataclasses.replace(assignment, gate_GSJ=gate_GSJ)
        return real(rows, fixed, *given)

    patch.setattr(all_to_all, "combine", combine)


def average_balance_over_the_wrong_axis(patch):
    real = losses.over_devices

    def over_devices(sums, grid):
        (router,), merged = sums.router, real(sums, grid)
        mine = grid.sum(router.probability_PE, ("replica", "data", "context", "model"))
        wrong = dataclasses.replace(
            merged.router[0], probability_PE=mine * grid.size("expert")
        )
        return dataclasses.replace(merged, router=(wrong,))

    patch.setattr(losses, "over_devices", over_devices)


def count_only_local_experts_in_the_norm(patch):
    real = optax.tree.norm

    def norm(tree):
        def local(path, x):
            mine = "experts" in jax.tree_util.keystr(path)
            return x * 0.5**0.5 if mine else x  # half of the squares

        return real(jax.tree_util.tree_map_with_path(local, tree))

    patch.setattr(optax.tree, "norm", norm)


def leave_out_the_sum_over_sequence_parallel_shares(patch):
    real = Grid.leave

    def leave(grid, y_BLM):
        return (
            grid.piece(y_BLM, ["model"], 1) if grid.cuts_sequence else real(grid, y_BLM)
        )

    patch.setattr(Grid, "leave", leave)


def skip_a_turn_of_the_ring(patch):
    def shorter(axis="", axis_size=2):
        return Ring(axis, axis_size - 1)

    patch.setattr(blocks, "Ring", shorter)


def count_dropped_tokens_twice(patch):
    real = sparse._compute

    def compute(*given):
        y_GSM, sums = real(*given)
        dropped_GE = sums.chosen_GE - sums.kept_GE
        return y_GSM, dataclasses.replace(sums, chosen_GE=sums.chosen_GE + dropped_GE)

    patch.setattr(sparse, "_compute", compute)


def normalise_by_the_own_part_of_the_vocabulary(patch):
    class Deaf(Grid):
        """A grid that does not hear of the others' normalisers."""

        def max(self, x, axes):
            return lax.stop_gradient(x) if self.normalises() else super().max(x, axes)

        def sum(self, tree, axes):
            return tree if self.normalises() else super().sum(tree, axes)

        def normalises(self):
            calls.append(None)
            return len(calls) <= 2  # the first maximum and the first sum

    calls: list[None] = []
    real = head.score_targets

    def score_targets(head_mv, x_BLM, target_BL, execution):
        calls.clear()
        deaf = dataclasses.replace(execution)
        vars(deaf)["grid"] = Deaf(execution.mesh, execution.partition)
        return real(head_mv, x_BLM, target_BL, deaf)

    patch.setattr("moe.training.train_step.score_targets", score_targets)


def draw_by_the_device_and_not_by_the_row(patch):
    real = sparse.group_keys

    def group_keys(key, group_g):
        return real(key, jnp.arange(group_g.size))

    patch.setattr(sparse, "group_keys", group_keys)


def sum_no_metrics_over_replicas(patch):
    real = losses.over_devices

    def over_devices(sums, grid):
        merged = real(sums, grid)
        mine = grid.sum(sums.correct, tuple(a for a in BATCH_AXES if a != "data"))
        return dataclasses.replace(merged, correct=mine)

    patch.setattr(losses, "over_devices", over_devices)


EXPERTS = (
    "gradient decoder/layers/0/0/sparse/experts/up",
    "gradient decoder/layers/0/0/sparse/experts/down",
)
ROUTER = "gradient decoder/layers/0/0/sparse/router"
NORM = "optimizer/gradient_norm"
DESCENT = "parameters after gradient descent, clipped"
LOSS = "loss/nats_per_token"
FAULTS = [
    Fault(
        scale_gradients_of_experts_by_the_axis,
        "expert=2",
        (*EXPERTS, NORM, DESCENT),
        (LOSS, ROUTER, "gradient head"),
    ),
    Fault(
        leave_gradients_unsummed_over_data,
        "data=2",
        (
            "gradient decoder/layers/0/0/attention/query",
            "gradient head",
            *EXPERTS,
            NORM,
        ),
        (LOSS, "gradient decoder/layers/0/0/attention/norm/scale"),
        "FSDP=data",
    ),
    Fault(drop_the_gradient_of_gates, "expert=2", (ROUTER,), (LOSS, *EXPERTS)),
    Fault(
        average_balance_over_the_wrong_axis,
        "expert=2",
        ("loss/balance", ROUTER),
        (LOSS, *EXPERTS, "ledger/dropped_choices"),
    ),
    Fault(
        count_only_local_experts_in_the_norm, "expert=2", (NORM, DESCENT), (*EXPERTS,)
    ),
    Fault(
        leave_out_the_sum_over_sequence_parallel_shares,
        "model=2",
        (LOSS, "gradient decoder/layers/0/0/attention/output"),
        (),
    ),
    Fault(
        skip_a_turn_of_the_ring,
        "context=2",
        (LOSS, "gradient decoder/layers/0/0/attention/key"),
        (),
        "CONTEXT_ATTENTION=ring",
    ),
    Fault(
        count_dropped_tokens_twice,
        "expert=2",
        ("ledger/dropped_choices", "ledger/routed_choices", "router/dropped_fraction"),
        (LOSS, *EXPERTS),
    ),
    Fault(
        normalise_by_the_own_part_of_the_vocabulary,
        "model=2",
        (LOSS, "gradient head"),
        (),
    ),
    Fault(sum_no_metrics_over_replicas, "data=2", ("accuracy/fraction",), (LOSS, NORM)),
]


# One of each kind: a gradient's size, its sum, its path, an exchange, a share.
DAILY = (
    scale_gradients_of_experts_by_the_axis,
    leave_gradients_unsummed_over_data,
    drop_the_gradient_of_gates,
    skip_a_turn_of_the_ring,
    leave_out_the_sum_over_sequence_parallel_shares,
)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=() if fault.plant in DAILY else pytest.mark.slow)
        for fault in FAULTS
    ],
    ids=lambda fault: fault.plant.__name__,
)
def test_verify_names_what_a_fault_breaks(fault, monkeypatch):
    small, one = shrunk(fault.partition), reference()
    assert small.on_one_device() == one.settings
    fault.plant(monkeypatch)
    only = small.meshes[MESHES.index(fault.mesh)]
    rows = examine.on_mesh(one, small.on(only), small.tail, ())
    differing = {row.quantity: row for row in rows if not row.ok}
    for name in fault.breaks:
        assert name in differing, differing.keys()
        assert differing[name].difference > CLEAR * differing[name].tolerance, name
    assert not differing.keys() & set(fault.spares)


@pytest.mark.slow
def test_verify_counts_choices_that_draws_of_a_device_flip(monkeypatch):
    knobs = f"{KNOBS} JITTER_NOISE=0.5 SECOND_EXPERT_POLICY=random"
    asked = [edit.parse_mesh("data=2")[0]]
    small = shrink(config(knobs).settings, asked, "runs/tiny.gin", DEVICES)
    one = examine.Reference(config(knobs), small.on_one_device(), small.tail, 0)
    expected = one.decisions
    draw_by_the_device_and_not_by_the_row(monkeypatch)
    bench = examine.Bench(config(knobs), small.on(small.meshes[0]))
    rows = examine.compare.decisions(expected, bench.decisions(one.start, one.batch), 2)
    flipped = next(row for row in rows if row.quantity == "choices that flipped")
    assert flipped.difference > 100
    assert "least margin" in flipped.note
