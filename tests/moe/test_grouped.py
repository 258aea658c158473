import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe.model.feed_forward import grouped_cpu, grouped_gpu
from moe.model.feed_forward.dense import GATED, PLAIN
from moe.model.feed_forward.grouped import grouped_feed_forward
from moe.testing.jaxprs import equations

METHODS = ["blocked", "tpu_interpreted", "hopper_interpreted", "batched"]
M, F, R = 8, 12, 40
SIZES = {
    "experts without rows": [0, 11, 0, 0, 9, 3, 0],
    "all rows to one": [0, 0, 0, 40, 0, 0, 0],
    "no rows": [0, 0, 0, 0, 0, 0, 0],
    "as many as there is room for": [1, 4, 5, 8, 16, 6, 0],
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks per expert, of several sizes, in arrays of a few rows."""
    monkeypatch.setattr(grouped_cpu, "BLOCK_ROWS", (3, 4, 8))
    monkeypatch.setattr(grouped_gpu, "BLOCK_ROWS", 2)


def draw_weights(activation, *, num_experts=7, bias=True):
    rng = np.random.default_rng(0)
    e, inputs = num_experts, (2,) if activation in GATED else ()
    shapes = {"up": (e, M, *inputs, F), "down": (e, F, M)}
    if bias:
        shapes |= {"up_bias": (e, *inputs, F), "down_bias": (e, M)}
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def draw_rows(size_e, garbage=np.nan):
    rows_RM = np.random.default_rng(1).normal(size=(R, M)).astype(np.float32)
    rows_RM[sum(size_e) :] = garbage
    return rows_RM


def row_by_row(w, rows_RM, size_e, activation):
    """What a row's expert makes of it, in NumPy loops."""
    y_RM, row = np.zeros((R, M), np.float64), 0
    for e, size in enumerate(size_e):
        for _ in range(size):
            up = np.einsum("M,M...->...", rows_RM[row].astype(np.float64), w["up"][e])
            up = up + w.get("up_bias", {e: 0})[e]
            if activation == "swiglu_clamped":
                gate, linear = np.minimum(up[0], 7), np.clip(up[1], -7, 7)
                hidden_F = gate / (1 + np.exp(-1.702 * gate)) * (linear + 1)
            else:
                hidden_F = np.maximum(up, 0) ** 2
            y_RM[row] = hidden_F @ w["down"][e] + w.get("down_bias", {e: 0})[e]
            row += 1
    return y_RM


def every_expert_masked(w, rows_RM, size_e, activation):
    """Every expert over every row, and then its own rows of that."""
    rows_RM = jnp.where(jnp.arange(R)[:, None] < sum(size_e), rows_RM, 0)
    up_eRF = jnp.einsum("RM,eM...F->eR...F", rows_RM, w["up"])
    if "up_bias" in w:
        up_eRF += w["up_bias"][:, None]
    if activation in GATED:
        hidden_eRF = GATED[activation](up_eRF[:, :, 0], up_eRF[:, :, 1])
    else:
        hidden_eRF = PLAIN[activation](up_eRF)
    y_eRM = jnp.einsum("eRF,eFM->eRM", hidden_eRF, w["down"])
    if "down_bias" in w:
        y_eRM += w["down_bias"][:, None]
    end_e = np.cumsum(size_e)
    place_R = np.arange(R)
    own_eR = (place_R >= (end_e - size_e)[:, None]) & (place_R < end_e[:, None])
    return jnp.sum(jnp.where(own_eR[..., None], y_eRM, 0), axis=0)


def loss_of(y_RM):
    """A sum in which every row counts, those past the sizes too."""
    weight_RM = np.random.default_rng(2).normal(size=y_RM.shape).astype(np.float32)
    return jnp.sum(y_RM.astype(jnp.float32) * weight_RM)


def value_and_gradients(function, activation, **options):
    def loss(w, rows_RM, size_e):
        y_RM = function(w, rows_RM, size_e, activation, **options)
        return loss_of(y_RM), y_RM

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def assert_near(wanted, got, rtol):
    def near(wanted, got):
        scale = max(float(jnp.max(jnp.abs(wanted))), 1e-30)
        np.testing.assert_allclose(got / scale, wanted / scale, rtol=rtol, atol=rtol)

    jax.tree.map(near, wanted, got)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", ["relu_squared", "swiglu_clamped"])
def test_outputs_and_gradients_for_any_sizes(activation, method):
    w = draw_weights(activation)
    ours = jax.jit(value_and_gradients(grouped_feed_forward, activation, method=method))
    for name, size_e in SIZES.items():
        rows_RM = draw_rows(size_e)
        (_, y_RM), gradients = ours(w, rows_RM, np.array(size_e, np.int32))
        assert not np.any(y_RM[sum(size_e) :]), name
        wanted_RM = row_by_row(w, rows_RM, size_e, activation)
        np.testing.assert_allclose(y_RM, wanted_RM, rtol=2e-5, atol=2e-5, err_msg=name)
        _, wanted = value_and_gradients(every_expert_masked, activation)(
            w, rows_RM, size_e
        )
        assert_near(wanted, gradients, rtol=2e-5)


@pytest.mark.fast
@pytest.mark.parametrize("method", ["blocked", "batched"])
def test_one_expert_without_biases_is_the_dense_layer(method):
    w = draw_weights("gelu", num_experts=1, bias=False)
    size_e = np.array([R - 3], np.int32)
    rows_RM = draw_rows(size_e)
    layer = functools.partial(grouped_feed_forward, activation="gelu", method=method)
    y_RM = jax.jit(layer)(w, rows_RM, size_e)
    hidden_RF = jax.nn.gelu(rows_RM @ w["up"][0])
    wanted_RM = np.where(np.isnan(rows_RM), 0, hidden_RF @ w["down"][0])
    np.testing.assert_allclose(y_RM, wanted_RM, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_rows_give_float32_gradients_of_float32_weights(method):
    w, size_e = draw_weights("swiglu"), SIZES["experts without rows"]
    rows_RM = draw_rows(size_e).astype(jnp.bfloat16)
    ours = value_and_gradients(grouped_feed_forward, "swiglu", method=method)
    (_, y_RM), (dw, drows_RM) = jax.jit(ours)(w, rows_RM, np.array(size_e, np.int32))
    assert y_RM.dtype == drows_RM.dtype == jnp.bfloat16
    assert {name: g.dtype for name, g in dw.items()} == dict.fromkeys(w, jnp.float32)
    _, wanted = value_and_gradients(every_expert_masked, "swiglu")(
        w, rows_RM.astype(jnp.float32), size_e
    )
    gradients = (dw, drows_RM.astype(jnp.float32))
    assert_near(wanted, gradients, rtol=2e-2)
    if method != "tpu_interpreted":  # sums over rows were not rounded to bfloat16
        rounded = jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(g.dtype), dw)
        assert all(np.any(rounded[name] != dw[name]) for name in ("up", "down"))


@pytest.mark.parametrize("method", ["blocked", "batched"])
def test_on_eight_devices_in_a_rematerialised_scan(method):
    w, size_e = draw_weights("relu", bias=False), SIZES["experts without rows"]
    rows_RM = draw_rows(size_e, garbage=0)
    size_e = np.array(size_e, np.int32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    dim = PartitionSpec("all")

    def two_layers(w, rows_RM, size_e):
        def layer(rows_RM, _):
            own_e = size_e[0]
            return grouped_feed_forward(w, rows_RM, own_e, "relu", method=method), None

        return jax.lax.scan(jax.checkpoint(layer), rows_RM, None, length=2)[0]

    def loss(w, rows_RM, size_e):
        y_RM = jax.shard_map(
            two_layers,
            mesh=mesh,
            in_specs=(PartitionSpec(), dim, dim),
            out_specs=dim,
            check_vma=False,
        )(w, rows_RM, size_e)
        return jnp.sum(y_RM**2)

    def plain(w, rows_RM):
        for _ in range(2):
            rows_RM = every_expert_masked(w, rows_RM, size_e, "relu")
        return 8 * jnp.sum(rows_RM**2)

    got = jax.jit(jax.grad(loss))(w, np.tile(rows_RM, (8, 1)), np.tile(size_e, (8, 1)))
    assert_near(jax.grad(plain)(w, rows_RM), got, rtol=2e-5)


@pytest.mark.parametrize("method", ["blocked", "batched", "hopper_interpreted"])
def test_saved_by_name_the_up_projection_is_not_repeated(method):
    w, size_e = draw_weights("swiglu", bias=False), np.array([20, 0, 9], np.int32)
    w = {name: array[:3] for name, array in w.items()}
    policies = jax.checkpoint_policies

    def products(policy):
        layer = jax.checkpoint(
            lambda w, x: grouped_feed_forward(w, x, size_e, "swiglu", method=method),
            policy=policy,
        )
        loss = jax.value_and_grad(lambda w, x: jnp.sum(layer(w, x)), argnums=(0, 1))
        traced = jax.make_jaxpr(loss)(w, draw_rows(size_e, 0))
        names = [one.primitive.name for one in equations(traced)]
        return sum("dot_general" in name for name in names)

    saved = products(policies.save_only_these_names("expert_hidden"))
    # Up and down forward; backward two for rows, two for weights: each per size of
    # block, or for rectangle and blocks. The kernel is one, but not for weights.
    blocks = len(grouped_cpu.BLOCK_ROWS) + 1
    number = {"blocked": 6 * blocks, "batched": 6 * 2, "hopper_interpreted": 4 + 2 * 2}
    assert saved == number[method]
    assert products(policies.nothing_saveable) > saved
