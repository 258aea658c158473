"""What is frozen stays as it is, bit for bit, and the rest learns as if alone."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from launch.config import reader
from launch.errors import ConfigError
from launch.planning.cost import memory
from launch.run.assemble import assemble
from launch.run.describe import trained_facts
from moe.model import inventory
from moe.model.build import build
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RouterSettings,
)
from moe.testing import MESHES
from moe.training import losses, new_state, trained
from moe.training.optimizer import make_optimizer, make_schedule
from moe.training.train_state import TrainState
from moe.training.train_step import Learner, batch_sums, train_step
from partitioning import rules
from partitioning.mesh import make_mesh

B, L, V, STEPS = 8, 8, 32, 3
MODEL = ModelSettings(
    vocab_size=V,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=16,
    moe_every=1,
    num_experts=8,
    expert_mlp_dim=8,
)
ROUTER = RouterSettings(group_size=8, selection_bias=True, capacity_factor=0.0)
EXECUTION = ExecutionSettings(transport="all_to_all", dtype="float32", remat="none")
# Experts and norms are trained, but for the matrices that lead out of experts; biases
# of selection are not.
OPTIMIZER = OptimizerSettings(
    learning_rate=1e-2,
    schedule="constant",
    warmup_steps=0,
    eps=1e-3,
    clip_norm=0.05,
    trainable=("*/experts/*", "*/scale", "params/head"),
    frozen=("*/experts/down",),
)
IS_TRAINED = ("/experts/up", "/scale", "head")


def learns(name: str) -> bool:
    """The oracle of the patterns above."""
    return name.endswith(IS_TRAINED)


@functools.cache
def learner_of(mesh: str) -> Learner:
    model = build(MODEL, ROUTER, EXECUTION, make_mesh(MESHES[mesh]))
    return Learner(
        model=model,
        optimizer=make_optimizer(OPTIMIZER, 100, model.specs, model.grid),
        schedule=make_schedule(OPTIMIZER, 100),
        loss=LossSettings(),
        microbatches=1,
        seed=3,
        trained_of=functools.partial(trained.trained_of, settings=OPTIMIZER),
    )


@functools.cache
def start() -> TrainState:
    learner = learner_of("d1")
    draw = functools.partial(
        new_state.draw,
        layers=learner.model.layers,
        param_dtype="float32",
        optimizer=learner.optimizer,
    )
    return jax.device_get(jax.jit(draw)(jax.random.key(0)))


@functools.cache
def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    target_BL = rng.integers(2, V, (B, L)).astype(np.int32)
    ones_BL = np.ones((B, L), np.int32)
    return {
        "decoder_target_tokens": target_BL,
        "decoder_input_tokens": np.roll(target_BL, 1, 1),
        "decoder_loss_weights": ones_BL,
        "decoder_segment_ids": ones_BL,
        "decoder_positions": np.tile(np.arange(L, dtype=np.int32), (B, 1)),
    }


def run(mesh: str) -> tuple[TrainState, list[float]]:
    """The state after three steps, and the norms of their gradients."""
    learner, state = learner_of(mesh), start()
    places = new_state.shardings(
        state,
        new_state.logical_axes(state, learner.model.layers),
        learner.model.execution.mesh,
    )
    by_row = rules.sharding(learner.model.execution.mesh, ("batch", "length"))
    step = jax.jit(
        functools.partial(train_step, learner=learner),
        in_shardings=(places, by_row, None),
        out_shardings=(places, None),
    )
    norms = []
    with jax.set_mesh(learner.model.execution.mesh):
        for number in range(STEPS):
            state, metrics = step(state, make_batch(), np.int32(number))
            norms.append(float(metrics["optimizer/gradient_norm"]))
    return jax.device_get(state), norms


def named(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


@functools.cache
def by_hand() -> tuple[dict[str, np.ndarray], list[float]]:
    """Three steps of clipped AdamW in NumPy, on gradients of all parameters."""
    learner, structure = learner_of("d1"), jax.tree.structure(start().params)
    _, steps_key = jax.random.split(jax.random.key(learner.seed))

    @jax.jit
    def gradient_of(params, number):
        def loss(params):
            key = jax.random.fold_in(steps_key, number)
            sums, _ = batch_sums(params, make_batch(), key, learner)
            return losses.total(sums, learner.loss)[0]

        return jax.grad(loss)(params)

    specs = named(
        jax.tree.map(
            lambda spec: np.asarray(spec.is_matrix),
            inventory.specs(learner.model.layers),
        )
    )
    params = named(start().params)
    moments = {name: (0.0, 0.0) for name in params}
    norms = []
    for number in range(STEPS):
        tree = jax.tree.unflatten(structure, list(params.values()))
        gradient = named(gradient_of(tree, number))
        squares = [
            np.sum(np.square(g, dtype=float)) for n, g in gradient.items() if learns(n)
        ]
        norms.append(float(np.sqrt(np.sum(squares))))
        for name in filter(learns, params):
            g = gradient[name].astype(float) * min(1.0, OPTIMIZER.clip_norm / norms[-1])
            m, v = moments[name]
            m = OPTIMIZER.b1 * m + (1 - OPTIMIZER.b1) * g
            v = OPTIMIZER.b2 * v + (1 - OPTIMIZER.b2) * g**2
            moments[name] = m, v
            m = m / (1 - OPTIMIZER.b1 ** (number + 1))
            v = v / (1 - OPTIMIZER.b2 ** (number + 1))
            step = m / (np.sqrt(v) + OPTIMIZER.eps)
            if specs[name]:
                step = step + OPTIMIZER.weight_decay * params[name]
            params[name] = (params[name] - OPTIMIZER.learning_rate * step).astype("f4")
    return params, norms


@pytest.mark.parametrize("mesh", ["d1", "d2e4"])
def test_frozen_parameters_stay_and_the_rest_learns_as_by_hand(mesh):
    state, norms = run(mesh)
    params, expected_norms = by_hand()
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-4)
    assert min(norms) > OPTIMIZER.clip_norm, "clipping is part of the claim"
    before = named(start().params)
    for name, array in named(state.params).items():
        if learns(name):
            np.testing.assert_allclose(array, params[name], 1e-4, 2e-6, err_msg=name)
            assert np.all(np.abs(array - before[name]).max() > 1e-4), name
        else:
            np.testing.assert_array_equal(array, before[name], name)


def test_the_optimizer_has_a_state_of_what_is_trained_and_of_no_more():
    with_state = {
        name.partition("/mu/")[2] for name in named(start().opt_state) if "/mu/" in name
    }
    assert with_state == set(filter(learns, named(start().params)))
    for settings in ("adafactor", "muon"):
        other = dataclasses.replace(OPTIMIZER, name=settings, rounding="master")
        optimizer = make_optimizer(other, 100, learner_of("d1").model.specs)
        shapes = jax.eval_shape(optimizer.init, start().params)
        assert named(jax.tree.map(lambda s: np.zeros(()), shapes.master)).keys() == (
            with_state
        )


@pytest.mark.fast
def test_a_pattern_that_matches_nothing_is_told_with_the_nearest_names():
    def faults(**patterns: tuple[str, ...]) -> list[str]:
        config = reader.read(
            ["runs/tiny.gin"], [f"{name}={given}" for name, given in patterns.items()]
        )
        try:
            assemble(config)
        except ConfigError as error:
            return str(error).splitlines()[1:]
        return []

    (fault,) = faults(TRAINABLE=("*/sparse/ruoter",))
    assert "TRAINABLE = ('*/sparse/ruoter',): '*/sparse/ruoter' matches no" in fault
    assert "sparse/router" in fault
    (fault,) = faults(FROZEN=("*",))
    assert "FROZEN = ('*',) leave nothing to train" in fault
    assert not faults(FROZEN=("params/*/router",))


@pytest.mark.fast
def test_the_first_lines_say_how_many_parameters_are_trained():
    settings = reader.read(["runs/tiny.gin"], ["TRAINABLE=('*/router',)"]).settings
    specs = named(
        jax.tree.map(lambda s: np.zeros(s.shape), inventory.specs(settings.layers))
    )
    routers = sum(a.size for name, a in specs.items() if name.endswith("/router"))
    total = sum(a.size for a in specs.values())
    ((what, words),) = trained_facts(settings)
    assert what == "trained"
    assert words == f"{routers:,} of {total:,} parameters; the rest is frozen"
    assert trained_facts(reader.read(["runs/tiny.gin"]).settings) == []


@pytest.mark.fast
def test_a_plan_counts_no_state_and_no_gradients_of_what_is_frozen():
    def planned(*knobs: str) -> memory.MemoryPlan:
        return memory.predict(reader.read(["runs/tiny.gin"], [*knobs]).settings, "cpu")

    whole, part = planned(), planned("TRAINABLE=('*/router',)")
    # A router of 32 × 4 has two moments, gradients in float32; one counts updates.
    assert 0 <= part.optimizer - 2 * 32 * 4 * 4 <= 16
    assert part.moments["optimizer"]["gradients"] == 32 * 4 * 4
    assert part.parameters == whole.parameters
    assert 0 <= whole.optimizer - 2 * whole.parameters <= 16
