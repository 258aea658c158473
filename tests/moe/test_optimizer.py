"""Optimizers on stacks of matrices, schedules, clipping, and the axes of the state."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from moe import architecture
from moe.model import inventory, parameters
from moe.model.parameters import matrix, vector
from moe.settings import ModelSettings, OptimizerSettings, RouterSettings
from moe.training.optimizer import (
    make_optimizer,
    make_schedule,
    state_axes,
)
from partitioning import placement
from partitioning.rules import MOMENTS

LAYERS, EXPERTS, IN, OUT = 2, 3, 128, 160  # from 128 on Adafactor factors a dimension
ADAFACTOR = OptimizerSettings(
    name="adafactor",
    learning_rate=0.01,
    schedule="constant",
    warmup_steps=0,
    b1=0.0,
    weight_decay=0.0,
    clip_norm=0.0,
)
ADAMW = dataclasses.replace(ADAFACTOR, name="adamw", b1=0.9)
STEPS = 3


@functools.cache
def stack():
    """A stack of matrices and gradients for a few steps, of very unequal scales."""
    rng = np.random.default_rng(0)
    shape = (LAYERS, EXPERTS, IN, OUT)
    scale = 10.0 ** rng.uniform(-3, 3, (2, LAYERS, EXPERTS, 1, 1))
    params = rng.normal(size=shape) * scale[0]
    gradients = rng.normal(size=(STEPS, *shape)) * scale[1]
    return params.astype(np.float32), gradients.astype(np.float32)


def learn(optimizer, params, gradients):
    """Parameters and state after the steps."""

    @jax.jit
    def run(params, gradients):
        def step(carried, gradient):
            params, state = carried
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, gradients)[0]

    return run(params, gradients)


@functools.cache
def learned_stack():
    shape, axes = (LAYERS, EXPERTS, IN, OUT), ("layers", "expert", "embed", "mlp")
    specs = {"up": matrix(shape, axes, (2,), (3,))}
    params, gradients = ({"up": x} for x in stack())
    params, state = learn(make_optimizer(ADAFACTOR, STEPS, specs), params, gradients)
    return np.asarray(params["up"]), state


def test_adafactor_on_a_stack_equals_adafactor_on_each_matrix_alone():
    params, gradients = stack()
    alone = jax.jit(functools.partial(learn, optax.adafactor(ADAFACTOR.learning_rate)))
    stacked, _ = learned_stack()
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            one = layer, expert
            expected, _ = alone(params[one], gradients[:, *one])
            moved = np.abs(expected - params[one]).max()
            assert moved > 0.01 * np.std(params[one]), "the step is meant to be visible"
            # The last bit of the largest parameters, 5 standard deviations, is 3e-7 of
            # one: only the order of the sums in a root mean square differs.
            np.testing.assert_allclose(
                stacked[one], expected, rtol=0, atol=3e-7 * np.std(params[one])
            )


def test_factored_moments_keep_layers_and_experts_apart():
    _, state = learned_stack()
    shapes = [x.shape for x in jax.tree.leaves(state) if x.size > LAYERS * EXPERTS]
    assert sorted(shapes) == [(LAYERS, EXPERTS, IN), (LAYERS, EXPERTS, OUT)]


TINY = ModelSettings(
    vocab_size=256,
    num_layers=2,
    model_dim=128,
    num_heads=2,
    head_dim=128,
    mlp_dim=128,
    activation="relu",
    num_experts=3,
    expert_mlp_dim=160,
    tie_embeddings=False,
)


@functools.cache
def tiny():
    """Shapes and specs of a model whose matrices are large enough to factor."""
    specs = inventory.specs(architecture.describe(TINY, RouterSettings()))
    return parameters.shapes(specs, "float32"), specs


@pytest.mark.parametrize("settings", [ADAMW, ADAFACTOR], ids=lambda s: s.name)
def test_weight_decay_touches_matrices_only(settings):
    # Without a gradient a step is the decay alone.
    settings = dataclasses.replace(settings, learning_rate=0.5, weight_decay=0.1)
    specs = {
        "norm": vector((2,), (None,)),
        "norms": vector((2, 2), (None,) * 2, stacked=1),
        "scales": vector((2,) * 3, (None,) * 3, stacked=2),
        "embedding": matrix((2, 2), (None,) * 2, (0,), (1,)),
        "experts": matrix((2,) * 4, (None,) * 4, (2,), (3,)),
    }
    params = jax.tree.map(lambda spec: np.ones(spec.shape, np.float32), specs)
    optimizer = make_optimizer(settings, STEPS, specs)
    gradients = jax.tree.map(lambda p: np.zeros((1, *p.shape), np.float32), params)
    after, _ = learn(optimizer, params, gradients)
    for name, value in after.items():
        expected = 1 - 0.5 * 0.1 if name in ("embedding", "experts") else 1
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)


@pytest.mark.fast
def test_of_a_whole_model_these_are_the_parameters_that_decay():
    model = dataclasses.replace(
        TINY, activation="swiglu", mlp_biases=True, expert_biases=True
    )
    router = RouterSettings(selection_bias=True)
    specs = inventory.specs(architecture.describe(model, router))
    matrices = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, spec in jax.tree.leaves_with_path(specs)
        if spec.is_matrix
    }
    attention = {
        f"decoder/layers/0/{block}/attention/{name}"
        for block in (0, 1)
        for name in ("query", "key", "value", "output")
    }
    assert matrices == attention | {
        "embedding",
        "head",
        "decoder/layers/0/0/dense/up",
        "decoder/layers/0/0/dense/down",
        "decoder/layers/0/1/sparse/router",
        "decoder/layers/0/1/sparse/experts/up",
        "decoder/layers/0/1/sparse/experts/down",
    }


@pytest.mark.parametrize(
    ("clip_norm", "norm"),
    [(1.0, 1.0), (20.0, 10.0), (0.0, 10.0)],  # clipped, small enough, not clipped
)
def test_gradients_are_clipped_by_their_global_norm(clip_norm, norm):
    settings = dataclasses.replace(ADAMW, b1=0.5, clip_norm=clip_norm)
    gradients = {"a": np.full(4, 3.0, np.float32), "b": np.full(4, 4.0, np.float32)}
    specs = dict.fromkeys("ab", vector((4,), ("norm",)))  # 10 = √(4 · 9 + 4 · 16)
    optimizer = make_optimizer(settings, STEPS, specs)
    update = jax.jit(optimizer.update)
    _, state = update(gradients, optimizer.init(gradients), gradients)
    # The first moment after one step is half of what went in.
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    np.testing.assert_allclose(2 * adam.mu["a"], 3.0 * norm / 10, rtol=1e-6)
    np.testing.assert_allclose(2 * adam.mu["b"], 4.0 * norm / 10, rtol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", {40: 1, 110: 1}),
        ("rsqrt", {40: 1 / 2, 90: 1 / 3}),  # √(10 / 40), √(10 / 90)
        ("cosine", {60: 0.6, 110: 0.2}),  # half-way from 1 to 0.2, and the end
    ],
)
def test_learning_rates_rise_to_their_peak_and_follow_their_schedule(schedule, after):
    settings = OptimizerSettings(
        learning_rate=3.0, schedule=schedule, warmup_steps=10, final_fraction=0.2
    )
    # The first update is made with a tenth of the peak, the tenth with the peak.
    expected = {0: 0.1, 4: 0.5, 8: 0.9, 9: 1, 10: 1} | after
    rate = jax.jit(make_schedule(settings, train_steps=110))
    np.testing.assert_allclose(
        rate(np.array(list(expected))), 3 * np.array(list(expected.values())), rtol=1e-6
    )


@pytest.mark.fast
@pytest.mark.parametrize(
    ("shape", "half", "three_quarters"),
    # Down from 1 to 0.2: 0.2 + 0.8 · what is left after half, 3/4 of the steps.
    [
        ("linear", 0.6, 0.4),
        ("sqrt", 0.2 + 0.8 * (1 - 0.5**0.5), 0.2 + 0.8 * (1 - 0.75**0.5)),
        ("cosine", 0.6, 0.2 + 0.8 * (1 - 0.5**0.5) / 2),
    ],
)
@pytest.mark.parametrize("warmup", [0, 10])
def test_wsd_stays_at_the_peak_and_falls_in_the_last_part_of_all_steps(
    warmup, shape, half, three_quarters
):
    settings = OptimizerSettings(
        learning_rate=3.0,
        schedule="wsd",
        warmup_steps=warmup,
        final_fraction=0.2,
        decay_fraction=0.4,
        decay_shape=shape,
    )
    expected = {10: 1, 59: 1, 60: 1, 80: half, 90: three_quarters, 100: 0.2, 120: 0.2}
    rate = jax.jit(make_schedule(settings, train_steps=100))
    np.testing.assert_allclose(
        rate(np.array(list(expected))), 3 * np.array(list(expected.values())), rtol=1e-5
    )
    assert rate(np.array([61]))[0] < 3


@pytest.mark.fast
@pytest.mark.parametrize("schedule", ["constant", "rsqrt", "cosine", "wsd"])
def test_without_warm_up_the_first_update_is_made_at_the_peak(schedule):
    settings = OptimizerSettings(learning_rate=3.0, schedule=schedule, warmup_steps=0)
    rate = jax.jit(make_schedule(settings, train_steps=100))(np.array([0, 1, 50]))
    assert rate[0] == 3
    assert np.all(np.diff(rate) <= 0)


@functools.cache
def axes_by_path(settings: OptimizerSettings) -> dict[str, tuple]:
    """Shape and logical axes of every array of the optimizer's state."""
    shapes, specs = tiny()
    optimizer = make_optimizer(settings, STEPS, specs)
    state = jax.eval_shape(optimizer.init, shapes)
    table = {}
    for path, array, array_axes in placement.leaves(state, state_axes(state, specs)):
        assert len(array_axes) == array.ndim, path
        table[path] = array.shape, array_axes
    return table


def of_moment(axes: tuple) -> tuple:
    """What a moment's axes are called: it may be cut where its parameter is not."""
    return tuple(MOMENTS.get(axis, axis) for axis in axes)


@pytest.mark.fast
def test_the_moments_of_adamw_have_the_axes_of_their_parameters():
    shapes, specs = tiny()
    axes = parameters.axes(specs)
    table = axes_by_path(ADAMW)
    for path, array, array_axes in placement.leaves(shapes, axes):
        for moment in ("mu", "nu"):
            (where,) = (name for name in table if name.endswith(f"/{moment}/{path}"))
            assert table[where] == (array.shape, of_moment(array_axes))
    counters = [entry for path, entry in table.items() if path.endswith("count")]
    assert counters == [((), ())] * 2
    assert len(table) == 2 * len(placement.leaves(shapes, axes)) + len(counters)


# Whole moment, row moment and column moment of one parameter of each kind. Where rows
# and columns stand for the whole, it is a placeholder of one number, and the other way
# round. Head by head, an attention matrix [128, 2, 128] has rows and columns, too.
ADAFACTOR_AXES = {
    "embedding": "1:– | 128:– | 256:–",
    "decoder/norm/scale": "128:norm | 1:– | 1:–",
    "decoder/layers/0/0/attention/query": (
        "1:layers 1:– | 1:layers 128:– | 1:layers 256:–"
    ),
    "decoder/layers/0/1/sparse/norm/scale": (
        "1:layers 128:norm | 1:layers 1:– | 1:layers 1:–"
    ),
    "decoder/layers/0/1/sparse/router": (
        "1:layers 128:embed_moment 3:routed | 1:layers 1:– | 1:layers 1:–"
    ),
    "decoder/layers/0/1/sparse/experts/up": (
        "1:layers 3:expert 1:– | 1:layers 3:expert 128:– | 1:layers 3:expert 160:–"
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("path", ADAFACTOR_AXES)
def test_the_moments_of_adafactor_have_these_axes(path):
    table = axes_by_path(ADAFACTOR)
    written = [
        " ".join(f"{size}:{axis or '–'}" for size, axis in zip(*entry, strict=True))
        for moment in ("v", "v_row", "v_col")
        for where, entry in table.items()
        if f"/{path}/" in where and where.endswith(f"/{moment}")
    ]
    assert " | ".join(written) == ADAFACTOR_AXES[path]


@pytest.mark.fast
def test_the_first_moment_of_adafactor_has_the_axes_of_its_parameter():
    shapes, specs = tiny()
    axes = parameters.axes(specs)
    with_momentum = axes_by_path(dataclasses.replace(ADAFACTOR, b1=0.9))
    added = with_momentum.keys() - axes_by_path(ADAFACTOR).keys()
    for path, array, array_axes in placement.leaves(shapes, axes):
        (where,) = (name for name in added if name.endswith(f"/ema/{path}"))
        assert with_momentum[where] == (array.shape, of_moment(array_axes))


@pytest.mark.fast
def test_moments_follow_the_tree_where_names_repeat():
    specs = {
        "a": {"t": matrix((2, 4), ("embed", "mlp"), (0,), (1,))},
        "z": {"a": {"t": matrix((3, 4), ("vocab", "embed"), (0,), (1,))}},
    }
    shapes = parameters.shapes(specs, "float32")
    state = jax.eval_shape(make_optimizer(ADAMW, STEPS, specs).init, shapes)
    found = {
        path.partition("/mu/")[2]: axes
        for path, _, axes in placement.leaves(state, state_axes(state, specs))
        if "/mu/" in path
    }
    assert found == {"a/t": ("embed_moment", "mlp"), "z/a/t": ("vocab", "embed_moment")}
