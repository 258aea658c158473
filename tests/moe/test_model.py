"""The whole transformer: causality, documents, precision, remat, dropout."""

import dataclasses
import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import architecture
from moe.layers import of_kind
from moe.model import inventory, parameters, transformer, view
from moe.model.attention import heads
from moe.model.build import build
from moe.model.feed_forward import dense, experts
from moe.model.head import projection, score_targets
from moe.model.view import Stream
from moe.settings import (
    DenseSettings,
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    RouterSettings,
)
from moe.settings.model import Activation
from moe.testing import MESHES, whole_arrays
from moe.testing.jaxprs import equations
from moe.training import losses
from partitioning.mesh import make_mesh

B, L, V = 8, 8, 16
ROWS = np.arange(B)
MODEL = ModelSettings(
    vocab_size=V,
    num_layers=2,
    model_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    moe_every=1,
    num_experts=5,
    expert_mlp_dim=12,
    tie_embeddings=False,
)
EXECUTION = ExecutionSettings(transport="all_to_all", dtype="float32", remat="none")
TOP1 = RouterSettings(group_size=L, capacity_factor=1.0, min_capacity=1)
TOP2 = dataclasses.replace(TOP1, num_selected=2, renormalize="before_drop")
DENSE = dataclasses.replace(MODEL, moe_every=0)
AUTO = dataclasses.replace(EXECUTION, transport="auto")
NOISY = dataclasses.replace(MODEL, num_experts=16, dropout=0.3)


@functools.cache
def specs_of(settings: ModelSettings):
    return inventory.specs(architecture.describe(settings, RouterSettings()))


def shapes(settings: ModelSettings):
    return parameters.shapes(specs_of(settings), "float32")


@functools.cache
def params_of(settings: ModelSettings):
    """Weights large enough for every part of the model to matter."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32),
        shapes(settings),
    )


@functools.cache
def model_of(settings, router: RouterSettings, execution=EXECUTION, mesh="d1"):
    return build(settings, router, execution, make_mesh(MESHES[mesh]))


@functools.cache
def compiled_forward(settings, router: RouterSettings, execution, mesh="d1"):
    model = model_of(settings, router, execution, mesh)
    return jax.jit(functools.partial(whole_arrays.forward, model))


def make_batch(tokens_BL, segment_BL=None, position_BL=None):
    """One document in every row, if nothing else is said."""
    if segment_BL is None:
        segment_BL = np.ones((B, L))
        position_BL = np.tile(np.arange(L), (B, 1))
    return {
        "decoder_input_tokens": tokens_BL.astype(np.int32),
        "decoder_segment_ids": segment_BL.astype(np.int32),
        "decoder_positions": position_BL.astype(np.int32),
    }


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(1, V, (B, L))


def forward(
    batch,
    router,
    settings=MODEL,
    *,
    execution=EXECUTION,
    key=None,
    mesh="d1",
    row_B=ROWS,
):
    """Logits and router sums; a key makes it a pass of training, with its capacity."""
    run = compiled_forward(settings, router, execution, mesh)
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        return jax.device_get(run(params_of(settings), batch, row_B, key))


# Causality.


@pytest.mark.parametrize(
    ("router", "settings", "execution", "train"),
    [
        (TOP1, MODEL, EXECUTION, True),
        (TOP2, NOISY, EXECUTION, True),
        (TOP2, MODEL, AUTO, False),
    ],
    ids=["top1_with_drops", "top2_with_drops", "top2_dropless"],
)
def test_a_token_changes_no_earlier_logit(router, settings, execution, train):
    key = jax.random.key(7) if train else None
    diagonal = ROWS, ROWS  # row b is changed at its token b
    changed_BL = tokens().copy()
    changed_BL[diagonal] = 1 + tokens()[diagonal] % (V - 1)
    (before, (sums,)), (after, _) = (
        forward(make_batch(x), router, settings, execution=execution, key=key)
        for x in (tokens(), changed_BL)
    )
    dropped = 1 - sums.kept_GE.sum() / sums.chosen_GE.sum()
    assert dropped > 0.05 if train else dropped == 0
    assert np.all(np.any(before[diagonal] != after[diagonal], axis=-1))
    earlier_BL = np.tril(np.ones((B, L), bool), -1)
    np.testing.assert_array_equal(before[earlier_BL], after[earlier_BL])


# Documents and positions.

SEGMENT_BL = np.tile([1, 1, 1, 2, 2, 2, 2, 0], (B, 1))
POSITION_BL = np.tile([0, 1, 2, 0, 1, 2, 3, 0], (B, 1))


def test_documents_of_a_row_do_not_see_each_other():
    changed_BL = np.where(SEGMENT_BL == 1, 1 + tokens() % (V - 1), tokens())
    before, after = (
        forward(make_batch(x, SEGMENT_BL, POSITION_BL), TOP2)[0]
        for x in (tokens(), changed_BL)
    )
    np.testing.assert_array_equal(before[SEGMENT_BL == 2], after[SEGMENT_BL == 2])
    assert np.all(np.any(before != after, axis=-1) == (SEGMENT_BL == 1))


def test_a_packed_document_has_the_logits_it_has_alone():
    packed, _ = forward(make_batch(tokens(), SEGMENT_BL, POSITION_BL), TOP2)
    alone, _ = forward(
        make_batch(
            np.roll(tokens(), -3, axis=1),
            np.tile([1, 1, 1, 1, 0, 0, 0, 0], (B, 1)),
            np.tile([0, 1, 2, 3, 0, 0, 0, 0], (B, 1)),
        ),
        TOP2,
    )
    # Logits are of order 1; the two differ in the order of float32 sums.
    np.testing.assert_allclose(packed[:, 3:7], alone[:, :4], rtol=1e-5, atol=1e-5)


def test_attention_sees_differences_of_positions_only():
    model = model_of(DENSE, TOP1)
    (block,) = model.layers.decoder.kinds_of_layers
    (settings,) = of_kind(block, "heads")
    layers = params_of(DENSE)["decoder"]["layers"]
    weights = jax.tree.map(lambda x: x[0], layers[0][0]["attention"])
    x_BLM = np.random.default_rng(2).normal(size=(1, L, 8)).astype(np.float32)
    ones_BL = np.ones((1, L), np.int32)

    @jax.jit
    def run(position_L):
        stream = Stream(ones_BL, position_L[None], ones_BL, None, np.arange(1))
        seen = view.of_stream(stream, None, model.execution)
        given = weights, x_BLM, seen, None, settings, None, 0, model.execution
        return heads.apply(*given)[0]

    place_L = np.arange(L)
    # Angles up to 107 rad are rounded by 107 · 2⁻²⁴ = 6e-6.
    np.testing.assert_allclose(run(place_L + 100), run(place_L), rtol=0, atol=1e-4)
    assert np.abs(run(3 * place_L) - run(place_L)).max() > 0.01


# Feed-forward layers.


def gelu(x):
    """The approximation by tanh (arXiv:1606.08415, section 2)."""
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x):
    """x times the probability that a unit normal is below x."""
    return x * np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))(x)


def swiglu_clamped(up, gate):
    """Gates of up to 7, and one more than what they gate, within 7 of 0."""
    gate = np.minimum(gate, 7)
    return gate / (1 + np.exp(-1.702 * gate)) * (np.clip(up, -7, 7) + 1)


ACTIVATIONS = {
    "relu": lambda up, gate: np.maximum(up, 0),
    "relu_squared": lambda up, gate: np.maximum(up, 0) ** 2,
    "gelu": lambda up, gate: gelu(up),
    "gelu_exact": lambda up, gate: gelu_exact(up),
    "geglu": lambda up, gate: gelu(gate) * up,
    "geglu_exact": lambda up, gate: gelu_exact(gate) * up,
    "swiglu": lambda up, gate: gate / (1 + np.exp(-gate)) * up,
    "swiglu_clamped": swiglu_clamped,
}
GATED = ("geglu", "geglu_exact", "swiglu", "swiglu_clamped")


@pytest.mark.parametrize(
    ("activation", "biases"),
    [*((name, False) for name in ACTIVATIONS), ("gelu", True), ("swiglu", True)],
)
def test_dense_layers_and_experts_apply_their_activation(activation, biases):
    rng = np.random.default_rng(3)
    E, M, F = 2, 4, 6
    up, gate = rng.normal(size=(2, E, M, F)).astype(np.float32)
    up_bias, gate_bias = biases * rng.normal(size=(2, E, 1, F)).astype(np.float32)
    down = rng.normal(size=(E, F, M)).astype(np.float32)
    down_bias = biases * rng.normal(size=(E, 1, M)).astype(np.float32)
    x_ERM = rng.normal(size=(E, 3, M)).astype(np.float32)
    clamps = activation == "swiglu_clamped"
    if clamps:  # some gates, and some of what they gate
        x_ERM *= 4
    hidden_ERF = ACTIVATIONS[activation](x_ERM @ up + up_bias, x_ERM @ gate + gate_bias)
    expected_ERM = hidden_ERF @ down + down_bias
    # A gate and what it gates lie side by side, the gate first.
    w = {"up": up, "down": down, "up_bias": up_bias[:, 0], "down_bias": down_bias[:, 0]}
    if activation in GATED:
        w["up"] = np.stack([gate, up], axis=2)
        w["up_bias"] = np.concatenate([gate_bias, up_bias], axis=1)
    if not biases:
        del w["up_bias"], w["down_bias"]

    @jax.jit
    def run(w, x_ERM):
        one = jax.tree.map(lambda matrices: matrices[0], w)
        assert dense.specs(DenseSettings(F, activation, biases), M).keys() == w.keys()
        experts_ERM = experts.padded(w, x_ERM, activation)
        return experts_ERM, dense.feed_forward(one, x_ERM[:1], activation)

    experts_ERM, dense_1RM = run(w, x_ERM)
    atol = 1e-6 * np.abs(expected_ERM).max() if clamps else 1e-5
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=atol)
    close(experts_ERM, expected_ERM)
    close(dense_1RM, expected_ERM[:1])


@pytest.mark.fast
def test_every_activation_is_compared():
    assert set(get_args(Activation)) == set(ACTIVATIONS)


@pytest.mark.fast
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activations_have_a_gate_beside_every_up_projection(activation):
    settings = dataclasses.replace(
        MODEL,
        activation=activation,
        moe_every=2,
        mlp_biases=True,
        expert_biases=True,
    )
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
        for path, x in jax.tree.leaves_with_path(shapes(settings))
    }
    pair = (2,) if activation in GATED else ()
    M, F, E = settings.model_dim, settings.mlp_dim, settings.num_experts
    # One period of two layers.
    below, above = "decoder/layers/0/0/dense", "decoder/layers/0/1/sparse/experts"
    assert sizes[f"{below}/up"] == (1, M, *pair, F)
    assert sizes[f"{below}/up_bias"] == (1, *pair, F)
    assert sizes[f"{below}/down_bias"] == (1, M)
    assert sizes[f"{above}/up"] == (1, E, M, *pair, F)
    assert sizes[f"{above}/up_bias"] == (1, E, *pair, F)
    assert sizes[f"{above}/down"] == (1, E, F, M)
    assert not [path for path in sizes if path.endswith("/gate")]
    logits_BLV, _ = jax.eval_shape(
        functools.partial(whole_arrays.forward, model_of(settings, TOP2)),
        shapes(settings),
        make_batch(tokens()),
        ROWS,
    )
    assert (logits_BLV.shape, logits_BLV.dtype) == ((B, L, V), jnp.float32)


@pytest.mark.fast
def test_layers_at_the_bottom_are_dense_and_those_above_them_repeat():
    settings = dataclasses.replace(
        MODEL, num_layers=7, first_dense_layers=3, moe_every=2
    )
    tree = shapes(settings)
    (first,), (below, above) = tree["decoder"]["layers"]
    sparse = ["sparse" in block for block in (first, below, above)]
    assert sparse == [False, False, True]
    for block, number in ((first, 3), (below, 2), (above, 2)):
        assert {x.shape[0] for x in jax.tree.leaves(block)} == {number}
    _, (sums,) = jax.eval_shape(
        functools.partial(whole_arrays.forward, model_of(settings, TOP2)),
        tree,
        make_batch(tokens()),
        ROWS,
    )
    assert sums.kept_GE.shape == (2, B, settings.num_experts)
    assert len(shapes(MODEL)["decoder"]["layers"]) == 1


@pytest.mark.fast
def test_initial_weights_have_the_variance_that_is_asked_for():
    settings = dataclasses.replace(
        MODEL,
        vocab_size=512,
        moe_every=2,
        model_dim=64,
        num_heads=8,
        head_dim=16,
        mlp_dim=96,
        expert_mlp_dim=96,
        positions="relative_per_layer",
        relative_buckets=512,
        relative_max_distance=1024,
        tie_embeddings=False,
        init_scale=0.1,
    )

    layers = architecture.describe(settings, RouterSettings())

    @jax.jit
    def deviations(key):
        params = inventory.draw(layers, key, "float32")
        ((below, above),) = params["decoder"]["layers"]
        attention = below["attention"]
        tables = {name: params[name] for name in ("embedding", "head")}
        tables |= {
            "relative": attention.pop("distance"),
            "router": above["sparse"]["router"],
        }
        return jax.tree.map(
            jnp.std,
            {
                "feed_forward": below["dense"],
                "experts": above["sparse"]["experts"],
                "attention": attention,
                "tables": tables,
            },
        )

    found = deviations(jax.random.key(0))
    # Of 4,000 draws or more, to within 5 %.
    close = functools.partial(np.testing.assert_allclose, rtol=0.05)
    for weights in (found["feed_forward"], found["experts"]):
        close(weights["up"], np.sqrt(0.1 / 64))
        close(weights["down"], np.sqrt(0.1 / 96))
    for name in ("query", "key", "value"):
        close(found["attention"][name], np.sqrt(0.1 / 64))
    close(found["attention"]["output"], np.sqrt(0.1 / 128))
    close(found["tables"]["head"], np.sqrt(0.1 / 64))
    close(found["tables"]["relative"], np.sqrt(0.1 / ((512 + 8) / 2)))
    # Embeddings have unit variance where they meet the layers, √M further on.
    close(found["tables"]["embedding"], np.sqrt(1 / 64))
    close(found["tables"]["router"], 0.02, rtol=0.1)


@pytest.mark.fast
def test_learned_positions_start_at_half_the_size_of_tokens():
    # GPT-2 and GPT-3 draw tokens with 0.02 and positions with 0.01.
    settings = dataclasses.replace(
        MODEL, vocab_size=512, model_dim=64, positions="learned", max_positions=512
    )
    layers = architecture.describe(settings, RouterSettings())
    specs = {name: inventory.specs(layers)[name] for name in ("embedding", "positions")}
    params = parameters.draw(specs, jax.random.key(0), "float32")
    tokens_std = np.std(params["embedding"]) * settings.model_dim**0.5
    np.testing.assert_allclose(np.std(params["positions"]) / tokens_std, 0.5, rtol=0.05)


@pytest.mark.fast
@pytest.mark.parametrize("first", [1, 99])
def test_a_dense_model_has_one_segment_whatever_its_first_layers(first):
    settings = dataclasses.replace(MODEL, moe_every=0, first_dense_layers=first)
    ((block,),) = shapes(settings)["decoder"]["layers"]
    for x in jax.tree.leaves(block):
        assert x.shape[0] == settings.num_layers


@pytest.mark.fast
def test_a_model_without_experts_has_no_router_and_no_sums():
    assert "sparse" not in shapes(DENSE)["decoder"]["layers"][0][0]
    _, sums = jax.eval_shape(
        functools.partial(whole_arrays.forward, model_of(DENSE, TOP2)),
        shapes(DENSE),
        make_batch(tokens()),
        ROWS,
        jax.random.key(0),
    )
    assert sums == ()


# Precision.


def loss_of(params, execution: ExecutionSettings, settings: ModelSettings = MODEL):
    model, batch = model_of(settings, TOP1, execution), make_batch(tokens())
    x_BLM, router = transformer.hidden(model, params, batch, ROWS, jax.random.key(7))
    head_MV = projection(params, model.layers.embedding)
    scores = score_targets(head_MV, x_BLM, tokens(), model.execution)
    weights = LossSettings(balance_weight=0.1)
    sums = losses.sums(scores, tokens(), np.ones((B, L)), router, weights)
    return losses.total(sums, weights)[0]


BFLOAT16 = dataclasses.replace(EXECUTION, dtype="bfloat16", remat="minimal")


@pytest.mark.fast
def test_in_bfloat16_the_router_and_everything_that_is_kept_stay_float32():
    differentiate = jax.value_and_grad(functools.partial(loss_of, execution=BFLOAT16))
    jaxpr, (loss, gradients) = jax.make_jaxpr(differentiate, return_shape=True)(
        shapes(MODEL)
    )
    for array in jax.tree.leaves((shapes(MODEL), loss, gradients)):
        assert array.dtype == jnp.float32

    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    # E = 5 is the size of nothing else; the products of experts are batched over it.
    routers = [
        product
        for product in products
        if product.params["dimension_numbers"][1] == ((), ())
        and any(5 in v.aval.shape for v in (*product.invars, *product.outvars))
    ]
    assert len(routers) == 3, "forward, and backward to the tokens and the weights"
    highest = jax.lax.Precision.HIGHEST
    for product in routers:
        assert {v.aval.dtype for v in product.invars} == {jnp.dtype("float32")}
        assert product.params["precision"] == (highest, highest)
    experts = [
        product
        for product in products
        if all(v.aval.shape[:1] == (5,) for v in product.invars)
    ]
    assert len(experts) >= 6, "up and down, forward and backward"
    for product in experts:
        assert {v.aval.dtype for v in product.invars} == {jnp.dtype("bfloat16")}


@functools.cache
def loss_and_gradients(execution: ExecutionSettings):
    differentiate = jax.value_and_grad(functools.partial(loss_of, execution=execution))
    return jax.device_get(jax.jit(differentiate)(params_of(MODEL)))


def test_the_loss_in_bfloat16_is_close_to_the_loss_in_float32():
    exact, _ = loss_and_gradients(EXECUTION)
    rounded = jax.jit(functools.partial(loss_of, execution=BFLOAT16))(params_of(MODEL))
    assert exact != rounded
    np.testing.assert_allclose(rounded, exact, rtol=0.02)


# Remat; what is kept, and of which layers, is in test_remat.py.


@pytest.mark.parametrize(
    "remat", ["minimal", pytest.param("full", marks=pytest.mark.slow)]
)
def test_every_remat_policy_gives_the_same_gradients(remat):
    jax.tree.map(
        # Of order 1; what is recomputed may be fused in another way.
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        loss_and_gradients(dataclasses.replace(EXECUTION, remat=remat)),
        loss_and_gradients(EXECUTION),
    )


@pytest.mark.fast
def test_a_deeper_model_is_traced_no_further():
    def size(num_layers: int) -> int:
        settings = dataclasses.replace(MODEL, num_layers=num_layers, moe_every=2)
        execution = dataclasses.replace(EXECUTION, remat="minimal")
        differentiate = jax.grad(
            functools.partial(loss_of, execution=execution, settings=settings)
        )
        jaxpr = jax.make_jaxpr(differentiate)(shapes(settings))
        return sum(1 for _ in equations(jaxpr))

    assert size(64) == size(4) > 100


# Dropout, and experts beyond the number of devices.


def run_with_dropout(**choices):
    """Logits and sums of the same tokens in every row, with 16 experts."""
    batch = make_batch(np.tile(tokens()[:1], (B, 1)))
    return forward(batch, TOP2, NOISY, key=jax.random.key(7), **choices)


def test_sixteen_experts_and_dropout_on_eight_devices_equal_one_device():
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        run_with_dropout(mesh="e8"),
        run_with_dropout(),
    )


def test_dropout_depends_on_the_global_row_of_a_sequence_alone():
    logits_BLV, _ = run_with_dropout()
    assert len(np.unique(logits_BLV[:, 0], axis=0)) == B, "each row draws for itself"
    moved_BLV, _ = run_with_dropout(row_B=ROWS[::-1])
    np.testing.assert_allclose(moved_BLV, logits_BLV[::-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "router", "draws"),
    [
        ({}, {}, False),
        ({"dropout": 0.1}, {}, True),
        ({}, {"jitter": 0.1}, True),
        ({}, {"second_policy": "random"}, True),
    ],
)
def test_nothing_is_drawn_that_is_switched_off(settings, router, draws):
    model = model_of(
        dataclasses.replace(MODEL, **settings), dataclasses.replace(TOP2, **router)
    )

    def primitives(key):
        jaxpr = jax.make_jaxpr(functools.partial(whole_arrays.forward, model))(
            shapes(MODEL), make_batch(tokens()), ROWS, key
        )
        return {equation.primitive.name for equation in equations(jaxpr.jaxpr)}

    assert ("random_bits" in primitives(jax.random.key(0))) == draws
    assert "random_bits" not in primitives(None)
