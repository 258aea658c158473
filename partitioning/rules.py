"""The one table from logical axes to mesh axes, and the placements it gives.

An array's logical axes say what each of its dimensions means ("embed", "mlp"); the
table says how each meaning is cut over the mesh. Nothing else in the repository
decides where an array lives.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partitioning.settings import (
    BATCH_AXES,
    FASTEST_FIRST,
    UNCUT,
    PartitionSettings,
)

Rules = Mapping[str, tuple[str, ...]]

# What is left of a matrix when it is fully sharded is cut along this dimension.
FULLY_SHARDED = ("embed", "expert_embed")
# What these dimensions are called in the optimizer's state.
MOMENTS = {axis: f"{axis}_moment" for axis in FULLY_SHARDED}


def table(
    partition: PartitionSettings, fastest_first: Sequence[str] = FASTEST_FIRST
) -> Rules:
    """Returns the mesh axes of every logical axis.

    What is fully sharded over several is cut over the fastest of them first: that one
    is gathered last, and carries nearly all bytes (`Grid.gather`).

    Args:
        partition: what is cut beside the batch and the experts.
        fastest_first: the mesh axes by bandwidth; see `links.fastest_first`.
    """
    whole_experts = not partition.expert_tensor_parallel
    cut = {
        "none": ((), ()),
        "optimizer": ((), ("data", "context")),
        "data": (("data", "context"),) * 2,
        "data_expert": (("data", "context"),) * 2,
    }
    weights, moments = cut[partition.fsdp]
    also_expert = ("expert",) if partition.fsdp == "data_expert" else ()
    also_model = ("model",) if whole_experts else ()

    def ordered(*axes: str) -> tuple[str, ...]:
        return tuple(sorted(axes, key=fastest_first.index))

    return {
        # activations
        "batch": BATCH_AXES,
        "length": ("context",),
        "piece": ("context", "model"),  # of a sequence, in the sparse layers
        # parameters
        "expert": ("expert",),
        "vocab": ("model",),
        "heads": ("model",),
        "kv_heads": ("model",) if partition.cuts_kv_heads else (),
        "mlp": ("model",),
        "expert_mlp": () if whole_experts else ("model",),
        "embed": ordered(*weights, *also_expert),
        "expert_embed": ordered(*weights, *(also_model if weights else ())),
        "norm": (),  # a vector of M
        "routed": (),  # experts as a router sees them
        "bucket": (),  # of distance
        "position": (),
        "head_dim": (),
        "latent": (),  # what keys and values of all heads are made of
        "pair": (),  # a gate and what it gates
        "layers": (),
        # the same of the optimizer's state
        "embed_moment": ordered(*moments, *also_expert),
        "expert_embed_moment": ordered(*moments, *(also_model if moments else ())),
    }


DEFAULT = table(UNCUT)


def spec(logical_axes: Sequence[str | None], rules: Rules = DEFAULT) -> PartitionSpec:
    """Translates the logical axes of one array; None is a dimension left whole."""
    entries = []
    for axis in logical_axes:
        mesh_axes = rules[axis] if axis is not None else ()
        entries.append(mesh_axes if len(mesh_axes) > 1 else (*mesh_axes, None)[0])
    return PartitionSpec(*entries)


def specs(shapes: Any, logical_axes: Any, rules: Rules = DEFAULT) -> Any:
    """Translates the logical axes of a tree of arrays."""
    return jax.tree.map(lambda _, axes: spec(axes, rules), shapes, logical_axes)


def sharding(
    mesh: Mesh, logical_axes: Sequence[str | None], rules: Rules = DEFAULT
) -> NamedSharding:
    """Places one array by its logical axes."""
    return NamedSharding(mesh, spec(logical_axes, rules))


def replicated(mesh: Mesh) -> NamedSharding:
    """Places an array whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
