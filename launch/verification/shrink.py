"""Makes a configuration small without changing what it does. Standard library only.

Sizes shrink; choices stay: router, transport, positions, norms, activations, biases,
periods, remat, placement, optimizer. What divided goes on dividing.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import moe.constraints
from launch.config.macros import bound
from launch.config.places import sections
from launch.config.settings import PlatformSettings, Settings
from launch.errors import ConfigError
from launch.verification import meshes
from moe import architecture
from moe.dispatch import auto
from moe.settings import (
    ExecutionSettings,
    ModelSettings,
    OptimizerSettings,
    RouterSettings,
)
from moe.shortening import shortened
from partitioning.settings import MeshSettings, PartitionSettings

_LOW = 0.5  # logits of attention that many heads of a small model exceed
_FACTORED = 128  # the least width of which Optax's Adafactor factors the moments
_RECORDS = (
    *("model", "router", "encoder_router", "execution", "optimizer", "train", "data"),
)
# Short rows then reach every bucket of a relative position.
_NEAR: dict[str, Any] = {"relative_buckets": 8, "relative_max_distance": 12}


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting that is another in what is verified: its macro, both values."""

    name: str
    before: Any
    after: Any


@dataclasses.dataclass(frozen=True)
class Mesh:
    """A mesh to verify.

    Attributes:
        asked: that of the run.
        small: the one that is run here.
        transport: what the run's TRANSPORT takes on it.
    """

    asked: MeshSettings
    small: MeshSettings
    transport: str


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """A small configuration, and the meshes to run it on.

    Attributes:
        settings: that fit one device and each of the meshes; `mesh` is one device.
        meshes: all to verify.
        tail: tokens at the end of each row that are padding and can be cut away.
        changes: what differs from the configuration that was given.
    """

    settings: Settings
    meshes: tuple[Mesh, ...]
    tail: int
    changes: tuple[Change, ...]

    def on(self, mesh: Mesh) -> Settings:
        """The settings on one of the shrunk meshes."""
        execution = dataclasses.replace(
            self.settings.execution,
            transport=mesh.transport,  # type: ignore[arg-type]
        )
        return dataclasses.replace(self.settings, mesh=mesh.small, execution=execution)

    def on_one_device(self) -> Settings:
        """The reference: the plainest way to compute the same.

        One device, one microbatch, nothing recomputed, one-hot products for the
        transport.
        """
        settings = self.settings
        return dataclasses.replace(
            settings,
            mesh=MeshSettings(),
            partition=PartitionSettings(),
            execution=dataclasses.replace(
                settings.execution,
                remat="none",
                sparse_remat="same",
                transport="einsum",
            ),
            train=dataclasses.replace(settings.train, microbatches=1),
        )


def shrink(
    settings: Settings,
    asked: Sequence[MeshSettings],
    where: str,
    most: int = meshes.MOST_DEVICES,
) -> Shrunk:
    """Finds small settings that suit all the meshes, and one device.

    Args:
        settings: configuration of the run.
        asked: meshes of the run, as large as they are.
        where: the configuration as the user named it.
        most: devices of a shrunk mesh.
    Raises:
        ConfigError: no small settings obey all rules.
    """
    small = [meshes.shrink(mesh, most) for mesh in asked]
    fewer = _with_fewer_heads(settings, asked, _common(small, "model"))
    problems: list[str] = []
    for candidate, tail in _candidates(fewer, small):
        problems = moe.constraints.problems(
            candidate.model,
            candidate.router,
            candidate.execution,
            candidate.loss,
            candidate.train,
            length=candidate.data.length,
            encoder_router=candidate.encoder_router,
            encoder_length=candidate.data.encoder_length,
        )
        if not problems:
            chosen = tuple(
                Mesh(one, other, _transport(settings, one))
                for one, other in zip(asked, small, strict=True)
            )
            return Shrunk(candidate, chosen, tail, _changes(settings, candidate))
    raise ConfigError(
        where, [f"no small version of it obeys every rule: {p}" for p in problems]
    )


def _candidates(
    settings: Settings, small: Sequence[MeshSettings]
) -> Iterator[tuple[Settings, int]]:
    """Small settings, the smallest first, and the padding of their rows."""
    router = settings.router
    divides = [_common(small, "expert")]
    if "prototypes" in (router.family, settings.encoder_router.family):
        divides.append(_prototypes(router))
    divides.append(min(router.num_expert_groups, 4))
    multiple = math.lcm(*divides)
    enough = min(max(settings.model.num_experts, 1), 8)
    numbers = [multiple * n for n in range(1, 9) if multiple * n >= enough]
    pieces = _common(small, "context", "model")
    sizes = (4, 8, 16, 32) if pieces > 4 else (8, 16, 32, 4)
    for number, size in itertools.product(numbers[:4], sizes):
        size = min(size, router.group_length)
        length = max(2 * size * pieces, 32)
        length = -(-length // (size * pieces)) * size * pieces
        sized = _sized(settings, small, number, multiple, size, length)
        yield sized, size * pieces


def _sized(
    settings: Settings,
    small: Sequence[MeshSettings],
    num_experts: int,
    divides: int,
    group_size: int,
    length: int,
) -> Settings:
    """The settings with given numbers of experts and tokens of a group in each row."""
    microbatches = min(settings.train.microbatches, 2)
    shards = _common(small, "replica", "data", "expert") * 2
    if architecture.has_experts(settings.model):
        shards *= _group_rows(settings.router)
    names = list(settings.data.task_feature_lengths)
    if settings.data.layout == "encoder_decoder":  # of other lengths
        pieces = _common(small, "context", "model")
        lengths = {"inputs": length + group_size * pieces, "targets": length}
    else:
        lengths = dict.fromkeys(names, length // len(names))
        lengths[names[0]] += length - sum(lengths.values())
    data = dataclasses.replace(
        settings.data, task_feature_lengths=lengths, **_image(settings.model)
    )
    of_stacks = {"scored": data.length, "beside": data.encoder_length}
    return dataclasses.replace(
        settings,
        platform=PlatformSettings("cpu"),
        mesh=MeshSettings(),
        model=_model(settings, small, num_experts, divides, of_stacks),
        router=_router(settings.router, num_experts, group_size),
        encoder_router=_router(settings.encoder_router, num_experts, group_size),
        execution=_execution(settings, small, length),
        optimizer=_optimizer(settings.optimizer),
        train=dataclasses.replace(
            settings.train,
            batch_size=_multiple(shards, 16),
            batch_ramp=(),
            microbatches=microbatches,
        ),
        data=data,
    )


def _model(
    settings: Settings,
    small: Sequence[MeshSettings],
    num_experts: int,
    divides: int,
    lengths: Mapping[str, int],
) -> ModelSettings:
    """Two periods of narrow layers; `divides` does so to every number of experts."""
    model = shortened(settings.model)
    length = lengths["scored"]
    cut = _common(small, "model")
    whole = _common(small, "data", "context", "expert", "model")
    least = _FACTORED if settings.optimizer.name == "adafactor" else 16
    chunks = min(settings.execution.vocab_chunks, 2)

    def shorter(places: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n and max(n * length // settings.data.length, 2) for n in places)

    sparse = architecture.has_experts(model)
    learned = model.positions == "learned"
    most = max(model.experts_per_layer, default=1)
    return dataclasses.replace(
        model,
        vocab_size=_multiple(cut * chunks, max(least, 32)),
        model_dim=_multiple(whole, least),
        head_dim=_head_dim(model),
        **_latent(model, _multiple(whole, least)),
        attention_windows=shorter(model.attention_windows),
        attention_chunks=shorter(model.attention_chunks),
        attention_growth_length=shorter((model.attention_growth_length,))[0],
        mlp_dim=_multiple(cut, max(least, 24)),
        **(_NEAR if model.positions.startswith("relative") else {}),
        max_positions=max(lengths.values()) if learned else model.max_positions,
        num_experts=num_experts if sparse else model.num_experts,
        experts_per_layer=tuple(
            _multiple(divides, max(num_experts * number // most, 1))
            for number in model.experts_per_layer
        ),
        expert_mlp_dim=_multiple(cut, max(least, 16)),
        shared_expert_mlp_dim=_multiple(cut, 16) if model.shared_expert_mlp_dim else 0,
        predict_ahead=min(model.predict_ahead, 2),
        init_scale=1.0,
        **_image(model),
    )


def _with_fewer_heads(
    settings: Settings, asked: Sequence[MeshSettings], cut: int
) -> Settings:
    """The settings with few heads, whose keys divide over `model` if they did."""
    model = settings.model
    had = model.num_kv_heads or model.num_heads
    kv_heads = cut if cut > 1 else min(had, 2)
    num_heads = kv_heads * min(model.num_heads // had, 2)
    uneven = [mesh.model for mesh in asked if had % mesh.model]
    if uneven and uneven[0] % had == 0:  # a device's queries share one
        num_heads, kv_heads = cut, max(cut // 2, 1)
    elif uneven:
        num_heads, kv_heads = 3 * cut, 3
    fewer = dataclasses.replace(
        model,
        num_heads=num_heads,
        num_kv_heads=kv_heads if model.num_kv_heads else 0,
    )
    return dataclasses.replace(settings, model=fewer)


def _head_dim(model: ModelSettings) -> int:
    """The least of which the same share can turn."""
    sizes = (4, 8, 16, 20, 24, 32)
    turned = ((size, size * model.rope_fraction / 2) for size in sizes)
    fitting = [size for size, pairs in turned if abs(pairs - round(pairs)) < 1e-6]
    return fitting[0] if fitting else model.head_dim


def _latent(model: ModelSettings, width: int) -> dict[str, Any]:
    """Widths of latent attention, each another; latents divide as the model does."""
    if model.attention != "latent":
        return {}
    return {
        "query_latent_dim": width if model.query_latent_dim else 0,
        "kv_latent_dim": width,
        "rope_head_dim": _head_dim(model),
        "value_head_dim": 6,
    }


def _image(model: ModelSettings) -> dict[str, Any]:
    """Four patches of an image, if there are images."""
    return {"image_size": 4, "patch_size": 2} if model.image_size else {}


def _execution(
    settings: Settings, small: Sequence[MeshSettings], length: int
) -> ExecutionSettings:
    """In float32, and with room for every row.

    A step that has none is taken again, and is another test.
    """
    execution = settings.execution
    blocked = 0 < execution.attention_block <= settings.data.length
    return dataclasses.replace(
        execution,
        dtype="float32",
        param_dtype="float32",
        reduce_dtype="float32",
        attention_block=length // 2 if blocked else 0,
        vocab_chunks=min(execution.vocab_chunks, 2),
        row_budget=max(execution.row_budget, float(_common(small, "expert"))),
    )


def _transport(settings: Settings, mesh: MeshSettings) -> str:
    """The transport that the run takes on its own devices, not on simulated ones."""
    has_ragged = settings.platform.name != "cpu"
    for s in settings.layers.settings("sparse")[:1]:
        return auto.transport_for(
            settings.execution.transport, s, mesh.expert, has_ragged, train=True
        )[0]
    return settings.execution.transport


def _prototypes(router: RouterSettings) -> int:
    return min(router.num_prototypes, 4)


def _group_rows(router: RouterSettings) -> int:
    return min(router.group_rows, 2)


def _router(
    router: RouterSettings, num_experts: int, group_size: int
) -> RouterSettings:
    """The same router over fewer experts and smaller groups."""
    groups = min(router.num_expert_groups, 4)
    selected = -(-router.num_selected_groups * groups // router.num_expert_groups)
    return dataclasses.replace(
        router,
        num_selected=min(router.num_selected, max(num_experts // 2, 1)),
        num_prototypes=_prototypes(router),
        num_expert_groups=groups,
        num_selected_groups=selected,
        logit_dtype="float32",
        group_size=group_size * _group_rows(router),
        group_rows=_group_rows(router),
        min_capacity=min(router.min_capacity, 1),
        capacity_multiple=min(router.capacity_multiple, 2),
    )


def _optimizer(optimizer: OptimizerSettings) -> OptimizerSettings:
    """The same optimizer, whose first step is large enough to be seen in float32.

    Logits are bounded at once, where they are at all.
    """
    return dataclasses.replace(
        optimizer,
        learning_rate=max(optimizer.learning_rate, 1e-2),
        warmup_steps=0,
        qk_clip=min(optimizer.qk_clip, _LOW),
        moment_dtype="float32",
        rounding="nearest",
        offload=False,
        trainable=(),
        frozen=(),
    )


def _common(small: Sequence[MeshSettings], *axes: str) -> int:
    """The least number that divides over these axes of every mesh."""
    products = (math.prod(getattr(mesh, axis) for axis in axes) for mesh in small)
    return math.lcm(*products)


def _multiple(of: int, least: int) -> int:
    return -(-least // of) * of


def _changes(before: Settings, after: Settings) -> tuple[Change, ...]:
    """Every setting that differs, by the macro that sets it."""
    macros = bound(sections())
    found = []
    for record in _RECORDS:
        old, new = getattr(before, record), getattr(after, record)
        for field in dataclasses.fields(old):
            values = getattr(old, field.name), getattr(new, field.name)
            if values[0] != values[1]:
                name = f"{record}.{field.name}"
                found.append(Change(macros.get(name, name), *values))
    return tuple(found)
