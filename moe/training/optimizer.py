"""Optimizers and schedules, from Optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe.settings import OptimizerSettings
from moe.training.precision import moments_in, with_master
from partitioning import rules

# Dimensions that index separate matrices, or separate vectors.
STACKED = ("layers", "expert", "pair")
# What fully sharded dimensions are called in the optimizer's state.
MOMENTS = {axis: f"{axis}_moment" for axis in rules.FULLY_SHARDED}


def make_optimizer(
    settings: OptimizerSettings, train_steps: int, axes: Any
) -> optax.GradientTransformation:
    """Chains clipping, the optimizer, weight decay and the learning rate.

    Args:
        settings: which, and how.
        train_steps: where the cosine ends.
        axes: logical axes of the parameters, to tell matrices from stacks of them.
    """
    clip = (
        optax.clip_by_global_norm(settings.clip_norm)
        if settings.clip_norm > 0
        else optax.identity()
    )
    decay = optax.add_decayed_weights(
        settings.weight_decay,
        mask=lambda params: jax.tree.map(lambda _, a: is_matrix(a), params, axes),
    )
    rate = optax.scale_by_learning_rate(make_schedule(settings, train_steps))
    if settings.name == "adamw":
        scale = optax.scale_by_adam(settings.b1, settings.b2, settings.eps)
    else:
        scale = optax.chain(
            _per_matrix(_adafactor(), axes),
            optax.ema(settings.b1, debias=False) if settings.b1 else optax.identity(),
        )
    # Float32 too: Optax would start the moments of bfloat16 parameters in bfloat16.
    scale = moments_in(scale, settings.moment_dtype)
    whole = optax.chain(clip, scale, decay, rate)
    return with_master(whole) if settings.rounding == "master" else whole


def make_schedule(settings: OptimizerSettings, train_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates made."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(
            peak, max(train_steps - warmup, 1), alpha=settings.final_fraction
        )
    elif settings.schedule == "rsqrt":
        start = max(warmup, 1)

        def after(count: jax.Array) -> jax.Array:
            return peak * jnp.sqrt(start / (count + start))

    else:
        after = optax.constant_schedule(peak)
    # The first update is made with 1 / warmup of the peak, not with 0.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def state_axes(opt_state_shapes: Any, params: Any, axes: Any) -> Any:
    """Gives every array of the optimizer's state its logical axes.

    A moment has the axes of its parameter. A factored moment keeps those of the
    leading stack and is whole in its only other dimension. Counters are whole.
    """
    by_path = {
        f"/{path}/": (param.shape, param_axes)
        for path, param, param_axes in rules.leaves(params, axes)
    }

    def axes_of(path: Any, leaf: jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
        name = f"/{jax.tree_util.keystr(path, simple=True, separator='/')}/"
        for param_path, (shape, param_axes) in by_path.items():
            if param_path in name:
                if leaf.shape == shape:
                    return tuple(MOMENTS.get(a, a) for a in param_axes)
                stack = tuple(param_axes[i] for i in stack_of(param_axes))
                lead = stack[: leaf.ndim]
                return (*lead, *(None,) * (leaf.ndim - len(lead)))
        return (None,) * leaf.ndim

    return jax.tree_util.tree_map_with_path(axes_of, opt_state_shapes)


def stack_of(axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """Returns the dimensions that index separate matrices or vectors."""
    return tuple(i for i, axis in enumerate(axes) if axis in STACKED)


def is_matrix(axes: tuple[str | None, ...]) -> bool:
    """Whether a parameter is a matrix, or a stack of them: one side of it is M."""
    wide = any(axis in rules.FULLY_SHARDED for axis in axes)
    return wide and len(axes) - len(stack_of(axes)) >= 2


def _adafactor() -> optax.GradientTransformation:
    """Adafactor's update of one matrix (arXiv:1804.04235, Algorithm 4)."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def _per_matrix(
    inner: optax.GradientTransformation, axes: Any
) -> optax.GradientTransformation:
    """Applies a transformation to each matrix of a stack as if it stood alone.

    Factoring, update clipping and parameter scale are defined for one matrix, from its
    inputs to its outputs; over a stack of layers and experts they would mix them. Heads
    are one dimension with what is in them.
    """

    def stack(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """[*stack, inputs, outputs], or [*stack, numbers] of vectors."""
        dims = stack_of(axes)
        array = jnp.moveaxis(array, dims, range(len(dims)))
        lead, rest = array.shape[: len(dims)], array.shape[len(dims) :]
        if is_matrix(axes):
            inner = [axis for axis in axes if axis not in STACKED]
            first = inner[0] in rules.FULLY_SHARDED
            rest = (rest[0], -1) if first else (-1, rest[-1])
        else:
            rest = (-1,)
        return array.reshape(*lead, *rest)

    def unstack(
        array: jax.Array, like: jax.Array, axes: tuple[str | None, ...]
    ) -> jax.Array:
        dims = stack_of(axes)
        shape = jnp.moveaxis(like, dims, range(len(dims))).shape
        return jnp.moveaxis(array.reshape(shape), range(len(dims)), dims)

    def mapped(function: Any, axes: tuple[str | None, ...]) -> Any:
        for _ in stack_of(axes):
            function = jax.vmap(function)
        return function

    def init(params: optax.Params) -> optax.OptState:
        return jax.tree.map(
            lambda p, a: mapped(inner.init, a)(stack(p, a)), params, axes
        )

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params
    ) -> tuple[optax.Updates, optax.OptState]:
        def one(u: Any, s: Any, p: Any, a: Any) -> tuple[Any, Any]:
            new_u, new_s = mapped(inner.update, a)(stack(u, a), s, stack(p, a))
            return unstack(new_u, u, a), new_s

        pairs = jax.tree.map(one, updates, state, params, axes)
        new_updates, new_state = (
            jax.tree.map(lambda _, pair, i=i: pair[i], updates, pairs) for i in (0, 1)
        )
        return new_updates, new_state

    return optax.GradientTransformation(init, update)
