"""Numbers of fewer bits between steps: moments, parameters, and their rounding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MasterState(NamedTuple):
    """The optimizer's state, with the parameters in float32 that its updates add to."""

    master: optax.Params
    inner: optax.OptState


def moments_in(
    inner: optax.GradientTransformation, dtype: str
) -> optax.GradientTransformation:
    """Keeps a transformation's state in a type, and computes in float32."""

    def cast(state: Any, to: str) -> Any:
        def one(leaf: jax.Array) -> jax.Array:
            is_moment = leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)
            return leaf.astype(to) if is_moment else leaf

        return jax.tree.map(one, state)

    def init(params: optax.Params) -> optax.OptState:
        return cast(inner.init(params), dtype)

    def update(
        updates: optax.Updates, state: optax.OptState, params: Any = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = inner.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def with_master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps a float32 copy of the parameters and updates that (arXiv:1710.03740).

    `apply_updates` then takes the parameters from the new state.
    """

    def init(params: optax.Params) -> MasterState:
        master = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return MasterState(master, inner.init(master))

    def update(
        updates: optax.Updates, state: MasterState, params: Any = None
    ) -> tuple[optax.Updates, MasterState]:
        del params
        updates, inner_state = inner.update(updates, state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        return updates, MasterState(master, inner_state)

    return optax.GradientTransformation(init, update)


def apply_updates(
    params: optax.Params,
    updates: optax.Updates,
    opt_state: optax.OptState,
    rounding: str,
    key: jax.Array,
) -> optax.Params:
    """Adds updates to parameters, in float32, and rounds to the parameters' type.

    Args:
        params: parameters before the update, of any type.
        updates: float32.
        opt_state: after the update.
        rounding: "nearest", "stochastic" or "master"; see `OptimizerSettings`.
        key: PRNG key of this step.
    """
    if rounding == "master":
        assert isinstance(opt_state, MasterState)
        return jax.tree.map(
            lambda p, master: master.astype(p.dtype), params, opt_state.master
        )
    leaves, structure = jax.tree.flatten(params)
    rounded = []
    for i, (p, u) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True)):
        new = p.astype(jnp.float32) + u
        if rounding == "stochastic" and p.dtype == jnp.bfloat16:
            rounded.append(_round_at_random(new, jax.random.fold_in(key, i)))
        else:
            rounded.append(new.astype(p.dtype))
    return jax.tree.unflatten(structure, rounded)


def _round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds to bfloat16, up with a probability in proportion to the distance.

    A bfloat16 is the upper half of a float32: a random number is added to the lower
    half, and what carries over decides.
    """
    lower = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + lower
    upper = (bits >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
