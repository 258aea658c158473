"""A whole step is the same whatever of it is cut: sequences, widths, weights, experts.

Steps on meshes that cut batches and experts alone are in `test_train_step.py`.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from moe.model.build import build
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RouterSettings,
)
from moe.training import new_state
from moe.training.optimizer import make_optimizer, make_schedule
from moe.training.train_state import TrainState
from moe.training.train_step import Learner, train_step
from partitioning import grid, rules
from partitioning.mesh import make_mesh
from partitioning.settings import AXES, UNCUT, MeshSettings, PartitionSettings

B, L, V = 16, 16, 32
BASE = ModelSettings(
    vocab_size=V,
    num_layers=4,
    model_dim=16,
    num_heads=8,
    head_dim=4,
    mlp_dim=16,
    num_experts=8,
    expert_mlp_dim=16,
)
# Two models that have every part between them, and draw and drop. Groups of the first
# span two rows, and its balance is that of single sequences.
MODELS = {
    "biased": dataclasses.replace(
        BASE,
        activation="gelu",
        expert_activation="geglu",
        mlp_biases=True,
        expert_biases=True,
        attention_biases=True,
        attention_output_bias=True,
        norm="layer",
        positions="relative",
        moe_position="first",
        tie_embeddings=True,
        dropout=0.1,
        shared_expert_mlp_dim=8,
        shared_expert_gate=True,
    ),
    "plain": dataclasses.replace(
        BASE,
        num_layers=3,
        first_dense_layers=1,
        activation="swiglu",
        num_kv_heads=4,
        positions="learned",
        max_positions=L,
    ),
}
# An encoder and a decoder, with routers of their own.
MODELS["two"] = dataclasses.replace(
    BASE,
    shape="encoder_decoder",
    num_layers=2,
    num_encoder_layers=4,
    activation="geglu",
    positions="relative",
    tie_embeddings=True,
    dropout=0.1,
)
EXECUTIONS = {
    "biased": ExecutionSettings(
        dtype="float32", transport="all_to_all", vocab_chunks=2
    ),
    "plain": ExecutionSettings(dtype="float32", transport="ragged", attention_block=4),
    "two": ExecutionSettings(dtype="float32", transport="all_to_all", vocab_chunks=2),
}
ROUTERS = {
    "biased": RouterSettings(
        num_selected=2,
        renormalize="before_drop",
        second_policy="random",
        jitter=0.05,
        group_size=4,
        group_rows=2,
        min_capacity=1,
        capacity_factor=1.0,
    ),
    "plain": RouterSettings(
        num_selected=2,
        scores="sigmoid",
        renormalize="after_drop",
        selection_bias=True,
        group_size=2,
        min_capacity=1,
        capacity_factor=1.0,
    ),
}
ROUTERS["two"] = dataclasses.replace(
    ROUTERS["plain"], renormalize="before_drop", bias_update="quantile", group_size=2
)
ENCODER_ROUTER = RouterSettings(
    num_selected=2,
    jitter=0.05,
    selection_bias=True,
    slot_order="batch_priority",
    group_size=8,
    group_rows=2,
    min_capacity=1,
    capacity_factor=1.0,
)
LOSSES = {
    "biased": LossSettings(
        balance_weight=0.1, balance_scope="sequence", router_z_weight=0.01
    ),
    "plain": LossSettings(
        balance_weight=0.1,
        balance_scope="global",
        importance_weight=0.1,
        z_weight=1e-3,
    ),
    "two": LossSettings(
        balance_weight=0.1, router_z_weight=0.01, z_weight=1e-3, label_smoothing=0.1
    ),
}
# A large eps keeps the update from being a mere sign of the gradient.
OPTIMIZER = OptimizerSettings(
    learning_rate=1e-2, warmup_steps=0, schedule="constant", eps=1e-3, clip_norm=0.5
)

ALONE = MeshSettings()


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how its step is cut."""

    model: str
    mesh: MeshSettings = ALONE
    partition: PartitionSettings = UNCUT
    microbatches: int = 1
    remat: str = "minimal"


def case(model: str, mesh: dict, microbatches=1, remat="minimal", **partition) -> Case:
    return Case(
        model,
        MeshSettings(**mesh),
        PartitionSettings(**partition),
        microbatches,
        remat,
    )


RING = {"context_attention": "ring"}
NO_SP = {"sequence_parallel": False}
WHOLE_EXPERTS = {"expert_tensor_parallel": False}
CASES = {
    "d2e2m2-fsdp": case(
        "biased", {"data": 2, "expert": 2, "model": 2}, fsdp="data_expert"
    ),
}
SLOW = {
    "c2e2m2-ring-fsdp-two": case(
        "two", {"context": 2, "expert": 2, "model": 2}, 2, fsdp="data", **RING
    ),
    "d2c2m2-ring-fsdp-x2": case(
        "biased", {"data": 2, "context": 2, "model": 2}, 2, fsdp="data", **RING
    ),
    "c2e2m2-no_sp-whole_experts-zero1": case(
        "plain",
        {"context": 2, "expert": 2, "model": 2},
        fsdp="optimizer",
        **NO_SP,
        **WHOLE_EXPERTS,
    ),
    "d2c2m2-ring-fsdp-x2-plain": case(
        "plain", {"data": 2, "context": 2, "model": 2}, 2, fsdp="data", **RING
    ),
    "d2e2m2-no_sp-two": case(
        "two", {"data": 2, "expert": 2, "model": 2}, fsdp="data_expert", **NO_SP
    ),
    "r2c2e2-two": case(
        "two", {"replica": 2, "context": 2, "expert": 2}, remat="full", fsdp="optimizer"
    ),
    "c4m2-ring": case("biased", {"context": 4, "model": 2}, **RING),
    "m8": case("biased", {"model": 8}),
    "m4-kv": case("plain", {"data": 2, "model": 4}, remat="full", **NO_SP),
    "c8": case("plain", {"context": 8}, remat="none"),
    "c8-fsdp": case("biased", {"context": 8}, fsdp="data", remat="none"),
    "r2c2e2-ring-x2": case(
        "biased", {"replica": 2, "context": 2, "expert": 2}, 2, fsdp="data", **RING
    ),
    "d2e2m2-whole_experts-fsdp-x2": case(
        "biased",
        {"data": 2, "expert": 2, "model": 2},
        2,
        "full",
        fsdp="data",
        **WHOLE_EXPERTS,
    ),
    "d2e2m2-no_sp-fsdp": case(
        "plain",
        {"data": 2, "expert": 2, "model": 2},
        remat="none",
        fsdp="data_expert",
        **NO_SP,
    ),
    "d2e2-zero1-x2": case("biased", {"data": 2, "expert": 2}, 2, fsdp="optimizer"),
    "d8-fsdp": case("plain", {"data": 8}, remat="full", fsdp="data"),
    "e8-fsdp": case("biased", {"expert": 8}, fsdp="data_expert"),
}


@functools.cache
def make_batch() -> dict[str, np.ndarray]:
    """Rows of two documents with prefixes and a padded tail; the last is padding."""
    rng = np.random.default_rng(1)
    segment = np.repeat([[1] * 7 + [2] * 6 + [0] * 3], B, 0)
    segment[-1] = 0
    position = np.tile(np.r_[0:7, 0:6, 0:3], (B, 1))
    target = np.where(segment > 0, rng.integers(2, V, (B, L)), 0)
    batch = {
        "decoder_target_tokens": target,
        "decoder_input_tokens": np.where(position > 0, np.roll(target, 1, 1), 0),
        "decoder_loss_weights": segment > 0,
        "decoder_segment_ids": segment,
        "decoder_positions": position,
        "decoder_causal_attention": (position < 3) & (segment > 0),
    }
    # Inputs of another length, whose documents are those of the targets.
    segment = np.repeat([[1] * 9 + [2] * 19 + [0] * 4], B, 0)
    segment[-1] = 0
    position = np.tile(np.r_[0:9, 0:19, 0:4], (B, 1))
    batch |= {
        "encoder_input_tokens": np.where(
            segment > 0, rng.integers(2, V, (B, 2 * L)), 0
        ),
        "encoder_segment_ids": segment,
        "encoder_positions": position,
    }
    return {name: array.astype(np.int32) for name, array in batch.items()}


def learner_of(case: Case) -> Learner:
    execution = dataclasses.replace(EXECUTIONS[case.model], remat=case.remat)
    named = MODELS[case.model], ROUTERS[case.model]
    mesh = make_mesh(case.mesh)
    model = build(*named, execution, mesh, case.partition, ENCODER_ROUTER)
    return Learner(
        model=model,
        optimizer=make_optimizer(OPTIMIZER, 100, model.specs),
        schedule=make_schedule(OPTIMIZER, 100),
        loss=LOSSES[case.model],
        microbatches=case.microbatches,
        seed=3,
    )


@functools.cache
def start(model: str) -> TrainState:
    """The state of step 0, in which no bias is zero."""
    learner = learner_of(Case(model))
    draw = functools.partial(
        new_state.draw,
        layers=learner.model.layers,
        param_dtype="float32",
        optimizer=learner.optimizer,
    )
    state = jax.device_get(jax.jit(draw)(jax.random.key(0)))
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), state.params
    )
    return dataclasses.replace(state, params=params)


def step(case: Case) -> tuple[TrainState, dict]:
    """The state after one step under the placement of a real run, and metrics."""
    learner, state = learner_of(case), start(case.model)
    model = learner.model
    mesh = model.execution.mesh
    axes = new_state.logical_axes(state, model.layers)
    places = new_state.shardings(state, axes, mesh, case.partition)
    run = jax.jit(
        functools.partial(train_step, learner=learner),
        in_shardings=(
            places,
            rules.sharding(mesh, ("batch", "length")),
            rules.replicated(mesh),
        ),
        out_shardings=(places, None),
    )
    with jax.set_mesh(mesh):
        batch = {
            name: array
            for name, array in make_batch().items()
            if name.partition("_")[0] in model.layers.stacks
        }
        return jax.device_get(run(state, batch, np.int32(0)))


@functools.cache
def on_one_device(model: str) -> tuple[TrainState, dict]:
    return step(Case(model))


def adam_of(state: TrainState) -> optax.ScaleByAdamState:
    """The moments."""
    parts = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    (adam,) = (part for part in parts if hasattr(part, "mu"))
    return adam


def assert_close(actual, expected) -> None:
    """To 1e-4 of an array's largest entry, or 1e-6 of the largest of all.

    The gradient of a bias of keys is exactly zero: a softmax does not see it. What is
    left of it is the rounding of what cancels.
    """
    most = max(np.abs(x).max() for x in jax.tree.leaves(expected))

    def check(path, a, b):
        bound = max(1e-4 * np.abs(b).max(), 1e-6 * most)
        worst = np.abs(a - b).max()
        assert worst <= bound, (jax.tree_util.keystr(path), worst, bound)

    jax.tree_util.tree_map_with_path(check, actual, expected)


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_step_in_pieces_is_the_step_of_one_device(name):
    case = (CASES | SLOW)[name]
    (state, metrics), (whole, wanted) = step(case), on_one_device(case.model)
    assert wanted["router/dropped_fraction"] > 0.02, "drops are part of the claim"
    assert wanted["optimizer/gradient_norm"] > OPTIMIZER.clip_norm, "so is clipping"
    for quantity, value in wanted.items():
        np.testing.assert_allclose(
            metrics[quantity], value, 2e-5, 1e-6, err_msg=quantity
        )
    # The first moments are the gradients after clipping, times 0.1.
    adam, wanted_adam = adam_of(state), adam_of(whole)
    assert_close(adam.mu, wanted_adam.mu)
    assert_close(adam.nu, wanted_adam.nu)
    assert_close(state.params, whole.params)


@pytest.mark.slow
def test_the_order_of_gathers_changes_places_and_no_number(monkeypatch):
    case = CASES["d2e2m2-fsdp"]
    last_first = step(case)
    where = learner_of(case).model.grid.table["embed"]
    monkeypatch.setattr(grid, "fastest_first", lambda mesh: AXES)
    assert learner_of(case).model.grid.table["embed"] == where[::-1]
    (state, _), (wanted, _) = step(case), last_first
    assert_close(adam_of(state).mu, adam_of(wanted).mu)
    assert_close(state.params, wanted.params)


@pytest.mark.parametrize(
    "model", ["biased", "two", pytest.param("plain", marks=pytest.mark.slow)]
)
def test_every_parameter_learns_but_those_that_a_softmax_does_not_see(model):
    state, _ = on_one_device(model)
    adam = adam_of(state)
    most = max(np.abs(x).max() for x in jax.tree.leaves(adam.mu))
    idle = {
        jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]
        for path, moment in jax.tree.leaves_with_path(adam.mu)
        if np.abs(moment).max() < 1e-6 * most
    }
    of_models = {"biased": {"key_bias"}, "plain": {"selection_bias"}}
    assert idle == of_models.get(model, {"selection_bias"})


def test_both_stacks_are_balanced_and_their_biases_moved():
    state, metrics = on_one_device("two")
    before = start("two").params
    by_stack = {}
    for stack in ("encoder", "decoder"):
        moved = [
            np.abs(block["sparse"]["selection_bias"] - old["sparse"]["selection_bias"])
            for segment, others in zip(
                state.params[stack]["layers"], before[stack]["layers"], strict=True
            )
            for block, old in zip(segment, others, strict=True)
            if "sparse" in block
        ]
        by_stack[stack] = np.concatenate(moved)
    # Each expert's, by one step up or down; of the decoder, to where loads were even.
    np.testing.assert_allclose(by_stack["encoder"], 1e-3, atol=1e-6)
    assert by_stack["decoder"].max() > 0.02
    # Two layers of the encoder, and the decoder's one.
    assert metrics["router/load"].shape == (3, 8)
    np.testing.assert_allclose(metrics["router/load"].sum(axis=1), 1, rtol=1e-5)
    tokens = [28 * (B - 1), 28 * (B - 1), 13 * (B - 1)]
    choices = metrics["ledger/routed_choices"] - metrics["ledger/padding_choices"]
    np.testing.assert_array_equal(choices, [2 * n for n in tokens])
