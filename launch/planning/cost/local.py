"""What one chip holds and works on: the sizes of a run, cut by its mesh.

Memory, traffic and time are all arithmetic on these. Nothing here touches a device;
parameters are the model's own, by `jax.eval_shape`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch.config.settings import Settings
from launch.planning.hardware.chips import CHIPS
from moe.dispatch import auto
from moe.dispatch.room import Room, room_for
from moe.layers import Block, Layers, Stack, of_kind, with_routers
from moe.model import inventory
from moe.model.attention import kernel_method
from moe.model.feed_forward.dense import GATED
from moe.routing.capacity import capacity
from moe.settings import (
    DenseSettings,
    HeadsSettings,
    LatentSettings,
    OptimizerSettings,
    RouterSettings,
    SparseSettings,
)
from moe.training import new_state
from moe.training.optimizer import make_optimizer
from partitioning import placement, rules
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
        sizes: devices along each mesh axis.
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
class Attention:
    """Attention of a layer: to a stack's own tokens, or to the other stack's.

    Attributes:
        settings: record of it.
        keys: tokens of a row that are asked.
        key_tokens: this chip's, of all its rows.
        crosses: whether they are the other stack's.
    """

    settings: HeadsSettings | LatentSettings
    keys: int
    key_tokens: int
    crosses: bool


class Projection(NamedTuple):
    """A product [tokens, inputs] × [inputs, outputs] of attention.

    Attributes:
        tokens: rows of the first.
        inputs: columns of the first.
        outputs: columns of the second.
        of_latent: whether it is made again where REMAT = "minimal" keeps others.
    """

    tokens: int
    inputs: int
    outputs: int
    of_latent: bool = False


@dataclasses.dataclass(frozen=True)
class Local:
    """Sizes on one chip, of one microbatch and one stack.

    Attributes:
        settings: settings of the run.
        name: name of the stack.
        chip: its name, or the platform where any of its chips will do; it decides the
            transport.
        rows: b, sequences.
        length: l, tokens of each that attention's queries come from.
        piece: tokens of each that a sparse layer takes; the residual stream too, if
            it is cut over `model`.
        train: whether capacity and transport are those of training, or of evaluation.
    """

    settings: Settings
    name: str
    chip: str
    rows: int
    length: int
    piece: int
    train: bool = True

    @property
    def platform(self) -> str:
        """Kind of the chip: "tpu", "gpu" or "cpu"."""
        return CHIPS[self.chip].kind if self.chip in CHIPS else self.chip

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the mesh axes."""
        return {axis: getattr(self.settings.mesh, axis) for axis in AXES}

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one activation."""
        return BYTES[self.settings.execution.dtype]

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
    def stack(self) -> Stack:
        """Its layers, and those that predict tokens after the next."""
        layers = self.settings.layers
        stack, ahead = layers.stacks[self.name], layers.ahead
        if ahead is None:
            return stack
        return stack._replace(segments=stack.segments + ahead.segments)

    @property
    def num_ahead(self) -> int:
        """Tokens after the next that are predicted."""
        ahead = self.settings.layers.ahead
        return 0 if ahead is None else len(ahead.segments)

    @property
    def row_length(self) -> int:
        """L, tokens of a whole row."""
        return self.settings.length_of(self.name)

    def attentions(self, block: Block) -> list[Attention]:
        """Returns what attends in a layer."""
        found = [
            Attention(s, self.row_length, self.tokens, False)
            for s in (*of_kind(block, "heads"), *of_kind(block, "latent"))
        ]
        for s in of_kind(block, "cross"):
            other = self.settings.data.encoder_length
            here = -(-other // self.settings.mesh.context)
            found.append(Attention(s, other, self.rows * here, True))
        return found

    def projections(self, a: Attention) -> list[Projection]:
        """Returns the products that make queries, keys, values and maybe gates.

        T' tokens have keys and values, (n·K + u·(K + X)) wide. Latents are made where
        the residual stream is cut; keys are made of those of the whole row if it is
        gathered (u is n, and C·(D + X) for each).
        """
        s, M, heads = a.settings, self.stack.width, self.cut_heads(a.settings.num_heads)
        queries = heads * s.key_width
        gate = [Projection(self.tokens, M, heads * s.value_width)] if s.gated else []
        if isinstance(s, HeadsSettings):
            kept = self.kv_heads(s) * (s.key_width + s.value_width)
            if not a.crosses:
                return [Projection(self.tokens, M, kept + queries), *gate]
            keys = Projection(a.key_tokens, M, kept)
            return [keys, Projection(self.tokens, M, queries), *gate]
        down = s.query_latent + s.kv_latent + s.rope_dim
        made = heads * (s.head_dim + s.value_dim)
        latent = s.query_latent > 0
        seen = a.key_tokens * self.gathered_rows
        return [
            Projection(self.residual_tokens, M, down),
            Projection(self.tokens, s.query_latent or M, queries, of_latent=latent),
            Projection(seen, s.kv_latent, made, of_latent=True),
            *gate,
        ]

    @property
    def gathered_rows(self) -> int:
        """Pieces of a row that latents are gathered of, where it is cut."""
        gathered = self.settings.partition.context_attention == "all_gather"
        return self.settings.mesh.context if gathered else 1

    def remat(self, block: Block) -> str:
        """Returns what the backward pass of a layer keeps."""
        sparse = bool(of_kind(block, "sparse"))
        return self.settings.execution.remat_of(sparse=sparse)

    def transport(self, s: SparseSettings) -> tuple[str, str]:
        """Returns how rows of a sparse layer travel, and why."""
        per_slice = self.settings.mesh.num_devices // self.settings.mesh.replica
        return auto.transport_for(
            self.settings.execution.transport,
            s,
            self.settings.mesh.expert,
            auto.has_ragged_exchange(self.platform, self.chip, per_slice),
            train=self.train,
        )

    def is_padded(self, s: SparseSettings) -> bool:
        """Whether rows of a sparse layer are slots of capacity."""
        return self.transport(s)[0] in auto.PADDED

    def carried_tokens(self, s: SparseSettings) -> int:
        """Returns the tokens that transports see: choices, where gates are inside."""
        gated = s.router.gate_place == "input"
        return self.piece_tokens * (s.router.num_choices(s.num_experts) if gated else 1)

    def sent_rows(self, s: SparseSettings) -> int:
        """Returns the rows that this chip's tokens make: slots, or choices."""
        groups = -(-self.piece_tokens // s.router.group_size)
        slots = (
            s.num_experts * capacity(s.router, s.num_experts, train=self.train) * groups
        )
        if self.is_padded(s):
            return slots
        return min(self.piece_tokens * s.router.num_choices(s.num_experts), slots)

    def expert_rows(self, s: SparseSettings) -> int:
        """Returns the rows that this chip's experts have room for, before a gather."""
        return self.sent_rows(s) if self.is_padded(s) else self._room(s).num_rows

    def most_rows(self, s: SparseSettings) -> int:
        """Returns the rows that could come to this chip's experts if all chose them."""
        room = self._room(s)
        return room.num_rows * room.num_rounds

    def _room(self, s: SparseSettings) -> Room:
        return room_for(
            s.router,
            s.num_experts,
            self.piece_tokens,
            self.settings.mesh.expert,
            self.platform,
            row_budget=self.settings.execution.row_budget,
            train=self.train,
        )

    @property
    def expert_model_cut(self) -> int:
        """Chips of the `model` axis that share each expert."""
        cut = self.settings.partition.expert_tensor_parallel
        return self.settings.mesh.model if cut else 1

    def attention_kernel(self, a: Attention) -> kernel_method.Kernel | None:
        """Returns the kernel that attends in training and scoring, if any does."""
        return kernel_method.of_heads(
            a.settings,
            self.settings.execution,
            self.platform,
            self.chip,
            length=self.row_length,
            whole=self.settings.mesh.context == 1 and not a.crosses,
            prefix=self.settings.data.prefix_attention == "bidirectional",
        )[0]

    def attention_block(self, a: Attention) -> int:
        """Returns tokens of a block of attention; 0 where scores are held whole."""
        kernel, length = self.attention_kernel(a), a.keys
        if kernel is not None:
            return kernel_method.block(kernel, length)
        block = self.settings.execution.attention_block
        ring = self.settings.partition.context_attention == "ring"
        if ring and self.settings.mesh.context > 1:
            return block or self.length
        return block if 0 < block <= length else 0

    def cut_heads(self, heads: int) -> int:
        """Returns the heads that one chip has of so many."""
        return -(-heads // self.settings.mesh.model)

    def kv_heads(self, s: HeadsSettings | LatentSettings) -> int:
        """Returns the heads of keys that one chip attends to."""
        return s.own_kv_heads(self.settings.mesh.model)

    def cut_width(self, s: DenseSettings) -> int:
        """Returns f, the part of a dense layer's width that one chip has."""
        return -(-s.mlp_dim // self.settings.mesh.model)

    def cut_expert(self, s: SparseSettings) -> int:
        """Returns f, the part of an expert's width that one chip has."""
        return -(-s.experts.mlp_dim // self.expert_model_cut)


def pair(s: DenseSettings) -> int:
    """Returns the matrices that lead into a feed-forward: 2 if it is gated."""
    return 2 if s.activation in GATED else 1


def sides(settings: Settings, chip: str) -> list[Local]:
    """Cuts the batch of a run for each of its stacks; the last is the scored one."""
    return [local(settings, chip, name) for name in settings.layers.stacks]


def local(settings: Settings, chip: str, name: str = "") -> Local:
    """Cuts the batch of a run by its mesh and its microbatches; see `Local`.

    Args:
        settings: settings of the run.
        chip: its name, or the platform.
        name: name of a stack; "" takes the one that is scored.
    """
    mesh, name = settings.mesh, name or settings.layers.scored
    shards = mesh.batch_shards * settings.train.microbatches
    length = -(-settings.length_of(name) // mesh.context)
    return Local(
        settings=settings,
        name=name,
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
        settings: settings of the run.
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


def _of_shapes(settings: Settings) -> tuple[Layers, str, OptimizerSettings]:
    """What shapes depend on; all else as one, so that a search asks only once."""
    bare = RouterSettings()
    layers = with_routers(
        settings.layers,
        lambda router: dataclasses.replace(
            bare,
            family=router.family,
            own=router.own,
            hash_gates=router.hash_gates,
            logit_bias=router.logit_bias,
            selection_bias=router.selection_bias,
        ),
    )
    return layers, settings.execution.param_dtype, settings.optimizer


@functools.lru_cache(maxsize=16)
def _state(
    layers: Layers, param_dtype: str, optimizer: OptimizerSettings
) -> list[tuple[str, Any, tuple]]:
    """Path, shape and logical axes of the train state; the same on every mesh."""
    transformation = make_optimizer(optimizer, 1, inventory.specs(layers))
    shapes = new_state.abstract(layers, param_dtype, transformation)
    return placement.leaves(shapes, new_state.logical_axes(shapes, layers))


def by_block(
    parameters: tuple[Weight, ...], name: str, stack: Stack
) -> list[tuple[Block, list[Weight]]]:
    """Groups a stack's parameters that are used together, layer by layer.

    Those of layers that predict tokens after the next are its last segments.
    """
    found: dict[tuple[int, int], list[Weight]] = {}
    own = [int(w.path.split("/")[2]) for w in parameters if _of_layers(w, name)]
    for weight in parameters:
        _, _, segment, block, *_ = (*weight.path.split("/"), *[""] * 4)
        if _of_layers(weight, name):
            found.setdefault((int(segment), int(block)), []).append(weight)
        elif _of_layers(weight, "ahead"):
            place = max(own) + 1 + int(segment), int(block)
            found.setdefault(place, []).append(weight)
    return [
        (stack.segments[segment].blocks[block], weights)
        for (segment, block), weights in found.items()
    ]


def _of_layers(weight: Weight, name: str) -> bool:
    return weight.path.startswith(f"{name}/layers/")


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
