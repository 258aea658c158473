"""Tokens after the next: the loss and its gradient in loops, segments, and meshes."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from moe import architecture
from moe.accounting import count
from moe.model import multi_token, parameters
from moe.model.build import build
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RouterSettings,
)
from moe.testing import MESHES
from moe.training import losses
from moe.training.optimizer import make_optimizer, make_schedule
from moe.training.train_step import Learner, batch_sums
from partitioning.mesh import make_mesh
from partitioning.settings import PartitionSettings

B, L, V, M = 8, 16, 16, 8
DENSE = ModelSettings(
    vocab_size=V,
    num_layers=1,
    model_dim=M,
    num_heads=1,
    head_dim=4,
    mlp_dim=8,
    activation="relu",
    positions="none",
    moe_every=0,
    predict_ahead=2,
)
SPARSE = dataclasses.replace(
    DENSE,
    num_heads=2,
    moe_every=1,
    num_experts=4,
    expert_mlp_dim=8,
    positions="relative",
    dropout=0.1,
    predict_ahead=1,
)
ROUTER = RouterSettings(
    num_selected=2, selection_bias=True, group_size=4, capacity_factor=1.0
)
# Name of a mesh, microbatches, and what is cut besides.
RUNS = {
    "one device": ("d1", 1, PartitionSettings()),
    "eight": ("c2e2m2", 2, PartitionSettings(fsdp="data")),
}


@functools.cache
def batch():
    """Rows of two documents and padding; the first third of each is given."""
    draw = np.random.default_rng(0)
    found = {
        f"decoder_{name}": np.zeros((B, L), np.int32)
        for name in ("input_tokens", "target_tokens", "segment_ids", "positions")
    } | {"decoder_loss_weights": np.zeros((B, L), np.int32)}
    for row in range(B):
        stops = np.sort(draw.choice(np.arange(3, L), 2, replace=False))
        for segment, (start, stop) in enumerate(zip([0, stops[0]], stops, strict=True)):
            token = draw.integers(1, V, stop - start)
            place = np.arange(stop - start)
            for name, value in (
                ("input_tokens", np.where(place, np.roll(token, 1), 0)),
                ("target_tokens", token),
                ("segment_ids", segment + 1),
                ("positions", place),
                ("loss_weights", place >= (stop - start) // 3),
            ):
                found[f"decoder_{name}"][row, start:stop] = value
    return found


@functools.cache
def run_of(settings: ModelSettings, case: str):
    """Weights, and a function of them to the gradient of the loss and its parts."""
    mesh, microbatches, partition = RUNS[case]
    execution = ExecutionSettings(
        dtype="float32", transport="all_to_all", remat="none", scan_layers=False
    )
    mesh = make_mesh(MESHES[mesh])
    model = build(settings, ROUTER, execution, mesh, partition)
    learner = Learner(
        model,
        make_optimizer(OptimizerSettings(), 1, model.specs),
        make_schedule(OptimizerSettings(), 1),
        LossSettings(ahead_weight=0.25),
        microbatches,
        seed=0,
    )
    draw = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: draw.normal(size=x.shape, scale=0.5).astype(np.float32),
        parameters.shapes(model.specs, "float32"),
    )

    @jax.jit
    def run(params, key):
        def objective(params):
            sums, _ = batch_sums(params, batch(), key, learner)
            value, metrics = losses.total(sums, learner.loss)
            return value, (metrics, sums)

        return jax.grad(objective, has_aux=True)(params)

    def under_mesh(params, key):
        with jax.set_mesh(mesh):
            return jax.device_get(run(params, key))

    return params, under_mesh


# ------------------------------------------------------------------------- the oracle


def normalised(w, x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * w["scale"]


def layer(w, x_LM, segment_L):
    """One head that sees the past of its document, then a feed-forward."""
    w = jax.tree.map(lambda array: array[0], w)
    given = normalised(w["attention"]["norm"], x_LM)
    query, key, value = (
        given @ w["attention"][name][:, 0] for name in ("query", "key", "value")
    )
    mixed = np.zeros_like(value)
    for i in range(L):
        seen = [j for j in range(i + 1) if segment_L[i] == segment_L[j]]
        weights = np.exp([query[i] @ key[j] / 2 for j in seen])  # √4
        mixed[i] = weights @ value[seen] / weights.sum()
    x_LM = x_LM + mixed @ w["attention"]["output"][0]
    given = normalised(w["dense"]["norm"], x_LM)
    return x_LM + np.maximum(given @ w["dense"]["up"], 0) @ w["dense"]["down"]


def nats(params, x_M, target) -> float:
    logits = x_M @ params["head"]
    return math.log(np.exp(logits).sum()) - logits[target]


def losses_in_loops(params) -> tuple[float, list[float]]:
    """Cross-entropy of the next token, and of each after it."""
    total, number = np.zeros((2, 3))
    for row in range(B):
        one = {name: array[row] for name, array in batch().items()}
        token, target, segment, weight = (
            one[f"decoder_{name}"]
            for name in ("input_tokens", "target_tokens", "segment_ids", "loss_weights")
        )
        embedding = params["embedding"] * math.sqrt(M)
        x = layer(params["decoder"]["layers"][0][0], embedding[token], segment)
        x = top = normalised(params["decoder"]["norm"], x)
        for k in range(3):
            if k:
                w = params["ahead"]["modules"][k - 1]
                # Beyond the document there is nothing to read, and nothing learnt.
                read = [target[i + k - 1] if i + k - 1 < L else 0 for i in range(L)]
                both = (
                    normalised(w["stream_norm"], x),
                    normalised(w["token_norm"], embedding[read]),
                )
                x = np.concatenate(both, axis=1) @ w["join"]
                x = layer(params["ahead"]["layers"][k - 1][0], x, segment)
                top = normalised(w["norm"], x)
            for i in range(L - k):
                inside = segment[i] == segment[i + k] > 0
                if inside and weight[i] and weight[i + k]:
                    total[k] += nats(params, top[i], target[i + k])
                    number[k] += 1
    assert number[0] > number[1] > number[2] > 20
    mean = total / number
    return mean[0], list(mean[1:])


# -------------------------------------------------------------------------- the tests


def test_the_loss_and_its_gradient_agree_with_loops():
    params, run = run_of(DENSE, "one device")
    gradients, (metrics, _) = run(params, jax.random.key(0))
    wide = jax.tree.map(lambda x: x.astype(np.float64), params)
    following, after = losses_in_loops(wide)
    np.testing.assert_allclose(metrics["loss/nats_per_token"], following, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/ahead"], np.mean(after), rtol=1e-5)
    expected = following + 0.25 * np.mean(after)
    np.testing.assert_allclose(metrics["loss/total"], expected, rtol=1e-5)

    leaves, tree = jax.tree.flatten(wide)
    draw = np.random.default_rng(2)

    def objective(leaves) -> float:
        following, after = losses_in_loops(jax.tree.unflatten(tree, leaves))
        return following + 0.25 * np.mean(after)

    for place, gradient in enumerate(jax.tree.leaves(gradients)):
        step = draw.normal(size=gradient.shape)
        there, back = list(leaves), list(leaves)
        there[place] = leaves[place] + 1e-5 * step
        back[place] = leaves[place] - 1e-5 * step
        slope = (objective(there) - objective(back)) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * step), slope, rtol=1e-3, atol=1e-6)


def test_eight_devices_and_microbatches_learn_what_one_does():
    (params, one), (_, eight) = (run_of(SPARSE, case) for case in RUNS)
    key = jax.random.key(0)
    (expected, (metrics, sums)), (gradients, (ours, our_sums)) = (
        run(params, key) for run in (one, eight)
    )
    for name in ("loss/ahead", "loss/total", "loss/balance"):
        np.testing.assert_allclose(ours[name], metrics[name], rtol=1e-5, err_msg=name)
    for (path, own), other in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-5, err_msg=where)
    # Of the module's experts, choices are counted, and move their biases.
    assert len(sums.router) == 1
    assert len(sums.routers) == 2
    for totals, others in zip(our_sums.routers, sums.routers, strict=True):
        np.testing.assert_array_equal(totals.chosen_PE, others.chosen_PE)
    tokens = [int(totals.tokens_P[0]) for totals in sums.routers]
    assert tokens[0] > tokens[1] > 0


@pytest.mark.fast
def test_features_are_of_the_same_segment_and_weighed_by_both_ends():
    row = {
        "target_tokens": [11, 12, 13, 14, 25, 26, 0, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 0, 0],
        "loss_weights": [0, 1, 1, 1, 1, 1, 0, 0],
    }
    given = {f"decoder_{name}": np.array([values]) for name, values in row.items()}
    ahead = architecture.describe(DENSE, ROUTER).ahead
    found = {
        name: array[0].tolist()
        for name, array in multi_token.features(given, ahead).items()
    }
    assert found == {
        "ahead_1_input_tokens": [11, 12, 13, 14, 25, 26, 0, 0],
        "ahead_1_target_tokens": [12, 13, 14, 25, 26, 0, 0, 0],
        "ahead_1_segment_ids": [1, 1, 1, 0, 2, 0, 0, 0],
        "ahead_1_loss_weights": [0, 1, 1, 0, 1, 0, 0, 0],
        "ahead_2_input_tokens": [12, 13, 14, 25, 26, 0, 0, 0],
        "ahead_2_target_tokens": [13, 14, 25, 26, 0, 0, 0, 0],
        "ahead_2_segment_ids": [1, 1, 0, 0, 0, 0, 0, 0],
        "ahead_2_loss_weights": [0, 1, 0, 0, 0, 0, 0, 0],
    }


@pytest.mark.fast
def test_scoring_and_counts_leave_the_modules_out():
    plain = dataclasses.replace(SPARSE, predict_ahead=0)
    layers, alone = (architecture.describe(m, ROUTER) for m in (SPARSE, plain))
    assert layers._replace(ahead=None) == alone
    counts, others = count(layers, L), count(alone, L)
    assert dataclasses.replace(counts, ahead=0, ahead_flops=0) == others
    # A layer: four projections of 8·8, two norms of 8; a router of 8·4, its bias of 4,
    # and experts of 2·8·8 in all 4 of them. A module besides: 16·8, three norms of 8.
    assert counts.ahead == 4 * 64 + 2 * 8 + 32 + 4 + 4 * 128 + 128 + 24
    # Operations of a module: 2 for each weight of a product met (two of the experts),
    # 4·N·D·L of scores, and the output's.
    products = 4 * 64 + 32 + 2 * 128 + 128 + M * V
    assert counts.ahead_flops == 2 * products + 4 * 8 * L
    assert counts.train_flops_per_token == others.train_flops_per_token + 3 * (
        counts.ahead_flops
    )
