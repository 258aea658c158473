"""Latent attention against loops in float64, its gradients, and on several meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import architecture
from moe.accounting import count
from moe.model import parameters, view
from moe.model.attention import latent
from moe.model.build import build
from moe.model.memories import empty_memories
from moe.model.stack import run
from moe.model.view import Stream
from moe.settings import (
    ExecutionSettings,
    LatentSettings,
    ModelSettings,
    NormSettings,
    PositionSettings,
    RouterSettings,
)
from moe.testing import MESHES
from moe.testing.whole_arrays import forward
from partitioning.mesh import make_mesh
from partitioning.settings import PartitionSettings

B, L, M, N = 2, 7, 8, 2
SEGMENT_BL = np.array([[1, 1, 1, 1, 2, 2, 0], [1] * L], np.int32)
POSITION_BL = np.array([[0, 1, 2, 3, 0, 1, 0], np.arange(L)], np.int32)
SETTINGS = LatentSettings(
    num_heads=N,
    head_dim=4,
    rope_dim=2,
    value_dim=6,
    kv_latent=5,
    query_latent=3,
    positions=PositionSettings("rotary", rotary_base=50.0),
    norm=NormSettings("rms", 1e-2),
)
# Of two numbers that turn, none is slow enough for YaRN: it makes scores larger alone.
YARN = PositionSettings(
    "rotary", rotary_base=50.0, scaling="yarn", factor=4.0, original_length=64
)
KINDS = {
    "all": SETTINGS,
    "no query latent": dataclasses.replace(
        SETTINGS,
        query_latent=0,
        window=3,
        positions=YARN,
        cap=2.0,
        sinks=True,
        gated=True,
    ),
}
MODEL = ModelSettings(
    vocab_size=16,
    num_layers=1,
    model_dim=8,
    num_heads=2,
    head_dim=2,
    mlp_dim=8,
    moe_every=0,
    attention="latent",
    query_latent_dim=4,
    kv_latent_dim=16,
    rope_head_dim=2,
    value_head_dim=4,
)
EXECUTION = ExecutionSettings(dtype="float32", remat="none")


@functools.cache
def given(kind: str):
    """Weights, input, and weights of the output in what is differentiated."""
    draw = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    specs = latent.specs(KINDS[kind], M)
    w = jax.tree.map(lambda spec: array(*spec.shape), specs)
    return w, array(B, L, M), array(B, L, M)


def normalised(scale, x):
    return x / math.sqrt(np.mean(x * x) + 1e-2) * scale


def turned(x, position):
    """One pair of numbers as a complex one; R is 2, so its rate is 1."""
    whole = complex(*x) * complex(math.cos(position), math.sin(position))
    return np.array([whole.real, whole.imag])


def in_loops(w, x_BLM, s: LatentSettings) -> np.ndarray:
    """Every query looks at every key by itself (arXiv:2412.19437, eq. 1 to 11)."""
    y_BLM = np.zeros_like(x_BLM)
    scale = 1 / math.sqrt(6)  # D + R = 4 + 2
    if s.positions == YARN:
        scale *= (0.1 * math.log(4) + 1) ** 2
    for b in range(B):
        keys, values = [], []
        for j in range(L):
            c = normalised(w["kv_norm"]["scale"], x_BLM[b, j] @ w["kv_down"])
            shared = turned(x_BLM[b, j] @ w["rope_key"], POSITION_BL[b, j])
            keys.append([(c @ w["key_up"][:, n], shared) for n in range(N)])
            values.append([c @ w["value_up"][:, n] for n in range(N)])
        for i in range(L):
            c = x_BLM[b, i]
            if s.query_latent:
                c = normalised(w["query_norm"]["scale"], c @ w["query_down"])
            back = s.window or L
            seen = [
                j
                for j in range(max(i - back + 1, 0), i + 1)
                if SEGMENT_BL[b, i] == SEGMENT_BL[b, j]
            ]
            for n in range(N):
                query = c @ w["query_up"][:, n]
                bare, own = query[:4], turned(query[4:], POSITION_BL[b, i])
                scores = np.array([bare @ k[n][0] + own @ k[n][1] for k in keys])
                scores = scores[seen] * scale
                if s.cap:
                    scores = s.cap * np.tanh(scores / s.cap)
                weights = np.exp(scores)
                weights /= weights.sum() + (math.exp(w["sink"][n]) if s.sinks else 0)
                mixed = weights @ np.array([values[j][n] for j in seen])
                if s.gated:
                    mixed /= 1 + np.exp(-x_BLM[b, i] @ w["output_gate"][:, n])
                y_BLM[b, i] += mixed @ w["output"][n]
    return y_BLM


@functools.cache
def computed(kind: str):
    """Output, and gradients of the weights and of the input."""
    w, x_BLM, d_y_BLM = given(kind)
    model = build(MODEL, RouterSettings(), EXECUTION, make_mesh(MESHES["d1"]))
    stream = Stream(SEGMENT_BL, POSITION_BL, SEGMENT_BL, None, np.arange(B))
    seen = view.of_stream(stream, None, model.execution)

    @jax.jit
    def both(w, x_BLM):
        def attended(w, x_BLM):
            s = KINDS[kind]
            return latent.apply(w, x_BLM, seen, None, s, None, 0, model.execution)[0]

        y_BLM, transposed = jax.vjp(attended, w, x_BLM)
        return y_BLM, transposed(jnp.asarray(d_y_BLM))

    return jax.device_get(both(w, x_BLM))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_agree_with_loops(kind):
    w, x_BLM, d_y_BLM = jax.tree.map(lambda x: x.astype(np.float64), given(kind))
    y_BLM, gradients = computed(kind)
    np.testing.assert_allclose(y_BLM, in_loops(w, x_BLM, KINDS[kind]), atol=1e-5)

    leaves, tree = jax.tree.flatten((w, x_BLM))
    draw = np.random.default_rng(1)

    def objective(leaves) -> float:
        return np.sum(
            d_y_BLM * in_loops(*jax.tree.unflatten(tree, leaves), KINDS[kind])
        )

    for place, gradient in enumerate(jax.tree.leaves(gradients)):
        step = draw.normal(size=gradient.shape)
        there, back = list(leaves), list(leaves)
        there[place] = leaves[place] + 1e-5 * step
        back[place] = leaves[place] - 1e-5 * step
        slope = (objective(there) - objective(back)) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * step), slope, rtol=1e-4)


MESH_CASES = {
    "d1": ("d1", PartitionSettings()),
    "latents are gathered": ("c2e2m2", PartitionSettings(fsdp="data")),
    "keys go round": (
        *("c2e2m2",),
        PartitionSettings(context_attention="ring", sequence_parallel=False),
    ),
}


@functools.cache
def learnt(case: str):
    """Logits of a model, and the gradient of a sum of them."""
    mesh, partition = MESH_CASES[case]
    execution = dataclasses.replace(EXECUTION, attention_block=4, remat="minimal")
    model = build(
        MODEL, RouterSettings(), execution, make_mesh(MESHES[mesh]), partition
    )
    draw = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: draw.normal(size=x.shape, scale=0.5).astype(np.float32),
        parameters.shapes(model.specs, "float32"),
    )
    tokens_BL = draw.integers(0, 16, (8, 16)).astype(np.int32)
    place_BL = np.tile(np.arange(16, dtype=np.int32), (8, 1))
    batch = {
        "decoder_input_tokens": tokens_BL,
        "decoder_positions": place_BL % 10,
        "decoder_segment_ids": 1 + place_BL // 10,
    }
    d_logits_BLV = draw.normal(size=(8, 16, 16)).astype(np.float32)

    @jax.jit
    def both(params):
        def objective(params):
            logits_BLV, _ = forward(model, params, batch, jnp.arange(8))
            return jnp.sum(logits_BLV * d_logits_BLV), logits_BLV

        return jax.grad(objective, has_aux=True)(params)

    with jax.set_mesh(make_mesh(MESHES[mesh])):
        return jax.device_get(both(params))


@pytest.mark.parametrize(
    "case",
    ["latents are gathered", pytest.param("keys go round", marks=pytest.mark.slow)],
)
def test_eight_devices_compute_what_one_does(case):
    (gradients, logits), (expected, expected_logits) = learnt(case), learnt("d1")
    np.testing.assert_allclose(logits, expected_logits, atol=2e-5)
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=where)
        assert np.abs(theirs).max() > 0.01, where


@pytest.mark.fast
def test_scores_start_alike_whatever_their_factor():
    def deviation(score_scale: float) -> float:
        s = dataclasses.replace(SETTINGS, score_scale=score_scale)
        return latent.specs(s, M)["query_up"].stddev * s.scale

    for score_scale in (1.0, 0.1):
        assert math.isclose(deviation(score_scale), deviation(0.0))


@pytest.mark.fast
def test_memory_holds_a_latent_and_a_key_whatever_the_heads():
    model = build(
        dataclasses.replace(MODEL, num_heads=64),
        RouterSettings(),
        EXECUTION,
        make_mesh(MESHES["d1"]),
    )
    shapes = [x.shape for x in jax.tree.leaves(empty_memories(model, 3, 5))]
    assert sorted(shapes) == [(1, 3, 5, 2), (1, 3, 5, 16)]
    # D + X = 2 + 4, C = 16: L·(32 - 6) is at most 16·6 up to L = 3.
    (s,) = model.layers.settings("latent")
    assert [s.absorbs(length) for length in (1, 3, 4)] == [True, True, False]


@pytest.mark.fast
def test_minimal_keeps_latents_and_no_keys_that_are_made_of_them():
    widths = {"head_dim": 11, "value_head_dim": 17, "kv_latent_dim": 5}
    wide = dataclasses.replace(MODEL, **widths)

    def kept(remat: str) -> set[int]:
        execution = dataclasses.replace(EXECUTION, remat=remat, attention_block=0)
        mesh = make_mesh(MESHES["d1"])
        model = build(wide, RouterSettings(), execution, mesh)
        stream = Stream(SEGMENT_BL, POSITION_BL, SEGMENT_BL, None, np.arange(B))
        seen = view.of_stream(stream, None, model.execution)

        def through(x_BLM, w):
            stack = model.layers.decoder
            return run(stack, w, x_BLM, seen, None, None, model.execution)[0]

        w = parameters.shapes(model.specs, "float32")["decoder"]
        x_BLM = jax.ShapeDtypeStruct((B, L, 8), "float32")
        left = jax.eval_shape(lambda x, w: jax.vjp(through, x, w)[1], x_BLM, w)
        return {x.shape[-1] for x in jax.tree.leaves(left) if L in x.shape}

    # Keys and queries are 11 + 2 wide.
    assert {13, 17} <= kept("none")
    assert not {11, 13, 17} & kept("minimal")
    assert {4, 5} <= kept("minimal")


@pytest.mark.fast
def test_deepseek_v3_has_671_billion_parameters_of_which_37_are_active():
    model = ModelSettings(
        vocab_size=129_280,
        num_layers=61,
        model_dim=7168,
        num_heads=128,
        head_dim=128,
        mlp_dim=18_432,
        activation="swiglu",
        attention="latent",
        query_latent_dim=1536,
        kv_latent_dim=512,
        rope_head_dim=64,
        predict_ahead=1,
        moe_every=1,
        first_dense_layers=3,
        num_experts=256,
        expert_mlp_dim=2048,
        shared_expert_mlp_dim=2048,
    )
    router = RouterSettings(
        num_selected=8, scores="sigmoid", selection_bias=True, capacity_factor=0.0
    )
    counts = count(architecture.describe(model, router), 4096)
    # Attention of a layer: 7168·1536 + 1536 + 1536·128·192 + 7168·576 + 512
    # + 512·128·256 + 128·128·7168 = 187,107,328. Published: 671B and 37B.
    assert counts.total == 671_026_419_200
    assert round(counts.active / 1e9, 1) == 37.6
    # Its module that looks ahead is published as 11.5B; here 257 experts of 3·7168·2048
    # are 11.32B, attention 0.19B, what joins 0.10B.
    assert round(counts.ahead / 1e9, 1) == 11.6
    # 2 · 128 heads · (192 + 128) of each key, 4096 keys, 61 layers.
    assert counts.scores == 2 * 128 * 320 * 4096 * 61
