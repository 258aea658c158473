"""Logits of attention are measured as loops do, and brought down to their bound."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe import architecture
from moe.model import inventory, parameters
from moe.model.attention import blocks, heads, latent
from moe.model.attention.attend import LargestLogits
from moe.model.attention.mask import Who
from moe.model.attention.scoring import Scoring
from moe.model.build import build
from moe.settings import (
    ExecutionSettings,
    HeadsSettings,
    LatentSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RouterSettings,
)
from moe.training import new_state, qk_clip
from moe.training.optimizer import make_optimizer, make_schedule
from moe.training.train_step import Learner, batch_sums, train_step
from partitioning import rules
from partitioning.mesh import make_mesh
from partitioning.settings import UNCUT, MeshSettings, PartitionSettings

B, L, N, U, D, V = 8, 16, 4, 2, 6, 32
SEGMENTS = np.repeat([[1] * 7 + [2] * 6 + [0] * 3], B, 0).astype(np.int32)


@pytest.mark.parametrize(("block", "devices"), [(0, 1), (5, 1), (3, 4)])
@pytest.mark.parametrize("window", [0, 3])
def test_the_largest_logit_of_each_head_is_that_of_loops(block, devices, window):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(B, L, N, D)).astype(np.float32)
    key = rng.normal(size=(B, L, U, D)).astype(np.float32)
    key[:, 13:] *= 1000  # of padding, which every query has behind it
    # Of four devices the second has this query, and the first this key.
    query[:, 4] *= 10
    key[:, 3] *= 10
    expected, nearby = np.full(N, -np.inf), np.full(N, -np.inf)
    for b in range(B):
        for n in range(N):
            for i in range(L):
                for j in range(i + 1):
                    near = not window or i - j < window
                    if near and SEGMENTS[b, i] == SEGMENTS[b, j] > 0:
                        logit = query[b, i, n] @ key[b, j, n // (N // U)] * 0.5
                        expected[n] = max(expected[n], logit)
                        if i // 4 == j // 4:
                            nearby[n] = max(nearby[n], logit)
    assert np.all(nearby < expected), "the ring must turn for it"
    ring = blocks.Ring("context", devices)

    def on_device(query, key, segment_BL, place_L):
        who = Who(place_L, segment_BL)
        given = query, key, who, who, Scoring(0.5, window)
        return jax.lax.pmax(blocks.largest(*given, block=block, ring=ring), "context")

    cut = PartitionSpec(None, "context")
    found = jax.shard_map(
        on_device,
        mesh=make_mesh(MeshSettings(context=devices)),
        in_specs=(cut, cut, cut, PartitionSpec("context")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    places = np.arange(L, dtype=np.int32)
    actual = jax.jit(found)(query, key, SEGMENTS, places)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("kv_heads", [N, U])
def test_logits_of_every_head_are_times_its_own_factor(kv_heads):
    rng = np.random.default_rng(1)
    s = HeadsSettings(N, kv_heads, D, biases=True)
    w = {
        name: rng.normal(size=(2, *spec.shape)).astype(np.float32)
        for name, spec in heads.specs(s, 10).items()
    }
    x_LM = rng.normal(size=(5, 10))
    factor_PN = np.array([[1.0, 0.5, 0.25, 1.0], [0.1, 1.0, 0.7, 0.2]])

    def logits(w, layer):
        of = {
            name: np.einsum("LM,MND->NLD", x_LM, w[name][layer])
            + w[f"{name}_bias"][layer][:, None]
            for name in ("query", "key")
        }
        key_NLD = np.repeat(of["key"], N // kv_heads, axis=0)
        return np.einsum("NLD,NTD->NLT", of["query"], key_NLD)

    changed = heads.with_logits_times(w, factor_PN, s)
    assert ("key" in changed) == (kv_heads == N)
    for layer in range(2):
        expected = logits(w, layer) * factor_PN[layer][:, None, None]
        np.testing.assert_allclose(
            logits(w | changed, layer), expected, rtol=1e-5, atol=2e-5
        )


@pytest.mark.fast
@pytest.mark.parametrize("frozen", [None, "key_up"])
def test_logits_of_latent_attention_are_times_the_factor_of_their_head(frozen):
    rng = np.random.default_rng(1)
    s = LatentSettings(N, D, rope_dim=4, value_dim=D, kv_latent=7)
    w = {
        name: rng.normal(size=(1, *spec.shape)).astype(np.float32)
        for name, spec in latent.specs(s, 10).items()
        if name != "kv_norm"
    }
    query_LM, latent_TC = rng.normal(size=(5, 10)), rng.normal(size=(6, 7))
    rope_key_TR = rng.normal(size=(6, 4))
    factor_PN = np.array([[1.0, 0.5, 0.25, 0.1]])

    def logits(w):
        query_NLD = np.einsum("LM,MND->NLD", query_LM, w["query_up"][0])
        bare_NTD = np.einsum("TC,CND->NTD", latent_TC, w["key_up"][0])
        bare_NLT = np.einsum("NLD,NTD->NLT", query_NLD[..., :D], bare_NTD)
        return bare_NLT + query_NLD[..., D:] @ rope_key_TR.T

    changed = latent.with_logits_times(w | {frozen or "": None}, factor_PN, s)
    assert set(changed) == {"query_up", "key_up"} - {frozen}
    expected = logits(w) * factor_PN[0][:, None, None]
    np.testing.assert_allclose(logits(w | changed), expected, rtol=1e-5, atol=2e-5)


MODEL = ModelSettings(
    vocab_size=V,
    num_layers=1,
    model_dim=16,
    num_heads=N,
    head_dim=D,
    mlp_dim=16,
    moe_every=0,
    attention_biases=True,
)
LIMIT = 7.0
ALONE = MeshSettings()


def learner_of(
    model: ModelSettings,
    mesh: MeshSettings = ALONE,
    partition: PartitionSettings = UNCUT,
    microbatches: int = 1,
    learning_rate: float = 0.01,
    **execution: object,
) -> Learner:
    settings = OptimizerSettings(
        learning_rate=learning_rate, warmup_steps=0, schedule="constant", eps=1e-3
    )
    execution = ExecutionSettings(dtype="float32", **execution)
    built = build(model, RouterSettings(), execution, make_mesh(mesh), partition)
    return Learner(
        model=built,
        optimizer=make_optimizer(settings, 10, built.specs),
        schedule=make_schedule(settings, 10),
        loss=LossSettings(),
        microbatches=microbatches,
        seed=0,
        qk_clip=LIMIT,
    )


def batch() -> dict[str, np.ndarray]:
    token_BL = np.random.default_rng(0).integers(1, V, (B, L)).astype(np.int32)
    position = np.r_[0:7, 0:6, 0:3].astype(np.int32)
    return {
        "decoder_input_tokens": token_BL,
        "decoder_target_tokens": np.roll(token_BL, -1, axis=1),
        "decoder_loss_weights": (SEGMENTS > 0).astype(np.int32),
        "decoder_segment_ids": SEGMENTS,
        "decoder_positions": np.broadcast_to(position, (B, L)),
    }


def start(learner: Learner):
    """The state of step 0, in which no bias is zero."""
    draw = functools.partial(
        new_state.draw,
        layers=learner.model.layers,
        param_dtype="float32",
        optimizer=learner.optimizer,
    )
    state = jax.device_get(jax.jit(draw)(jax.random.key(0)))
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), state.params
    )
    return dataclasses.replace(state, params=params)


def step(learner: Learner, state):
    """The state after one step where a run has it, and the metrics."""
    model = learner.model
    mesh = model.execution.mesh
    axes = new_state.logical_axes(state, model.layers)
    where = new_state.shardings(state, axes, mesh, model.execution.partition)
    run = jax.jit(
        functools.partial(train_step, learner=learner),
        in_shardings=(
            where,
            rules.sharding(mesh, ("batch", "length")),
            rules.replicated(mesh),
        ),
        out_shardings=(where, None),
    )
    with jax.set_mesh(mesh):
        return jax.device_get(run(state, batch(), np.int32(0)))


def test_heads_above_the_bound_are_brought_down_to_it_and_others_left():
    # At so small a rate the optimizer changes nothing: what moves was clipped.
    learner = learner_of(MODEL, learning_rate=1e-30)
    before = start(learner)
    after, metrics = step(learner, before)

    @jax.jit
    def largest_N(params):
        sums, _ = batch_sums(params, batch(), jax.random.key(0), learner)
        return sums.logits[0].logit_N[0]

    old_N, new_N = largest_N(before.params), largest_N(after.params)
    assert np.min(old_N) < LIMIT < np.max(old_N), "some are above, and some are not"
    np.testing.assert_allclose(new_N, np.minimum(old_N, LIMIT), rtol=1e-5)
    np.testing.assert_allclose(metrics["attention/max_logit"], np.max(old_N), 1e-6)
    assert metrics["attention/clipped_heads"] == np.sum(old_N > LIMIT)
    moved = {
        jax.tree_util.keystr(path[-1:], simple=True)
        for (path, new), old in zip(
            jax.tree.leaves_with_path(after.params),
            jax.tree.leaves(before.params),
            strict=True,
        )
        if np.any(new != old)
    }
    assert moved == {"query", "key", "query_bias", "key_bias"}


SHARED = dataclasses.replace(
    MODEL, num_layers=2, num_kv_heads=U, positions="relative", attention_biases=False
)
CASES = {
    "c2m2-ring-x2": (
        MeshSettings(data=2, context=2, model=2),
        PartitionSettings(fsdp="data", context_attention="ring"),
        {"attention_block": 3},
    ),
    "d2c2m2-gathered": (
        MeshSettings(data=2, context=2, model=2),
        PartitionSettings(fsdp="optimizer"),
        {"attention_block": 0},
    ),
}
SLOW = {"d2c2m2-gathered"}


@functools.cache
def on_one_device():
    learner = learner_of(SHARED)
    return step(learner, start(learner))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES],
)
def test_logits_of_all_devices_and_microbatches_count(name):
    mesh, partition, execution = CASES[name]
    learner = learner_of(SHARED, mesh, partition, 2, **execution)
    (state, metrics), (whole, wanted) = step(learner, start(learner)), on_one_device()
    assert 0 < wanted["attention/clipped_heads"] < 2 * N
    for quantity in ("attention/max_logit", "attention/clipped_heads"):
        np.testing.assert_allclose(metrics[quantity], wanted[quantity], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        state.params,
        whole.params,
    )


@pytest.mark.fast
def test_layers_that_share_parameters_are_clipped_by_the_largest_of_them():
    model = dataclasses.replace(MODEL, num_layers=2, layer_sharing="all")
    layers = architecture.describe(model, RouterSettings())
    (place,) = qk_clip.attentions(layers)
    shapes = parameters.shapes(inventory.specs(layers), "float32")
    params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
    # Of the heads the first layer's are 4, 28, 4, 4, the second's 4, 7, 14, 4.
    most_PN = np.array([[4.0, 28, 4, 4], [4, 7, 14, 4]])
    clipped = qk_clip.clip(params, [LargestLogits(most_PN)], layers, LIMIT)
    weights = clipped[place.stack]["layers"][0][0][place.sublayer.name]
    for name in ("query", "key"):
        assert weights[name].shape == (1, MODEL.model_dim, N, D)
        of_heads = np.array([1, 0.5, 0.5**0.5, 1])  # the root of 7 / 28 and of 7 / 14
        np.testing.assert_allclose(weights[name][0, 0, :, 0], of_heads, rtol=1e-6)
