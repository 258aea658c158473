"""A whole step is the same on every mesh and for any number of microbatches, and the
compiled step holds the collectives we meant and no others."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from moe.model import parameters
from moe.model.build import build
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RouterSettings,
)
from moe.testing import MESHES
from moe.training import losses, new_state
from moe.training.optimizer import make_optimizer, make_schedule
from moe.training.scoring import eval_step
from moe.training.train_step import Learner, batch_sums, train_step
from partitioning import rules
from partitioning.mesh import make_mesh

B, L, V = 16, 16, 32
MODEL = ModelSettings(
    vocab_size=V,
    num_layers=4,
    model_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    num_experts=8,
    expert_mlp_dim=24,
)
EXECUTION = ExecutionSettings(transport="all_to_all", dtype="float32", remat="none")
# Everything that draws is on, so that a draw tied to a device would show.
ROUTER = RouterSettings(
    num_selected=2,
    renormalize="before_drop",
    second_policy="random",
    jitter=0.05,
    group_size=8,
    min_capacity=1,
    capacity_factor=1.0,
)
LOSS = LossSettings(balance_weight=0.1, router_z_weight=0.01, z_weight=1e-3)
# A bias that evens out loads, and losses that only a whole batch has.
BIASED = dataclasses.replace(ROUTER, selection_bias=True)
WHOLE = dataclasses.replace(LOSS, balance_scope="global", importance_weight=0.1)
# A large eps keeps the update from being a mere sign of the gradient.
OPTIMIZER = OptimizerSettings(
    learning_rate=1e-2, warmup_steps=0, schedule="constant", eps=1e-3, clip_norm=0.0
)


def make_batch(num_rows=B, padding_value=0):
    """Rows of two documents and a padded tail; the last two rows are all padding."""
    rng = np.random.default_rng(1)
    target = rng.integers(2, V, (B, L)).astype(np.int32)
    segment = np.repeat([[1] * 7 + [2] * 6 + [0] * 3], B, 0).astype(np.int32)
    segment[-2:] = 0
    position = np.tile(np.r_[0:7, 0:6, 0:3], (B, 1)).astype(np.int32)
    source = np.where(position > 0, np.roll(target, 1, 1), 0)
    batch = {
        "decoder_target_tokens": np.where(segment > 0, target, padding_value),
        "decoder_input_tokens": np.where(segment > 0, source, padding_value),
        "decoder_loss_weights": (segment > 0).astype(np.int32),
        "decoder_segment_ids": segment,
        "decoder_positions": np.where(segment > 0, position, padding_value),
    }
    more = ((0, num_rows - B), (0, 0))
    return {k: np.pad(v, more).astype(np.int32) for k, v in batch.items()}


def make_learner(mesh: str, *, microbatches=1, scope="group", biased=False, **changes):
    execution = dataclasses.replace(EXECUTION, **changes)
    router = BIASED if biased else ROUTER
    model = build(MODEL, router, execution, make_mesh(MESHES[mesh]))
    return Learner(
        model=model,
        optimizer=make_optimizer(OPTIMIZER, 100, model.specs),
        schedule=make_schedule(OPTIMIZER, 100),
        loss=WHOLE if biased else dataclasses.replace(LOSS, balance_scope=scope),
        microbatches=microbatches,
        seed=3,
    )


@functools.cache
def initial_state(*, biased=False):
    """The state of step 0, in host memory."""
    learner = make_learner("d1", biased=biased)
    draw = functools.partial(
        new_state.draw,
        layers=learner.model.layers,
        param_dtype="float32",
        optimizer=learner.optimizer,
    )
    return jax.device_get(jax.jit(draw)(jax.random.key(0)))


@functools.cache
def compile_step(mesh: str, num_rows=B, *, biased=False, **choices):
    """The step under the placement of a real run."""
    learner = make_learner(mesh, biased=biased, **choices)
    model, state = learner.model, initial_state(biased=biased)
    mesh = model.execution.mesh
    axes = new_state.logical_axes(state, model.layers)
    places = new_state.shardings(state, axes, mesh)
    step = jax.jit(
        functools.partial(train_step, learner=learner),
        in_shardings=(
            places,
            rules.sharding(mesh, ("batch", "length")),
            rules.replicated(mesh),
        ),
        out_shardings=(places, None),
    )
    with jax.set_mesh(mesh):
        return step.lower(state, make_batch(num_rows), np.int32(0)).compile()


def run_step(mesh: str, *, batch=None, state=None, index=0, biased=False, **choices):
    batch = batch or make_batch()
    rows = len(batch["decoder_target_tokens"])
    compiled = compile_step(mesh, rows, biased=biased, **choices)
    arguments = (state or initial_state(biased=biased), batch, np.int32(index))
    placed = jax.device_put(arguments, compiled.input_shardings[0])
    return jax.device_get(compiled(*placed))


def assert_same_step(actual, expected, *, apart_from=()):
    """Loss, gradients, gradient norm, every metric, and the updated state.

    Without clipping the moments after the first step are 0.1 g and 0.05 g², so they
    are the gradients.
    """
    (state, metrics), (other_state, other_metrics) = actual, expected
    assert metrics["router/dropped_fraction"] > 0.02, "drops are part of the claim"
    for name in other_metrics.keys() - set(apart_from):
        np.testing.assert_allclose(
            metrics[name], other_metrics[name], 2e-5, 1e-6, err_msg=name
        )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-7)
    jax.tree.map(close, state.opt_state, other_state.opt_state)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)
    jax.tree.map(close, state.params, other_state.params)
    start = initial_state(biased="loss/importance" in metrics)
    moved = jax.tree.map(
        lambda new, old: np.abs(new - old).max(), state.params, start.params
    )
    assert min(jax.tree.leaves(moved)) > 0, "a parameter did not learn"


# With a selection bias and one more loss, the test of biases is of every day.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "microbatches", "scope", "transport"),
    [
        ("d4e2", 1, "group", "all_to_all"),
        ("e8", 1, "global", "einsum"),
        ("d2e4", 2, "global", "all_to_all"),
        ("d4e2", 1, "global", "einsum"),
        ("d8", 2, "group", "all_to_all"),
        ("d1", 4, "global", "all_to_all"),
        ("e8", 2, "group", "all_to_all"),
        ("d2e4", 2, "global", "ring"),
        ("d4e2", 1, "group", "ragged"),
    ],
)
def test_a_step_on_eight_devices_equals_a_step_on_one(
    mesh, microbatches, scope, transport
):
    choices = {"microbatches": microbatches, "transport": transport}
    assert_same_step(
        run_step(mesh, scope=scope, **choices), run_step("d1", scope=scope)
    )


def test_contents_of_padding_change_nothing_bit_for_bit():
    first, second = (
        run_step("d1", scope="group", batch=make_batch(padding_value=value))
        for value in (0, 5)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_groups_of_padding_appended_change_nothing():
    padding = ("ledger/padding_choices", "ledger/routed_choices")
    expected = run_step("d1", scope="group")
    actual = run_step("d1", scope="group", batch=make_batch(num_rows=B + 8))
    assert_same_step(actual, expected, apart_from=padding)
    added = 8 * L * ROUTER.num_selected
    for name in padding:
        np.testing.assert_array_equal(actual[1][name], expected[1][name] + added)


def test_the_ledger_closes():
    _, metrics = run_step("d1", scope="group")
    assert min(metrics["ledger/dropped_choices"]) > 0
    assert min(metrics["ledger/padding_choices"]) > 0
    np.testing.assert_array_equal(
        metrics["ledger/routed_choices"],
        metrics["ledger/computed_choices"]
        + metrics["ledger/dropped_choices"]
        + metrics["ledger/padding_choices"],
    )


def count_collectives(text: str, kind: str) -> int:
    return len(re.findall(rf" {kind}(?:-start)?\(", text))


@functools.cache
def hlo(mesh: str, remat: str, backward: bool) -> str:
    """The compiled loss, or its gradient."""
    learner = make_learner(mesh, remat=remat)
    mesh = learner.model.execution.mesh
    params = initial_state().params
    axes = parameters.axes(learner.model.specs)
    places = new_state.shardings(params, axes, mesh)

    def loss(params, batch):
        sums, _ = batch_sums(params, batch, jax.random.key(0), learner)
        return losses.total(sums, learner.loss)[0]

    compiled = jax.jit(
        jax.value_and_grad(loss) if backward else loss,
        in_shardings=(places, rules.sharding(mesh, ("batch", "length"))),
        out_shardings=(None, places) if backward else None,
    )
    with jax.set_mesh(mesh):
        return compiled.lower(params, make_batch()).compile().as_text()


@pytest.mark.slow  # on a mesh with everything: test_step_collectives.py
def test_a_scanned_sparse_layer_has_two_exchanges_forward_and_two_backward():
    # The layers are scanned, so one layer's exchanges stand once in the text.
    assert count_collectives(hlo("d2e4", "minimal", False), "all-to-all") == 2
    assert count_collectives(hlo("d2e4", "minimal", True), "all-to-all") == 4


@pytest.mark.slow  # of one layer, by every transport: test_collectives.py
def test_full_remat_repeats_the_exchanges_and_the_default_does_not():
    repeated = count_collectives(hlo("d2e4", "full", True), "all-to-all")
    assert repeated > 4, "full remat is meant to recompute the exchanges"


@pytest.mark.slow
def test_no_exchange_is_compiled_for_an_expert_axis_of_one():
    assert count_collectives(hlo("d8", "minimal", True), "all-to-all") == 0


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["d2e4", "d8"])
def test_nothing_is_gathered_or_permuted(mesh):
    text = hlo(mesh, "minimal", True)
    for kind in ("all-gather", "collective-permute", "reduce-scatter"):
        assert count_collectives(text, kind) == 0, kind


def test_a_step_that_is_not_finite_changes_nothing_but_counters():
    broken = jax.tree.map(np.copy, initial_state())
    broken.params["decoder"]["norm"]["scale"][0] = np.inf
    state, metrics = run_step("d1", scope="group", state=broken)
    jax.tree.map(np.testing.assert_array_equal, state.params, broken.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, broken.opt_state)
    assert (state.step, state.data_index, state.skipped_steps) == (1, 1, 1)
    assert metrics["state/skipped_in_a_row"] == 1
    assert metrics["state/taken"] == 1, "its batch is passed over, not waited for"


@pytest.mark.parametrize("index", [1, -1])
def test_a_step_whose_batch_is_not_the_next_one_changes_nothing(index):
    start = dataclasses.replace(
        initial_state(), step=np.int32(7), skipped_steps=np.int32(3)
    )
    state, metrics = run_step("d1", scope="group", state=start, index=index)
    assert metrics["state/taken"] == 0
    assert np.isfinite(metrics["loss/total"])
    jax.tree.map(
        functools.partial(np.testing.assert_array_equal, strict=True), state, start
    )


def test_a_step_whose_batch_is_not_the_next_one_is_no_non_finite_one():
    start = dataclasses.replace(initial_state(), skipped_in_a_row=np.int32(2))
    broken = jax.tree.map(np.copy, start)
    broken.params["decoder"]["norm"]["scale"][0] = np.inf
    for state in (start, broken):
        after, metrics = run_step("d1", scope="group", state=state, index=5)
        assert (after.skipped_steps, after.skipped_in_a_row) == (0, 2)
        assert metrics["state/skipped_in_a_row"] == 2


def biases(tree) -> list[np.ndarray]:
    """Everything in the tree that belongs to a selection bias."""
    return [
        leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
        if "selection_bias" in jax.tree_util.keystr(path)
    ]


def state_with_biases(value: float):
    """Equal biases choose as none do, but a decay of them would show."""
    state = jax.tree.map(np.copy, initial_state(biased=True))
    (bias_PE,) = biases(state.params)
    bias_PE[...] = value
    return state


def test_a_selection_bias_moves_by_its_rate_against_the_load_of_the_whole_batch():
    state, metrics = run_step("d1", biased=True, state=state_with_biases(0.5))
    # Loads are chosen counts over their sum; no expert is at the mean here.
    above_PE = metrics["router/load"] > 1 / 8
    assert np.all(above_PE.any(axis=1) & ~above_PE.all(axis=1))
    assert np.all(np.abs(metrics["router/load"] - 1 / 8) > 1e-4)
    rate = np.float32(BIASED.bias_update_rate)
    (bias_PE,) = biases(state.params)
    half = np.float32(0.5)
    np.testing.assert_array_equal(
        bias_PE, np.where(above_PE, half - rate, half + rate), strict=True
    )
    moments = biases(state.opt_state)
    assert len(moments) == 2
    for moment_PE in moments:
        assert not moment_PE.any()


def test_a_selection_bias_stays_where_no_expert_is_above_the_mean():
    batch = jax.tree.map(np.zeros_like, make_batch())  # padding: all counts are 0
    start = state_with_biases(0.5)
    state, metrics = run_step("d1", biased=True, state=start, batch=batch)
    assert metrics["state/taken"] == 1
    np.testing.assert_array_equal(biases(state.params), biases(start.params))
    # Something did happen: matrices decay.
    assert np.all(np.abs(state.params["head"]) <= np.abs(start.params["head"]))
    assert np.any(state.params["head"] != start.params["head"])


def test_biases_and_losses_of_whole_batches_do_not_depend_on_how_it_is_cut():
    expected = run_step("d1", biased=True)
    actual = run_step("d2e4", biased=True, microbatches=2)
    assert expected[1]["loss/importance"] > 1e-3
    assert_same_step(actual, expected)
    np.testing.assert_array_equal(*map(biases, (actual[0].params, expected[0].params)))


@functools.cache
def compile_evaluation(microbatches: int):
    """Scores the batch, twice."""
    learner = make_learner("d2e4", microbatches=microbatches, transport="auto")
    mesh = learner.model.execution.mesh
    by_row = rules.sharding(mesh, ("batch", "length"))
    step = jax.jit(
        functools.partial(eval_step, learner=learner), in_shardings=(None, by_row)
    )
    params = initial_state().params
    batch = {name: np.tile(rows, (2, 1)) for name, rows in make_batch().items()}
    with jax.set_mesh(mesh):
        compiled = step.lower(params, batch).compile()

    def score():
        return jax.device_get(
            compiled(*jax.device_put((params, batch), compiled.input_shardings[0]))
        )

    score.temporaries = compiled.memory_analysis().temp_size_in_bytes
    return score


def test_evaluation_takes_the_microbatches_of_training():
    whole, cut = compile_evaluation(1), compile_evaluation(4)
    (sums, nats_BL), (cut_sums, cut_nats_BL) = whole(), cut()
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6)
    jax.tree.map(close, cut_sums, sums)
    np.testing.assert_allclose(cut_nats_BL, nats_BL, rtol=2e-6, atol=1e-6)
    assert len(np.unique(nats_BL[:B])) > 60  # rows that differ stay in place
    assert cut.temporaries < 0.5 * whole.temporaries


def test_evaluation_drops_nothing_and_draws_nothing():
    score = compile_evaluation(1)
    first, second = score(), score()
    jax.tree.map(np.testing.assert_array_equal, first, second)
    sums, nats_BL = first
    (router,) = sums.router
    assert np.all(router.chosen_PE == router.kept_PE)
    assert router.chosen_PE.sum() > 0
    assert nats_BL.dtype == np.float32
    np.testing.assert_allclose(nats_BL.sum(), sums.cross_entropy, rtol=1e-6)
    unscored_BL = make_batch()["decoder_loss_weights"] == 0
    assert unscored_BL.any()
    np.testing.assert_array_equal(nats_BL == 0, np.tile(unscored_BL, (2, 1)))
