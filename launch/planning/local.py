"""What one chip holds and works on: the sizes of a run, cut by its mesh.

Memory, traffic and time are all arithmetic on these. Nothing here touches a device;
parameters are the model's own, by `jax.eval_shape`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from launch.planning.chips import CHIPS
from launch.settings import Settings
from moe.dispatch import choice
from moe.dispatch.room import room_for
from moe.model import transformer
from moe.model.feed_forward import GATED
from moe.settings import (
    ModelSettings,
    OptimizerSettings,
    RouterSettings,
    capacity,
)
from moe.training import state as train_state
from moe.training.optimizer import make_optimizer
from partitioning import rules
from partitioning.settings import AXES, FASTEST_FIRST

BYTES = {"float32": 4, "bfloat16": 2}
FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array of parameters, or of the optimizer's state.

    Attributes:
        path: its names, joined by "/".
        shape: global.
        itemsize: bytes per element.
        logical: its logical axes.
        cut: the mesh axes that each dimension is cut over.
        sizes: of the mesh axes.
    """

    path: str
    shape: tuple[int, ...]
    itemsize: int
    logical: tuple[str | None, ...]
    cut: tuple[tuple[str, ...], ...]
    sizes: dict[str, int] = dataclasses.field(repr=False)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Its shape on one chip."""
        return tuple(
            -(-size // math.prod(self.sizes[a] for a in axes))
            for size, axes in zip(self.shape, self.cut, strict=True)
        )

    @property
    def local_size(self) -> int:
        """Elements on one chip."""
        return math.prod(self.local_shape)

    @property
    def num_layers(self) -> int:
        """Layers that it is stacked over."""
        return self.shape[0] if "layers" in self.logical else 1

    @property
    def gathered_over(self) -> tuple[str, ...]:
        """Mesh axes, larger than 1, that it is gathered over: the first comes last."""
        return tuple(
            axis
            for logical, axes in zip(self.logical, self.cut, strict=True)
            if logical in rules.FULLY_SHARDED
            for axis in axes
            if self.sizes[axis] > 1
        )

    @property
    def whole_over(self) -> tuple[str, ...]:
        """Mesh axes, larger than 1, on which every chip holds the same part."""
        used = {axis for axes in self.cut for axis in axes}
        return tuple(a for a in AXES if self.sizes[a] > 1 and a not in used)

    @property
    def gathered_size(self) -> int:
        """Elements, of all its layers, once gathered."""
        return self.local_size * math.prod(self.sizes[a] for a in self.gathered_over)


@dataclasses.dataclass(frozen=True)
class Local:
    """Sizes on one chip, of one microbatch.

    Attributes:
        settings: of the run.
        chip: its name, or the platform where any of its chips will do; it decides the
            transport.
        rows: b, sequences.
        length: l, tokens of each that attention's queries come from.
        piece: tokens of each that a sparse layer takes; the residual stream too, if
            it is cut over `model`.
        train: whether capacity and transport are those of training, or of evaluation.
    """

    settings: Settings
    chip: str
    rows: int
    length: int
    piece: int
    train: bool = True

    @property
    def platform(self) -> str:
        """Of the chip: "tpu", "gpu" or "cpu"."""
        return CHIPS[self.chip].kind if self.chip in CHIPS else self.chip

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the mesh axes."""
        return {axis: getattr(self.settings.mesh, axis) for axis in AXES}

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one activation."""
        return BYTES[self.settings.model.dtype]

    @property
    def tokens(self) -> int:
        """T, tokens that go through products cut over `model`."""
        return self.rows * self.length

    @property
    def piece_tokens(self) -> int:
        """Tokens that this chip routes."""
        return self.rows * self.piece

    @property
    def residual_tokens(self) -> int:
        """Tokens of the residual stream between layers."""
        parallel = self.settings.partition.sequence_parallel
        return self.piece_tokens if parallel else self.tokens

    @property
    def num_dense_layers(self) -> int:
        """Layers without experts."""
        model = self.settings.model
        return model.num_layers - model.num_sparse_layers

    @property
    def transport(self) -> str:
        """How rows travel."""
        return self.picked[0]

    @property
    def picked(self) -> tuple[str, str]:
        """The transport, and why."""
        model, router = self.settings.model, self.settings.router
        axis_size = self.settings.mesh.expert
        per_slice = self.settings.mesh.num_devices // self.settings.mesh.replica
        has_ragged = choice.has_ragged_exchange(self.platform, self.chip, per_slice)
        return choice.pick(model, router, axis_size, has_ragged, train=self.train)

    @property
    def sent_rows(self) -> int:
        """Rows that this chip's tokens make: slots of capacity, or choices."""
        router, E = self.settings.router, self.settings.model.num_experts
        groups = -(-self.piece_tokens // router.group_size)
        slots = E * capacity(router, E, train=self.train) * groups
        if self.transport in choice.PADDED:
            return slots
        return min(self.piece_tokens * router.num_choices(E), slots)

    @property
    def expert_rows(self) -> int:
        """Rows that this chip's experts have room for, before any gather."""
        if self.transport in choice.PADDED:
            return self.sent_rows
        router, E = self.settings.router, self.settings.model.num_experts
        axis_size = self.settings.mesh.expert
        return room_for(
            router, E, self.piece_tokens, axis_size, self.platform, train=self.train
        ).num_rows

    @property
    def most_rows(self) -> int:
        """Rows that could come to this chip's experts if all chose them."""
        model, router = self.settings.model, self.settings.router
        axis_size, E = self.settings.mesh.expert, model.num_experts
        room = room_for(
            router, E, self.piece_tokens, axis_size, self.platform, train=self.train
        )
        return room.num_rows * room.num_rounds

    @property
    def expert_model_cut(self) -> int:
        """Chips of the `model` axis that share each expert."""
        cut = self.settings.partition.expert_tensor_parallel
        return self.settings.mesh.model if cut else 1

    @property
    def is_blocked(self) -> bool:
        """Whether attention goes block by block."""
        block = self.settings.model.attention_block
        ring = self.settings.partition.context_attention == "ring"
        cut = self.settings.mesh.context > 1
        return 0 < block <= self.settings.data.length or (ring and cut)

    def cut_heads(self, heads: int) -> int:
        """Returns the heads that one chip has of so many."""
        return -(-heads // self.settings.mesh.model)

    @property
    def dense_pair(self) -> int:
        """Matrices that lead into a dense feed-forward: 2 if it is gated."""
        return 2 if self.settings.model.activation in GATED else 1

    @property
    def expert_pair(self) -> int:
        """The same of an expert."""
        return 2 if self.settings.model.activation_of_experts in GATED else 1


def local(settings: Settings, chip: str) -> Local:
    """Cuts the batch of a run by its mesh and its microbatches; see `Local`."""
    mesh = settings.mesh
    shards = mesh.batch_shards * settings.train.microbatches
    length = -(-settings.data.length // mesh.context)
    return Local(
        settings=settings,
        chip=chip,
        rows=-(-settings.train.batch_size // shards),
        length=length,
        piece=-(-length // mesh.model),
    )


def weights(
    settings: Settings, fastest_first: Sequence[str] = FASTEST_FIRST
) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
    """Returns all parameters, and the rest of the train state, with their places.

    Args:
        settings: of the run.
        fastest_first: the mesh axes by bandwidth; only the order of `gathered_over`
            depends on it.
    """
    sizes = {axis: getattr(settings.mesh, axis) for axis in AXES}
    table = rules.table(settings.partition, fastest_first)
    parameters: list[Weight] = []
    others: list[Weight] = []
    for path, array, logical in _state(*_of_shapes(settings)):
        first, _, rest = path.partition("/")
        of_parameters = first == "params"
        weight = Weight(
            path=rest if of_parameters else path,
            shape=tuple(array.shape),
            itemsize=array.dtype.itemsize,
            logical=tuple(logical),
            cut=tuple(table[axis] if axis else () for axis in logical),
            sizes=sizes,
        )
        (parameters if of_parameters else others).append(weight)
    return tuple(parameters), tuple(others)


def _of_shapes(
    settings: Settings,
) -> tuple[ModelSettings, RouterSettings, OptimizerSettings]:
    """What shapes depend on; all else as one, so that a search asks only once."""
    model = dataclasses.replace(
        settings.model,
        remat="none",
        sparse_remat="same",
        vocab_chunks=1,
        attention_block=0,
        transport="auto",
        dtype="float32",
        reduce_dtype="float32",
    )
    router = RouterSettings(
        family=settings.router.family, selection_bias=settings.router.selection_bias
    )
    return model, router, settings.optimizer


@functools.lru_cache(maxsize=16)
def _state(
    model: ModelSettings, router: RouterSettings, optimizer: OptimizerSettings
) -> list[tuple[str, Any, tuple]]:
    """Path, shape and logical axes of the train state; the same on every mesh."""
    param_axes = transformer.param_axes(model, router)
    transformation = make_optimizer(optimizer, 1, param_axes)
    shapes = train_state.abstract_state(model, router, transformation)
    return rules.leaves(shapes, train_state.logical_axes(shapes, model, router))


def blocks(parameters: tuple[Weight, ...]) -> dict[str, list[Weight]]:
    """Groups the parameters that are used together, layer by layer.

    Returns:
        "PERIODS/blocks/I": those of the I-th layer of each period.
    """
    found: dict[str, list[Weight]] = {}
    for weight in parameters:
        if "layers" in weight.logical:
            found.setdefault("/".join(weight.path.split("/")[:3]), []).append(weight)
    return found


def tiled_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Returns the bytes of an array in a TPU's memory, with its padding.

    The last two dimensions are laid out in tiles of 8 × 128, or fewer rows where the
    array has fewer, and the compiler takes which two are last; vectors come in up to
    1,024, scalars in 512 bytes. Read from programs that libtpu 0.0.42 compiled.
    """
    if not shape:
        return 512
    size = math.prod(shape)
    if len(shape) == 1:
        tile = min(max(128, 2 ** math.ceil(math.log2(size))), 1024)
        return max(-(-size // tile) * tile * itemsize, 512)
    least = min(
        size // (row * column) * _rows(row) * (-(-column // 128) * 128)
        for i, row in enumerate(shape)
        for j, column in enumerate(shape)
        if i != j
    )
    return max(least * itemsize, 512)


def _rows(rows: int) -> int:
    """Rows with their padding: tiles have 8, or 2 or 4 for arrays of so few."""
    return 2 ** math.ceil(math.log2(rows)) if rows < 8 else -(-rows // 8) * 8
