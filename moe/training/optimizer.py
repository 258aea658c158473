"""Optimizers and schedules, from Optax."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe.model.parameters import Spec
from moe.settings import OptimizerSettings
from moe.training.precision import moments_in, with_master
from moe.training.trained import trained_of
from partitioning import rules
from partitioning.grid import Grid

# What part of the way down is behind, as a function of the part of the steps.
DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: x,
    "sqrt": jnp.sqrt,
    "cosine": lambda x: (1 - jnp.cos(jnp.pi * x)) / 2,
}


def make_optimizer(
    settings: OptimizerSettings,
    train_steps: int,
    specs: Any,
    grid: Grid | None = None,
) -> optax.GradientTransformation:
    """Chains clipping, the optimizer, weight decay and the learning rate.

    Its `init` takes all parameters, and its `update` those that are trained.

    Args:
        settings: which, and how.
        train_steps: where the learning rate has fallen, unless SCHEDULE_STEPS says.
        specs: what the parameters are, to tell matrices from stacks of them.
        grid: the mesh, over which Muon exchanges matrices; None on one device.
    """
    specs = trained_of(specs, settings)
    clip = (
        optax.clip_by_global_norm(settings.clip_norm)
        if settings.clip_norm > 0
        else optax.identity()
    )
    decay = optax.add_decayed_weights(
        settings.weight_decay,
        mask=lambda params: jax.tree.map(lambda _, s: s.is_matrix, params, specs),
    )
    rate = optax.scale_by_learning_rate(make_schedule(settings, train_steps))
    if settings.own is not None:
        scale = settings.own(specs, **settings.options)
    elif settings.name == "adamw":
        scale = optax.scale_by_adam(settings.b1, settings.b2, settings.eps)
    elif settings.name == "muon":
        from moe.training.muon import scale_by_muon

        scale = scale_by_muon(settings, specs, grid)
    else:
        assert settings.name == "adafactor", f"{settings.name}: not imported"
        scale = optax.chain(
            _per_matrix(_adafactor(), specs),
            optax.ema(settings.b1, debias=False) if settings.b1 else optax.identity(),
        )
    # Float32 too: Optax would start the moments of bfloat16 parameters in bfloat16.
    scale = moments_in(scale, settings.moment_dtype)
    whole = optax.chain(clip, scale, decay, rate)
    if settings.rounding == "master":
        whole = with_master(whole)
    return optax.GradientTransformation(
        lambda params: whole.init(trained_of(params, settings)), whole.update
    )


def make_schedule(settings: OptimizerSettings, train_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates made."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    steps = settings.schedule_steps or train_steps
    num_steps = max(steps - warmup, 1)
    if settings.own_schedule is not None:
        after = settings.own_schedule(peak, num_steps, **settings.schedule_options)
    elif settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(
            peak, num_steps, alpha=settings.final_fraction
        )
    elif settings.schedule == "wsd":
        falling = settings.decay_fraction * steps

        def after(count: jax.Array) -> jax.Array:
            fallen = jnp.clip((count - num_steps + falling) / falling, 0, 1)
            left = 1 - DECAYS[settings.decay_shape](fallen)
            return peak * (left + (1 - left) * settings.final_fraction)

    elif settings.schedule == "rsqrt":
        start = max(warmup, 1)

        def after(count: jax.Array) -> jax.Array:
            return peak * jnp.sqrt(start / (count + start))

    else:
        assert settings.schedule == "constant", f"{settings.schedule}: not imported"
        after = optax.constant_schedule(peak)
    # The first update is made with 1 / warmup of the peak, not with 0.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def state_axes(opt_state_shapes: Any, specs: Any) -> Any:
    """Gives every array of the optimizer's state its logical axes, by the trees alone.

    A moment has the axes of its parameter. A factored moment keeps those of the
    leading stack and is whole in its only other dimension. Counters are whole.

    Args:
        opt_state_shapes: arrays, or what stands for them.
        specs: what the parameters are.
    """
    params: Any = jax.tree.structure(specs)

    def under_params(tree: Any) -> list[Any] | None:
        try:
            return params.flatten_up_to(tree)
        except ValueError:  # of another structure
            return None

    def axes_of(spec: Spec, leaf: jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
        if leaf.shape == spec.shape:
            return tuple(rules.MOMENTS.get(axis or "", axis) for axis in spec.axes)
        lead = tuple(spec.axes[dim] for dim in spec.stacked)[: leaf.ndim]
        return (*lead, *(None,) * (leaf.ndim - len(lead)))

    def of(tree: Any) -> Any:
        states = under_params(tree)
        if states is None:
            return (None,) * tree.ndim
        return params.unflatten(
            jax.tree.map(functools.partial(axes_of, spec), state)
            for spec, state in zip(jax.tree.leaves(specs), states, strict=True)
        )

    return jax.tree.map(
        of, opt_state_shapes, is_leaf=lambda tree: under_params(tree) is not None
    )


def _adafactor() -> optax.GradientTransformation:
    """Adafactor's update of one matrix (arXiv:1804.04235, Algorithm 4)."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def _per_matrix(
    inner: optax.GradientTransformation, specs: Any
) -> optax.GradientTransformation:
    """Applies a transformation to each matrix of a stack as if it stood alone.

    Factoring, update clipping and parameter scale are defined for one matrix, from its
    inputs to its outputs; over a stack of layers and experts they would mix them. Heads
    are one dimension with what is in them.
    """

    def stack(array: jax.Array, spec: Spec) -> jax.Array:
        """[*stacked, inputs, outputs], or [*stacked, numbers] of vectors."""
        array = jnp.transpose(array, spec.stacked + spec.inputs + spec.outputs)
        lead = array.shape[: len(spec.stacked)]
        inputs = math.prod(spec.shape[dim] for dim in spec.inputs)
        rest = (inputs, -1) if spec.is_matrix else (-1,)
        return array.reshape(*lead, *rest)

    def unstack(array: jax.Array, spec: Spec) -> jax.Array:
        order = spec.stacked + spec.inputs + spec.outputs
        array = array.reshape([spec.shape[dim] for dim in order])
        return jnp.transpose(array, sorted(range(len(order)), key=order.__getitem__))

    def mapped(function: Any, spec: Spec) -> Any:
        for _ in spec.stacked:
            function = jax.vmap(function)
        return function

    def init(params: optax.Params) -> optax.OptState:
        return jax.tree.map(
            lambda p, s: mapped(inner.init, s)(stack(p, s)), params, specs
        )

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params
    ) -> tuple[optax.Updates, optax.OptState]:
        def one(u: Any, state: Any, p: Any, s: Spec) -> tuple[Any, Any]:
            new, state = mapped(inner.update, s)(stack(u, s), state, stack(p, s))
            return unstack(new, s), state

        pairs = jax.tree.map(one, updates, state, params, specs)
        new_updates, new_state = (
            jax.tree.map(lambda _, pair, i=i: pair[i], updates, pairs) for i in (0, 1)
        )
        return new_updates, new_state

    return optax.GradientTransformation(init, update)
