"""What must divide over the mesh. Read before jax: standard library only."""

from collections.abc import Mapping, Sequence

from moe import architecture
from moe.settings import (
    ExecutionSettings,
    ModelSettings,
    RouterSettings,
    TrainSettings,
)
from partitioning.settings import BATCH_AXES, MeshSettings, PartitionSettings


def problems(
    mesh: MeshSettings,
    partition: PartitionSettings,
    model: ModelSettings,
    routers: Mapping[str, tuple[RouterSettings, int]],
    execution: ExecutionSettings,
    train: TrainSettings,
) -> list[str]:
    """Lists sizes that do not divide over the mesh axes they are cut over.

    Args:
        mesh: every axis is at least 1.
        partition: what is cut over them.
        model: numbers of heads and experts, widths, and size of the vocabulary.
        routers: settings of groups, and tokens of a row, of each stack, by the macro
            of the groups' size.
        execution: pieces of the vocabulary.
        train: size of the batch, and how many microbatches it is cut into.
    """
    found = []
    sparse = architecture.has_experts(model)
    group_rows = max(router.group_rows for router, _ in routers.values())
    group_rows = group_rows if sparse else 1
    multiple = mesh.batch_shards * train.microbatches * group_rows
    axes = named(mesh, BATCH_AXES)
    shards = f"{mesh.batch_shards} batch shards ({axes})" if axes else "1 batch shard"
    sizes = {"BATCH_SIZE": train.batch_size}
    sizes |= {f"BATCH_RAMP from batch {n}": rows for n, rows in train.batch_ramp[:-1]}
    found += [
        f"{which} = {rows} does not divide over {shards} × "
        f"MICROBATCHES = {train.microbatches}"
        + (f" × GROUP_ROWS = {group_rows}" if group_rows > 1 else "")
        + f": {_nearest_multiples(rows, multiple)}"
        for which, rows in sizes.items()
        if multiple >= 1 and rows >= 1 and rows % multiple
    ]
    numbers = {model.num_experts, *model.experts_per_layer} if sparse else set()
    found += [
        _expert_problem(model, number, mesh.expert)
        for number in sorted(numbers)
        if number >= 1 and number % mesh.expert
    ]
    for macro, (router, length) in routers.items():
        found += _sequence_problems(mesh, partition, model, macro, router, length)
    if mesh.model > 1:
        found += _model_axis_problems(mesh.model, partition, model, execution)
    return found + _full_sharding_problems(mesh, partition, model)


def _sequence_problems(
    mesh: MeshSettings,
    partition: PartitionSettings,
    model: ModelSettings,
    macro: str,
    router: RouterSettings,
    length: int,
) -> list[str]:
    """Sequences are cut over `context`, and for their experts over `model` too."""
    cuts = mesh.context * mesh.model
    if cuts == 1:
        return []
    axes = named(mesh, ("context", "model"))
    cut = router.group_length
    sparse = architecture.has_experts(model)
    whole_groups = sparse and cut >= 1
    if not sparse and not partition.sequence_parallel:
        cuts = mesh.context
    if length % cuts:
        return [
            f"a row of {length} tokens does not divide over {axes}: "
            f"{_nearest_multiples(length, cuts)}, or make an axis smaller"
        ]
    piece = length // cuts
    if not whole_groups or piece % cut == 0:
        return []
    rows = router.group_rows
    fitting = [d * rows for d in range(1, piece + 1) if piece % d == 0]
    below = [size for size in fitting if size <= router.group_size][-2:]
    of_each = f", cut over GROUP_ROWS = {rows} rows," if rows > 1 else ""
    return [
        f"{macro} = {router.group_size}{of_each} does not divide the {piece} tokens "
        f"of a row of {length} that each device of {axes} routes: use "
        f"{_choice(below)}, or make an axis smaller"
    ]


def _model_axis_problems(
    size: int,
    partition: PartitionSettings,
    model: ModelSettings,
    execution: ExecutionSettings,
) -> list[str]:
    """Heads, widths and the vocabulary are cut over `model`."""
    cut = {
        "NUM_HEADS": model.num_heads,
        "VOCAB_SIZE": model.vocab_size,
    }
    sparse = architecture.has_experts(model)
    if architecture.has_dense(model):
        cut["MLP_DIM"] = model.mlp_dim
    if sparse and partition.expert_tensor_parallel:
        cut["EXPERT_MLP_DIM"] = model.expert_mlp_dim
    if sparse and model.shared_expert_mlp_dim:
        cut["SHARED_EXPERT_MLP_DIM"] = model.shared_expert_mlp_dim
    found = [
        f"{macro} = {number} does not divide over MESH_MODEL = {size}: "
        f"{_nearest_multiples(number, size)}"
        for macro, number in cut.items()
        if number % size
    ]
    chunks = execution.vocab_chunks
    if chunks > 1 and model.vocab_size % (size * chunks):
        found.append(
            f"VOCAB_SIZE = {model.vocab_size} does not divide over MESH_MODEL = {size} "
            f"× VOCAB_CHUNKS = {chunks}: "
            f"{_nearest_multiples(model.vocab_size, size * chunks)}"
        )
    return found


def _full_sharding_problems(
    mesh: MeshSettings, partition: PartitionSettings, model: ModelSettings
) -> list[str]:
    """What is fully sharded is cut along its width."""
    if partition.fsdp == "none":
        return []
    axes = ["data", "context"]
    if partition.fsdp == "data_expert":
        axes.append("expert")
    pieces = {"dense weights": axes}
    if architecture.has_experts(model) and not partition.expert_tensor_parallel:
        pieces["experts"] = ["data", "context", "model"]
    found = []
    for what, over in pieces.items():
        parts = 1
        for axis in over:
            parts *= getattr(mesh, axis)
        cut = {"EMBED_DIM": model.model_dim}
        if what == "dense weights" and model.attention == "latent":
            cut["KV_LATENT_DIM"] = model.kv_latent_dim
            cut["QUERY_LATENT_DIM"] = model.query_latent_dim
        found += [
            f"{macro} = {width} does not divide over the {parts} "
            f"pieces of {named(mesh, over)} that FSDP = {partition.fsdp!r} cuts "
            f"{what} into: make an axis smaller, or choose another FSDP"
            for macro, width in cut.items()
            if width % parts
        ]
    return found


def _expert_problem(model: ModelSettings, num_experts: int, axis_size: int) -> str:
    """What fits instead: the nearest numbers of experts, and the nearest axis sizes."""
    below = num_experts // axis_size * axis_size
    numbers = [n for n in (below, below + axis_size, below + 2 * axis_size) if n]
    most = min(num_experts, 2 * axis_size)
    divisors = [n for n in range(2, most + 1) if num_experts % n == 0] or [1]
    sizes = sorted(sorted(divisors, key=lambda n: abs(n - axis_size))[:3])
    return (
        f"{architecture.told(model, num_experts)} does not divide over the expert axis "
        f"of size {axis_size}: use {_choice(numbers)}, or set MESH_EXPERT to "
        f"{_choice(sizes)}"
    )


def named(mesh: MeshSettings, axes: Sequence[str]) -> str:
    """Names the axes larger than 1 as the user sets them."""
    sizes = {axis: getattr(mesh, axis) for axis in axes}
    return " × ".join(f"MESH_{a.upper()} {n}" for a, n in sizes.items() if n > 1)


def _nearest_multiples(value: int, multiple: int) -> str:
    below = value // multiple * multiple
    above = below + multiple
    return f"nearest are {below} and {above}" if below else f"the least is {above}"


def _choice(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
