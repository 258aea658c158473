"""The sparse layer against its oracle on the real devices, before training.

Kernels that were silently wrong, and collectives that were scheduled wrongly, have cost
others weeks. One small batch, forward and backward, shows most of it in seconds.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from launch.assemble import Run
from launch.errors import UserError
from moe.dispatch import choice
from moe.model.moe_layer import Layer, MoE, Tokens, moe_layer
from moe.model.parameters import logical_axes
from partitioning import rules

# Of what one expert, or one array, is off by, in the norm. Products in bfloat16, and
# in float32 on accelerators, which multiply it in fewer bits, differ by their rounding.
TOLERANCES = {"exact": 1e-4, "rounded": 3e-2}
LONGEST_GROUP = 128


class SelfCheckError(UserError):
    """The sparse layer of this run is wrong on these devices."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a transport and its expert products compare with the oracle.

    Attributes:
        transport: that of this run.
        differences: relative difference of the output and of each gradient.
        tolerance: what they may be.
    """

    transport: str
    differences: Mapping[str, float]
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest difference; not a number if any is not."""
        return float(np.max(list(self.differences.values())))

    def __str__(self) -> str:
        """Says it in a line."""
        return (
            f"TRANSPORT {self.transport!r} equals the oracle, forward and backward, "
            f"to {self.worst:.1e}"
        )


def check(run: Run) -> Comparison | None:
    """Compares one sparse layer of the run with `einsum` and batched products.

    Returns:
        The comparison; None for a model without experts.
    Raises:
        SelfCheckError: they differ by more than their rounding.
    """
    if not run.settings.model.moe_every:
        return None
    found = compare(run)
    if found.worst <= found.tolerance:  # False if it is not a number
        return found
    rows = "\n".join(
        f"  {name:32} {difference:.3g}"
        for name, difference in found.differences.items()
    )
    raise SelfCheckError(
        f"TRANSPORT = {found.transport!r} differs from the oracle by {found.worst:.3g} "
        f"on {run.mesh.devices.size} {run.mesh.devices.flat[0].platform} devices, and "
        f"may by {found.tolerance:g}:\n{rows}\n"
        "Nothing was trained. Set TRANSPORT to 'all_to_all', look for flags in "
        "XLA_FLAGS that change kernels or schedules, or pass --self_check=off to go on "
        "all the same."
    )


def compare(run: Run) -> Comparison:
    """Runs both layers on one small batch and measures how far they are apart."""
    model, mesh = run.settings.model, run.mesh
    platform, axis_size = mesh.devices.flat[0].platform, mesh.shape["expert"]
    S = min(run.settings.router.group_size, LONGEST_GROUP)
    # Room for everything: what exceeds it is the loop's affair, not the kernels'.
    router = dataclasses.replace(
        run.settings.router,
        group_size=S,
        row_budget=float(axis_size),
        min_capacity=max(run.settings.router.min_capacity, 1),
    )
    name, _ = choice.pick(model, router, axis_size, platform, train=True)
    arguments = _draw(run, Layer(model, router, mesh, partition=run.settings.partition))
    results = {}
    for transport in (name, "einsum"):
        changed = dataclasses.replace(model, transport=transport)  # type: ignore[arg-type]
        layer = Layer(changed, router, mesh, partition=run.settings.partition)
        results[transport] = _forward_and_backward(layer, arguments)
    exact = model.dtype == "float32" and platform == "cpu"
    return Comparison(
        transport=name,
        differences=_differences(results[name], results["einsum"], mesh),
        tolerance=TOLERANCES["exact" if exact else "rounded"],
    )


def _draw(run: Run, layer: Layer) -> tuple[Any, ...]:
    """Weights, tokens, gradients of the output, and token ids, where they live."""
    model, mesh, grid = layer.model, layer.mesh, layer.grid
    # A group for each device.
    B = run.settings.mesh.batch_shards
    L = layer.router.group_size * grid.size("context", "model")
    container = _container(layer)
    axes = logical_axes(container)
    shapes = nnx.to_pure_dict(nnx.state(container))
    by_row = rules.sharding(mesh, ("batch",))
    table = rules.table(layer.partition)
    places = jax.tree.map(lambda _, a: rules.sharding(mesh, a, table), shapes, axes)

    @functools.partial(jax.jit, out_shardings=(places, by_row, by_row, by_row))
    def draw() -> tuple[Any, ...]:
        keys = iter(jax.random.split(jax.random.key(0), 3))
        weights = jax.tree.map(
            lambda s: _scattered(s.shape) / s.shape[-2 if s.ndim > 1 else -1] ** 0.5,
            shapes,
        )
        x_BLM, d_y_BLM = (
            jax.random.normal(next(keys), (B, L, model.model_dim), model.dtype)
            for _ in range(2)
        )
        id_BL = jax.random.randint(next(keys), (B, L), 0, model.vocab_size)
        return weights, x_BLM, d_y_BLM, id_BL

    return draw()


def _scattered(shape: tuple[int, ...]) -> jax.Array:
    """Numbers without a pattern of variance 1; random ones take longer to compile."""
    number = sum(
        jax.lax.broadcasted_iota(jnp.float32, shape, i) * (12.9898 + 7.233 * i)
        for i in range(len(shape))
    )
    return 2**0.5 * jnp.sin(number)


def _forward_and_backward(layer: Layer, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Output and gradients of one layer; the last tokens of each row are padding."""
    definition = nnx.graphdef(_container(layer))

    def objective(weights: Any, x_BLM: Any, d_y_BLM: Any, id_BL: Any) -> Any:
        B, L = id_BL.shape
        tokens = Tokens(
            mask_BL=jnp.broadcast_to(jnp.arange(L) < L - L // 8, (B, L)),
            row_B=jnp.arange(B),
            id_BL=id_BL,
        )
        y_BLM, _ = moe_layer(
            nnx.merge(definition, weights), x_BLM, tokens, jax.random.key(1), 0, layer
        )
        return jnp.sum((y_BLM * d_y_BLM).astype(jnp.float32)), y_BLM

    (_, y_BLM), (d_weights, d_x_BLM) = jax.jit(
        jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    )(*arguments)
    return {"output": y_BLM, "tokens": d_x_BLM, "weights": d_weights}


def _container(layer: Layer) -> MoE:
    """The shapes of one sparse layer's weights."""
    return nnx.eval_shape(lambda: MoE(jax.random.key(0), layer.model, layer.router))


def _differences(ours: Any, oracle: Any, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Relative difference in the norm, expert by expert where there are experts.

    The arrays stay where they are: other processes hold parts of them.
    """
    replicated = rules.replicated(mesh)
    norms = jax.jit(
        lambda trees: jax.tree_util.tree_map_with_path(_norms, *trees),
        out_shardings=replicated,
    )
    found = {}
    for path, (norm, off) in jax.tree_util.tree_leaves_with_path(
        jax.device_get(norms((oracle, ours))), is_leaf=lambda x: isinstance(x, tuple)
    ):
        # An expert that no token visited is measured against the average one.
        floor = np.sqrt(np.mean(norm.astype(np.float64) ** 2))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = float(np.max(off / np.maximum(norm, max(floor, 1e-30))))
    return found


def _norms(path: Any, expected: jax.Array, actual: jax.Array) -> tuple[Any, Any]:
    """The norm of an array, and of its difference from another, of each expert."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axis = tuple(range(1 if "experts" in name else 0, expected.ndim))
    expected, actual = expected.astype(jnp.float32), actual.astype(jnp.float32)
    return (
        jnp.sqrt(jnp.sum(expected**2, axis=axis)),
        jnp.sqrt(jnp.sum((actual - expected) ** 2, axis=axis)),
    )
