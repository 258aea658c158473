"""Fewer bits between steps: rounding, master copies, moments, and their exceptions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe import architecture
from moe.model import inventory
from moe.model.build import build
from moe.model.products import gather
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RouterSettings,
)
from moe.training import new_state
from moe.training.optimizer import make_optimizer, make_schedule
from moe.training.precision import apply_updates, moments_in, with_master
from moe.training.train_step import Learner, train_step
from partitioning.grid import Grid
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings

MODEL = ModelSettings(
    vocab_size=16,
    num_layers=1,
    model_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    moe_every=1,
    num_experts=4,
    expert_mlp_dim=12,
)
ROUTER = RouterSettings(group_size=8, selection_bias=True, bias_update_rate=1e-3)
LAYERS = architecture.describe(MODEL, ROUTER)
KEY = jax.random.key(0)


def test_rounding_at_random_is_right_on_average_and_to_a_neighbour():
    # Between 1 and the next bfloat16, 1 + 2^-7, at a quarter of the way.
    params = {"w": jnp.ones(40_000, jnp.bfloat16)}
    updates = {"w": jnp.full(40_000, 2.0**-9)}
    new = apply_updates(params, updates, (), "stochastic", KEY)["w"]
    values, counts = np.unique(np.asarray(new, np.float32), return_counts=True)
    np.testing.assert_array_equal(values, [1, 1 + 2.0**-7])
    # Four standard deviations of 40,000 draws with a chance of 1/4 are 0.009.
    assert abs(counts[1] / 40_000 - 0.25) < 0.009
    nearest = apply_updates(params, updates, (), "nearest", KEY)["w"]
    assert np.all(np.asarray(nearest, np.float32) == 1)


def test_rounding_at_random_keeps_what_bfloat16_holds_and_is_drawn_by_the_key():
    exact = {"w": jnp.array([-2.5, 0.0, 1.5], jnp.bfloat16)}
    none = {"w": jnp.zeros(3)}
    np.testing.assert_array_equal(
        apply_updates(exact, none, (), "stochastic", KEY)["w"], exact["w"]
    )
    params, updates = {"w": jnp.ones(64, jnp.bfloat16)}, {"w": jnp.full(64, 2.0**-8)}
    one, same, other = (
        apply_updates(params, updates, (), "stochastic", jax.random.key(k))["w"]
        for k in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_master_copy_learns_what_bfloat16_parameters_would_lose():
    optimizer = with_master(optax.sgd(1.0))
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = optimizer.init(params)
    for _ in range(8):  # each below half a unit of bfloat16 in the last place
        updates, state = optimizer.update({"w": jnp.full(3, 2.0**-10)}, state, params)
        params = apply_updates(params, updates, state, "master", KEY)
    assert state.master["w"].dtype == jnp.float32
    np.testing.assert_array_equal(state.master["w"], 1 - 8 * 2.0**-10)
    np.testing.assert_array_equal(params["w"].astype(jnp.float32), 1 - 2.0**-7)


def test_moments_are_kept_in_a_type_and_computed_in_float32():
    kept = moments_in(optax.scale_by_adam(0.9, 0.95), "bfloat16")
    plain = optax.scale_by_adam(0.9, 0.95)
    gradient = {"w": jnp.array([0.3, -1.1], jnp.float32)}
    state = kept.init(gradient)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {
        "bfloat16"
    }
    got, state = kept.update(gradient, state)
    wanted, wanted_state = plain.update(gradient, plain.init(gradient))
    np.testing.assert_array_equal(got["w"], wanted["w"])  # zeros lose nothing
    np.testing.assert_array_equal(
        state.mu["w"], wanted_state.mu["w"].astype(jnp.bfloat16)
    )


def learner_of(settings: OptimizerSettings, param_dtype: str) -> Learner:
    execution = ExecutionSettings(
        dtype="float32", param_dtype=param_dtype, remat="none"
    )
    mesh = make_mesh(MeshSettings())
    return Learner(
        model=build(MODEL, ROUTER, execution, mesh),
        optimizer=make_optimizer(settings, 10, inventory.specs(LAYERS)),
        schedule=make_schedule(settings, 10),
        loss=LossSettings(),
        microbatches=1,
        seed=0,
        rounding=settings.rounding,
    )


def batch() -> dict[str, np.ndarray]:
    tokens_BL = np.random.default_rng(0).integers(1, 16, (4, 8)).astype(np.int32)
    return dict.fromkeys(
        (
            "decoder_input_tokens",
            "decoder_target_tokens",
            "decoder_loss_weights",
            "decoder_segment_ids",
        ),
        np.ones((4, 8), np.int32),
    ) | {
        "decoder_input_tokens": tokens_BL,
        "decoder_target_tokens": np.roll(tokens_BL, -1, axis=1),
        "decoder_positions": np.broadcast_to(np.arange(8, dtype=np.int32), (4, 8)),
    }


@functools.cache
def after_steps(rounding: str, param_dtype: str = "bfloat16", steps: int = 2):
    """The state after some steps of the tiny model."""
    settings = OptimizerSettings(rounding=rounding, warmup_steps=0)
    learner = learner_of(settings, param_dtype)
    state = jax.jit(
        lambda: new_state.draw(KEY, LAYERS, param_dtype, learner.optimizer)
    )()
    step = jax.jit(functools.partial(train_step, learner=learner))
    for n in range(steps):
        state, _ = step(state, batch(), jnp.int32(n))
    return jax.device_get(state)


def types_of(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "moment_dtype"),
    [
        ("adamw", "bfloat16"),
        ("adafactor", "float32"),
        ("muon", "bfloat16"),
        pytest.param("adamw", "float32", marks=pytest.mark.slow),
        pytest.param("adafactor", "bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("param_dtype", "rounding"),
    [
        ("float32", "nearest"),
        ("bfloat16", "nearest"),
        ("bfloat16", "stochastic"),
        ("bfloat16", "master"),
    ],
)
def test_a_step_returns_a_state_of_the_types_it_was_given(
    param_dtype, rounding, name, moment_dtype
):
    settings = OptimizerSettings(
        name=name, rounding=rounding, moment_dtype=moment_dtype
    )
    learner = learner_of(settings, param_dtype)
    state = jax.eval_shape(
        lambda: new_state.draw(KEY, LAYERS, param_dtype, learner.optimizer)
    )
    after, _ = jax.eval_shape(
        functools.partial(train_step, learner=learner), state, batch(), jnp.int32(0)
    )
    assert types_of(after) == types_of(state)
    moments = jax.tree.leaves(
        state.opt_state.inner if rounding == "master" else state.opt_state
    )
    # Counts of stacked layers are integers.
    types = {x.dtype for x in moments if x.ndim}
    assert {t.name for t in types if jnp.issubdtype(t, jnp.floating)} == {moment_dtype}


def bias_of(params):
    return params["decoder"]["layers"][0][0]["sparse"]["selection_bias"]


@pytest.mark.parametrize(
    "rounding",
    [pytest.param("nearest", marks=pytest.mark.slow), "stochastic", "master"],
)
def test_selection_biases_move_in_float32_however_parameters_are_rounded(rounding):
    bias = bias_of(after_steps(rounding).params)
    assert bias.dtype == np.float32
    # Two steps of ±1e-3, or of 0 where a load is the mean.
    np.testing.assert_allclose(bias / 1e-3, np.round(bias / 1e-3), atol=1e-3)
    assert np.max(np.abs(bias)) > 1.5e-3


def test_all_other_parameters_are_of_the_type_asked_for_and_follow_their_master():
    state = after_steps("master")
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    types = {
        leaf.dtype.name
        for path, leaf in leaves
        if not jax.tree_util.keystr(path, simple=True).endswith("selection_bias")
    }
    assert types == {"bfloat16"}
    jax.tree.map(
        lambda p, master: np.testing.assert_array_equal(p, master.astype(p.dtype)),
        state.params,
        state.opt_state.master,
    )


def test_gradients_of_gathered_weights_travel_in_reduce_dtype():
    mesh = make_mesh(MeshSettings(data=4))
    grid, cut = Grid(mesh), jax.sharding.PartitionSpec("data")

    def travelled(reduce_dtype: str) -> str:
        def loss(piece):
            whole = gather(piece, grid, ("data",), 0, "bfloat16", reduce_dtype)
            return jnp.sum(whole.astype(jnp.float32) ** 2)

        both = jax.shard_map(
            jax.grad(loss), mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False
        )
        return str(jax.make_jaxpr(both)(jnp.ones((8, 4))))

    assert "f32[2,4] = reduce_scatter" in travelled("float32")
    assert "bf16[2,4] = reduce_scatter" in travelled("bfloat16")
    assert "bf16[8,4] = all_gather" in travelled("float32")
