"""What a configuration names of the user's own: imported, tried, put in its place."""

import dataclasses
import functools
import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import optax

from launch.config.reader import ResolvedConfig
from launch.config.rules import problems
from launch.config.settings import Settings
from launch.errors import ConfigError, nearest
from moe import architecture
from moe.model import inventory, parameters
from moe.settings import OptimizerSettings, Options, Router, RouterSettings
from moe.testing.trial import broken_rule_of_router
from tasks.objectives import OBJECTIVES, Objective
from tasks.trial import broken_rule_of_objective


class _RefusedError(Exception):
    """Why one name cannot be taken, as the end of a sentence."""


def admitted(
    config: ResolvedConfig, allowed: bool, *, only_objective: bool = False
) -> ResolvedConfig:
    """Imports what the configuration names; see `user_code`."""
    settings, found = config.settings, []
    cause: BaseException | None = None
    steps = [_with_objective, _with_optimizer, _with_schedule]
    if only_objective:
        steps = [_with_objective]
    elif architecture.has_experts(settings.model):
        steps = [_with_router, _with_encoder_router, *steps]
    for step in steps:
        try:
            settings = step(settings, allowed)
        except _RefusedError as refused:
            cause = cause or refused.__cause__
            found += [str(refused)] if str(refused) not in found else []
    if settings == config.settings and not found:
        return config
    found = found or problems(settings)
    if found:
        raise ConfigError(config.where, found) from cause
    return dataclasses.replace(config, settings=settings)


def _with_objective(settings: Settings, allowed: bool) -> Settings:
    data = settings.data
    if data.objective in OBJECTIVES or data.own is not None:
        return settings
    said, options = f"OBJECTIVE = {data.objective!r}", Options(data.objective_options)
    own = _imported("OBJECTIVE", data.objective, allowed)
    if not isinstance(own, Objective):
        raise _RefusedError(
            f"{said} is a {type(own).__name__}, not a tasks.objectives.Objective: "
            "describe the function, as in Objective(maker=maker)"
        )
    if own.reads != ("targets",):
        raise _RefusedError(
            f"{said} reads {own.reads}: one of your own is made of stored targets alone"
        )
    takes = "maker(data, vocabulary, ...)"
    _fit(said, own.maker, 2, (), options, "OBJECTIVE_OPTIONS", takes)
    data = dataclasses.replace(data, own=own)
    if set(data.task_feature_lengths) != set(own.lengths):
        return dataclasses.replace(settings, data=data)  # a rule says so
    if broken := _tried(said, lambda: broken_rule_of_objective(data)):
        raise _RefusedError(f"{said}: {broken}")
    return dataclasses.replace(settings, data=data)


def _with_router(settings: Settings, allowed: bool) -> Settings:
    router = _router("", settings, settings.router, allowed)
    return dataclasses.replace(settings, router=router)


def _with_encoder_router(settings: Settings, allowed: bool) -> Settings:
    router, beside = settings.router, settings.encoder_router
    if (router.family, router.options) == (beside.family, beside.options):
        beside = dataclasses.replace(beside, own=router.own)
    else:
        beside = _router("ENCODER_", settings, beside, allowed)
    return dataclasses.replace(settings, encoder_router=beside)


def _router(
    prefix: str, settings: Settings, router: RouterSettings, allowed: bool
) -> RouterSettings:
    """The router with what its name stands for, tried on the experts of the model."""
    if not router.is_own or router.own is not None:
        return router
    macro, options = f"{prefix}ROUTER", router.options
    said = f"{macro} = {router.family!r}"
    own = _imported(macro, router.family, allowed)
    if not isinstance(own, Router):
        raise _RefusedError(
            f"{said} is a {type(own).__name__}, not a moe.settings.Router: describe "
            "the function, as in Router(route, causal=True)"
        )
    takes = "route(logits_GSE, context, settings, *, capacity, ...)"
    _fit(said, own.route, 3, ("capacity",), options, f"{macro}_OPTIONS", takes)
    router = dataclasses.replace(router, own=own)
    for num_experts in sorted(set(architecture.experts_of(settings.model))):
        trial = functools.partial(broken_rule_of_router, router, num_experts)
        if broken := _tried(said, trial):
            raise _RefusedError(f"{said} broke the contract of routers: {broken}")
    return router


def _with_optimizer(settings: Settings, allowed: bool) -> Settings:
    optimizer = settings.optimizer
    if ":" not in optimizer.name or optimizer.own is not None:
        return settings
    said, options = f"OPTIMIZER = {optimizer.name!r}", optimizer.options
    own = _imported("OPTIMIZER", optimizer.name, allowed)
    _fit(said, own, 1, (), options, "OPTIMIZER_OPTIONS", "function(specs, ...)")
    if broken := _tried(said, lambda: _broken_by_optimizer(own, options, settings)):
        raise _RefusedError(f"{said}: {broken}")
    return _learning(settings, own=own)


def _broken_by_optimizer(
    own: Callable[..., Any], options: Options, settings: Settings
) -> str:
    """What a transformation of gradients breaks, by shapes alone."""
    specs = inventory.specs(settings.layers)
    made = own(specs, **options)
    if not isinstance(made, optax.GradientTransformation):
        return f"it returned a {type(made).__name__}, not a GradientTransformation"
    shapes = parameters.shapes(specs, "float32")
    state = jax.eval_shape(made.init, shapes)
    updates, after = jax.eval_shape(made.update, shapes, state, shapes)
    pairs: dict[str, tuple[Any, Any]] = {
        "its updates": (updates, shapes),
        "its state after an update": (after, state),
    }
    for what, (found, wanted) in pairs.items():
        if _structure(found) != _structure(wanted):
            return f"{what}: another structure than before"
        for one, other in zip(
            jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True
        ):
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                return (
                    f"{what}: an array {one.dtype}{one.shape} where "
                    f"{other.dtype}{other.shape} was"
                )
    return ""


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def _with_schedule(settings: Settings, allowed: bool) -> Settings:
    optimizer = settings.optimizer
    if ":" not in optimizer.schedule or optimizer.own_schedule is not None:
        return settings
    said, options = f"SCHEDULE = {optimizer.schedule!r}", optimizer.schedule_options
    own = _imported("SCHEDULE", optimizer.schedule, allowed)
    takes = "function(peak, num_steps, ...)"
    _fit(said, own, 2, (), options, "SCHEDULE_OPTIONS", takes)
    num_steps = max(settings.train.train_steps - optimizer.warmup_steps, 1)
    broken = _tried(said, lambda: _broken_by_schedule(own, optimizer, num_steps))
    if broken:
        raise _RefusedError(f"{said}: {broken}")
    return _learning(settings, own_schedule=own)


def _broken_by_schedule(
    own: Callable[..., Any], optimizer: OptimizerSettings, num_steps: int
) -> str:
    """What a schedule breaks at its beginning, in the middle and at its end."""
    schedule = own(optimizer.learning_rate, num_steps, **optimizer.schedule_options)
    if not callable(schedule):
        return f"it returned a {type(schedule).__name__}, not a function of the step"
    shape = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), "int32"))
    if getattr(shape, "shape", None) != ():
        return "the rate of a step is not one number"
    for count in (0, num_steps // 2, num_steps - 1):
        rate = float(schedule(jax.numpy.asarray(count)))
        if not 0 <= rate < math.inf:
            return f"the rate of step {count} of {num_steps} is {rate}"
    return ""


def _learning(settings: Settings, **changes: Any) -> Settings:
    optimizer = dataclasses.replace(settings.optimizer, **changes)
    return dataclasses.replace(settings, optimizer=optimizer)


# ------------------------------------------------------------------- names and calls


def _imported(macro: str, named: str, allowed: bool) -> Any:
    """What "module:name" stands for."""
    module, _, name = named.partition(":")
    said = f"{macro} = {named!r}"
    if module.partition(".")[0] not in ("moe", "tasks") and not allowed:
        raise _RefusedError(
            f"{said}: {module} is not one of Switchyard's own modules, and importing "
            "it runs its code: if you trust it, add --allow_module to the command"
        )
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _RefusedError(f"{said}: {_told(error)}") from error
        raise _RefusedError(
            f"{said}: there is no module {error.name!r} in the working directory, on "
            "PYTHONPATH or among the installed packages"
        ) from error
    except Exception as error:  # whatever the user's module raises
        raise _RefusedError(f"{said}: {_told(error)}") from error
    if not hasattr(found, name):
        known = [other for other in vars(found) if not other.startswith("_")]
        raise _RefusedError(f"{said}: {module} has no {name!r}{nearest(name, known)}")
    return getattr(found, name)


def _fit(
    said: str,
    function: Any,
    by_place: int,
    by_name: tuple[str, ...],
    options: Options,
    macro: str,
    takes: str,
) -> None:
    """Refuses a function that cannot be called so, and options that it does not take.

    Args:
        said: knob and value.
        function: what will be called.
        by_place: number of arguments without names.
        by_name: further arguments that it is always given.
        options: the user's.
        macro: knob that gave them.
        takes: what it should look like.
    """
    if not callable(function):
        raise _RefusedError(f"{said} is a {type(function).__name__}, not a function")
    signature = inspect.signature(function)
    every = list(signature.parameters.values())
    named = [
        p.name
        for p in every[by_place:]
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in by_name
    ]
    takes_any = any(p.kind == p.VAR_KEYWORD for p in every)
    for option in options:
        if option not in named and not takes_any:
            known = f"; it takes {', '.join(named)}" if named else "; it takes none"
            raise _RefusedError(
                f"{said} takes no option {option!r} of {macro}"
                f"{nearest(option, named)}{known}"
            )
    given = dict.fromkeys(by_name) | dict(options)
    try:
        signature.bind(*[None] * by_place, **given)
    except TypeError as error:
        raise _RefusedError(
            f"{said} cannot be called as {takes} with {macro} = {options}: {error}"
        ) from error


def _tried(said: str, trial: Callable[[], str]) -> str:
    """What a trial finds; what the user's code raises is told with its place."""
    try:
        return trial()
    except Exception as error:  # whatever the user's function raises
        raise _RefusedError(f"{said}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """An exception in one line, with the last line of the user's that led to it."""
    ours = [str(p) for name in ("moe", "tasks") for p in sys.modules[name].__path__]
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        foreign = "site-packages" not in frame.filename and "<" not in frame.filename
        if foreign and not frame.filename.startswith((*ours, __file__)):
            where = f", at {frame.filename}:{frame.lineno}"
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}{where}"
