"""Puts the parts of a run together and refuses what cannot work, before compiling."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from launch.config.devices import here
from launch.config.reader import ResolvedConfig
from launch.config.settings import Settings
from launch.errors import ConfigError
from launch.run import user_code
from moe import architecture
from moe.dispatch import auto
from moe.model import inventory
from moe.model.build import build
from moe.model.exchange import exchange_of
from moe.model.transformer import feature_axes
from moe.training import new_state, trained
from moe.training.losses import Sums
from moe.training.optimizer import make_optimizer, make_schedule
from moe.training.scoring import eval_step, in_rounds
from moe.training.train_state import TrainState
from moe.training.train_step import Learner, train_step
from partitioning import placement, rules
from partitioning.mesh import describe, make_mesh
from tasks import layouts


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's settings, made concrete on a mesh.

    Attributes:
        settings: all of them.
        mesh: the devices.
        learner: model, optimizer and losses.
        shapes: shape and dtype of every array of the state.
        axes: their logical axes.
        shardings: where they live.
        batch_sharding: where tokens of a batch live.
    """

    settings: Settings
    mesh: jax.sharding.Mesh
    learner: Learner
    shapes: TrainState
    axes: TrainState
    shardings: TrainState
    batch_sharding: jax.sharding.NamedSharding

    def init_state(self) -> TrainState:
        """Draws the state of step 0 where it lives; the same on every mesh."""
        # The other key is that of the steps' draws.
        key, _ = jax.random.split(jax.random.key(self.settings.train.seed))
        draw = functools.partial(
            new_state.draw,
            layers=self.settings.layers,
            param_dtype=self.settings.execution.param_dtype,
            optimizer=self.learner.optimizer,
        )
        return jax.jit(draw, out_shardings=self.shardings)(key)

    def init_optimizer(self, params: Any) -> Any:
        """Begins the optimizer's state of parameters, where it lives."""
        begin = self.learner.optimizer.init
        return jax.jit(begin, out_shardings=self.shardings.opt_state)(params)

    def of_batches(self, rows: int) -> "Run":
        """Returns the run as if all its batches had so many rows, to compile for."""
        train = dataclasses.replace(self.settings.train, batch_size=rows, batch_ramp=())
        settings = dataclasses.replace(self.settings, train=train)
        return dataclasses.replace(self, settings=settings)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch, to compile against."""
        B = self.settings.train.batch_size
        return {
            name: jax.ShapeDtypeStruct((B, L), layouts.type_of(name), sharding=place)
            for (name, L), place in zip(
                layouts.features(self.settings.data).items(),
                self.batch_shardings.values(),
                strict=True,
            )
        }

    @property
    def batch_shardings(self) -> dict[str, jax.sharding.NamedSharding]:
        """Where each feature of a batch lives."""
        return {
            name: rules.sharding(self.mesh, feature_axes(name))
            for name in layouts.features(self.settings.data)
        }

    def placed_shapes(self) -> TrainState:
        """Shapes of the state with their places, to compile or restore against."""
        return jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            self.shapes,
            self.shardings,
        )

    @property
    def may_exceed_budget(self) -> bool:
        """Whether a step may bring more rows than ROW_BUDGET makes room for."""
        settings, execution = self.settings, self.learner.model.execution
        cuts = settings.mesh.batch_shards * settings.mesh.context * settings.mesh.model
        rows = settings.train.batch_size // settings.train.microbatches
        return any(
            exchange_of(
                place.sublayer.settings,
                execution,
                rows * settings.length_of(place.stack) // cuts,
                train=True,
            )[-1].num_rounds
            > 1
            for place in settings.layers.sparse()
        )

    def compile_train_step(
        self, *, rounds: bool = False
    ) -> Callable[..., tuple[TrainState, dict]]:
        """Compiles the step; see `lower_train_step`."""
        return self.lower_train_step(rounds=rounds).compile()

    def lower_train_step(self, *, rounds: bool = False) -> jax.stages.Lowered:
        """Traces and lowers the step.

        Its state is donated, and leaves placed as it came in. Without fixed output
        shardings a resumed run drifts from an undisturbed one.

        Args:
            rounds: the step that computes in rounds what exceeds the row budget.
        """
        step = jax.jit(
            functools.partial(
                train_step, learner=in_rounds(self.learner) if rounds else self.learner
            ),
            donate_argnums=0,
            out_shardings=(self.shardings, rules.replicated(self.mesh)),
        )
        scalar = functools.partial(
            jax.ShapeDtypeStruct, (), sharding=rules.replicated(self.mesh)
        )
        given = [scalar(dtype="int32")]
        if self.settings.loop.spike_action == "skip":
            given.append(scalar(dtype="float32"))  # the limit of the loss
        return step.lower(self.placed_shapes(), self.batch_shapes(), *given)

    def compile_eval_step(self) -> Callable[..., tuple[Sums, jax.Array]]:
        """Compiles the scoring of one batch; see `lower_eval_step`."""
        return self.lower_eval_step().compile()

    def lower_eval_step(self) -> jax.stages.Lowered:
        """Traces and lowers the scoring of one batch, in the step's microbatches."""
        step = jax.jit(
            functools.partial(eval_step, learner=self.learner),
            out_shardings=rules.replicated(self.mesh),
        )
        return step.lower(self.placed_shapes().params, self.batch_shapes())


def assemble(
    config: ResolvedConfig, devices: Sequence[jax.Device] | None = None
) -> Run:
    """Builds the mesh and describes the run; allocates and compiles nothing.

    Args:
        config: the whole configuration.
        devices: those to use; by default all that jax finds. They may be of a topology
            that is only described, to compile for it.
    Raises:
        DeviceError: jax finds none.
        ConfigError: the mesh needs more devices than there are or does not join their
            slices, an array does not divide over it, or code of the user's was not
            admitted before.
    """
    config = user_code.admitted(config)
    settings = config.settings
    devices = here(settings.platform) if devices is None else devices
    number = len(devices)
    if number < settings.mesh.num_devices:
        raise ConfigError(
            config.where,
            [
                f"the mesh {describe(settings.mesh)} needs "
                f"{settings.mesh.num_devices} devices and {number} are "
                "here: shrink the MESH_ axes, or set PLATFORM = 'cpu' and "
                f"SIMULATED_DEVICES = {settings.mesh.num_devices}"
            ],
        )
    try:
        mesh = make_mesh(settings.mesh, devices)
    except ValueError as error:  # slices that its axes do not join
        raise ConfigError(config.where, [str(error)]) from error
    _refuse_missing_exchange(config, mesh)
    model = build(
        settings.model,
        settings.router,
        settings.execution,
        mesh,
        settings.partition,
        settings.encoder_router,
    )
    specs = inventory.specs(settings.layers)
    if found := trained.problems(specs, settings.optimizer):
        raise ConfigError(config.where, found)
    optimizer = make_optimizer(
        *(settings.optimizer, settings.train.train_steps),
        specs,
        model.grid,
    )
    learner = Learner(
        model=model,
        optimizer=optimizer,
        schedule=make_schedule(settings.optimizer, settings.train.train_steps),
        loss=settings.loss,
        microbatches=settings.train.microbatches,
        seed=settings.train.seed,
        rounding=settings.optimizer.rounding,
        trained_of=(
            functools.partial(trained.trained_of, settings=settings.optimizer)
            if settings.optimizer.trainable or settings.optimizer.frozen
            else None
        ),
        qk_clip=settings.optimizer.qk_clip,
    )
    shapes = new_state.abstract(
        settings.layers, settings.execution.param_dtype, optimizer
    )
    state_axes = new_state.logical_axes(shapes, settings.layers)
    if problems := placement.problems(
        mesh, shapes, state_axes, learner.model.grid.table
    ):
        raise ConfigError(config.where, problems)
    shardings = new_state.shardings(shapes, state_axes, mesh, settings.partition)
    if settings.optimizer.offload:
        on_device = shardings.opt_state
        on_host = jax.tree.map(
            lambda place: place.with_memory_kind("pinned_host"), on_device
        )
        shardings = dataclasses.replace(shardings, opt_state=on_host)
        learner = dataclasses.replace(learner, opt_shardings=on_device)
    return Run(
        settings=settings,
        mesh=mesh,
        learner=learner,
        shapes=shapes,
        axes=state_axes,
        shardings=shardings,
        batch_sharding=rules.sharding(mesh, ("batch", "length")),
    )


def _refuse_missing_exchange(config: ResolvedConfig, mesh: jax.sharding.Mesh) -> None:
    """Says before compiling that devices have no ragged exchange; CPU stands in."""
    platform = mesh.devices.flat[0].platform
    if mesh.shape["expert"] == 1 or platform == "cpu":
        return
    settings = config.settings
    sparse = architecture.has_experts(settings.model)
    if sparse and settings.execution.transport == "ragged":
        if auto.mesh_has_ragged_exchange(mesh):
            return
        raise ConfigError(
            config.where,
            [
                f"TRANSPORT = 'ragged': {mesh.devices.size} "
                f"{mesh.devices.flat[0].device_kind} devices have no ragged exchange: "
                "use 'ring', 'all_to_all' or 'auto'"
            ],
        )
