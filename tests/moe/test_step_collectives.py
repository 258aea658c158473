"""The collectives of a whole step's passes, forward and backward: those that we meant.

Layers are scanned, so that a layer's collectives stand in the loops of the two passes;
counts are per layer and, outside the loops, per step.
"""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from launch.planning.compiler.groups import axes, groups_text, members
from launch.planning.compiler.hlo_text import Instruction, Module, arrays
from moe import architecture
from moe.model import inventory, parameters
from moe.model.build import build
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    RouterSettings,
)
from moe.training import losses
from moe.training.train_step import Learner, batch_sums
from partitioning import placement, rules
from partitioning.mesh import make_mesh
from partitioning.settings import AXES, MeshSettings, PartitionSettings

# Sizes that tell dimensions apart; L, M and V are those of nothing else.
B, L, V, M, F, N, D, E, LAYERS = 8, 32, 80, 48, 64, 8, 2, 8, 3
DENSE = ModelSettings(
    vocab_size=V,
    num_layers=LAYERS,
    model_dim=M,
    num_heads=N,
    head_dim=D,
    mlp_dim=F,
    activation="geglu",
    moe_every=0,
)
SPARSE = ModelSettings(
    vocab_size=V,
    num_layers=LAYERS,
    model_dim=M,
    num_heads=N,
    head_dim=D,
    mlp_dim=F,
    activation="geglu",
    moe_every=1,
    num_experts=E,
    expert_mlp_dim=F,
)
TWO = dataclasses.replace(SPARSE, shape="encoder_decoder", num_encoder_layers=LAYERS)
EXECUTION = ExecutionSettings(transport="all_to_all", dtype="bfloat16")
ROUTER = RouterSettings(num_selected=2, group_size=4, min_capacity=1)
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
TOKENS = ("target_tokens", "input_tokens", "loss_weights", "segment_ids", "positions")


@functools.cache
def compiled(
    model: ModelSettings, mesh: MeshSettings, partition: PartitionSettings
) -> Module:
    """Reads the program of the loss and its gradients."""
    learner = Learner(
        model=build(model, ROUTER, EXECUTION, make_mesh(mesh), partition),
        optimizer=None,
        schedule=None,
        loss=LossSettings(),
        microbatches=1,
        seed=0,
    )
    grid = learner.model.grid
    shapes = parameters.shapes(learner.model.specs, "float32")
    table = rules.table(partition)
    places = jax.tree.map(
        lambda spec: rules.sharding(grid.mesh, spec.axes, table), learner.model.specs
    )
    batch = {
        f"{stack}_{name}": jax.ShapeDtypeStruct((B, length), np.int32)
        for stack, length in (("decoder", L), ("encoder", 2 * L))
        for name in TOKENS
        if stack in learner.model.layers.stacks
    }

    def loss(params, batch):
        sums, _ = batch_sums(params, batch, jax.random.key(0), learner)
        return losses.total(sums, learner.loss)[0]

    step = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(places, rules.sharding(grid.mesh, ("batch", "length"))),
        out_shardings=(None, places),
    )
    with jax.set_mesh(grid.mesh):
        return Module(step.lower(shapes, batch).compile().as_text())


def counted(module: Module, mesh: MeshSettings) -> dict[str, dict[str, int]]:
    """How often each kind runs over which axes, per layer and outside of layers.

    All-reduces count by array, since XLA joins some, and only in layers.
    """
    found = {"layer": collections.Counter(), "step": collections.Counter()}
    for instruction, times, in_loop in module.runs():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS or (kind == "all-reduce" and not in_loop):
            continue
        number = len(arrays(instruction.shape)) if kind == "all-reduce" else 1
        name = f"{kind} {axes_of(instruction, mesh)}"
        found["layer" if in_loop else "step"][name] += number * times
    assert all(count % LAYERS == 0 for count in found["layer"].values())
    per_layer = {name: count // LAYERS for name, count in found["layer"].items()}
    return {"layer": per_layer, "step": dict(found["step"])}


def axes_of(instruction: Instruction, mesh: MeshSettings) -> str:
    """The mesh axes that a collective runs over."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    if instruction.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
        group = np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
    else:
        group = members(groups_text(instruction.attributes), mesh.num_devices)
    return "×".join(axes(group, sizes))


@dataclasses.dataclass(frozen=True)
class Golden:
    """What is compiled, and what it must send."""

    model: ModelSettings
    mesh: MeshSettings
    partition: PartitionSettings
    layer: dict[str, int]
    step: dict[str, int]


# A layer has 6 matrices if it is dense; a sparse one 5, and 2 of experts. Weights are
# gathered forward and backward, and their gradients scattered. Attention, a dense
# feed-forward and rows of experts are gathered over `model`, and scattered or summed;
# backward the transposes. Under the "minimal" policy what was gathered over `model` or
# `context` is gathered again for products of the backward pass, but for rows; nothing
# is summed again.
GOLDENS = {
    "weights_and_widths": Golden(
        DENSE,
        MeshSettings(data=2, model=4),
        PartitionSettings(fsdp="data"),
        layer={
            "all-gather data": 6 + 6,
            "reduce-scatter data": 6,
            "all-gather model": 2 + 2 + 2,
            "reduce-scatter model": 2 + 2,
        },
        step={
            "all-gather data": 2,  # ids of tokens, the head
            "reduce-scatter data": 1,  # gradient of the head
            "all-to-all data": 2,  # embedded tokens and their gradients
            "all-gather model": 2,  # into the head; gradients of the embedding
            "reduce-scatter model": 2,
        },
    ),
    "context_and_widths_without_sequence_parallelism": Golden(
        DENSE,
        MeshSettings(data=2, context=2, model=2),
        PartitionSettings(sequence_parallel=False),
        layer={
            "all-gather context": 2 + 2,  # keys and values
            "reduce-scatter context": 2,
            "all-reduce model": 2 + 2,
        },
        step={"all-gather context": 1},  # segments
    ),
    "experts": Golden(
        SPARSE,
        MeshSettings(data=2, expert=2, model=2),
        PartitionSettings(fsdp="data_expert"),
        layer={
            "all-to-all expert": 2 + 2,
            # Over two axes, one after the other.
            "all-gather expert": 5 + 5,
            "all-gather data": 7 + 7,
            "reduce-scatter expert": 5,
            "reduce-scatter data": 7,
            # Of attention; of rows and of their gradients.
            "all-gather model": 3 + 2,
            "reduce-scatter model": 2 + 2,
        },
        step={
            "all-gather expert": 2,
            "all-gather data": 2,
            "reduce-scatter expert": 1,
            "reduce-scatter data": 1,
            "all-to-all data×expert": 2,
            "all-gather model": 2,
            "reduce-scatter model": 2,
        },
    ),
    "whole_experts": Golden(
        SPARSE,
        MeshSettings(expert=4, model=2),
        PartitionSettings(expert_tensor_parallel=False),
        layer={
            "all-to-all expert": 2 + 2,
            "all-gather model": 3,
            "reduce-scatter model": 2,
        },
        step={"all-gather model": 2, "reduce-scatter model": 2},
    ),
    # Keys, values and who they are make three turns, forward and backward, and who they
    # are once more between; with them the sums of two gradients, which go on, home.
    "ring": Golden(
        DENSE,
        MeshSettings(data=2, context=4),
        PartitionSettings(context_attention="ring"),
        layer={"collective-permute context": 9 + 3 + 9 + 2 * 4},
        step={},
    ),
    # A layer of each: three attentions, of which one asks the encoder, and two of
    # experts. The encoder's output is made whole over `model` once, not in each layer.
    "two_stacks": Golden(
        TWO,
        MeshSettings(context=2, expert=2, model=2),
        PartitionSettings(),
        layer={
            "all-to-all expert": 2 * (2 + 2),
            "all-gather context": 3 * (2 + 2),
            "reduce-scatter context": 3 * 2,
            "all-gather model": 3 * 3 + 2 * 2,
            "reduce-scatter model": 3 * 2 + 2 * 2,
        },
        step={
            "all-gather context": 2,  # segments of each stack
            "all-gather model": 2 + 2,  # out of each stack; gradients of two embeddings
            "reduce-scatter model": 2 + 2,
        },
    ),
    "one_device": Golden(SPARSE, MeshSettings(), PartitionSettings(), {}, {}),
}
DAILY = ("weights_and_widths", "experts")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in DAILY else pytest.mark.slow)
        for name in GOLDENS
    ],
)
def test_a_step_sends_what_we_meant_and_nothing_else(name):
    golden = GOLDENS[name]
    module = compiled(golden.model, golden.mesh, golden.partition)
    found = counted(module, golden.mesh)
    assert found == {"layer": golden.layer, "step": golden.step}


@pytest.mark.parametrize("name", DAILY)
def test_no_stacked_weight_is_ever_whole(name):
    golden = GOLDENS[name]
    cut, whole = (
        local_shapes(golden.model, golden.mesh, partition)
        for partition in (golden.partition, PartitionSettings())
    )
    gathered = {path for path in cut if cut[path] != whole[path]}
    matrices = {
        path for path in cut if path.startswith("decoder/layers") and "norm" not in path
    }
    assert matrices <= gathered
    module = compiled(golden.model, golden.mesh, golden.partition)
    there = {
        array.sizes
        for _, instructions in module.computations.items()
        for instruction in instructions.values()
        for array in arrays(instruction.shape)
    }
    for path in matrices:
        assert cut[path] in there, path
        assert whole[path] not in there, path
        assert whole[path][1:] in there, f"{path} of one layer"


@pytest.mark.parametrize("name", DAILY)
def test_gradients_are_summed_once_over_the_devices_that_share_a_parameter(name):
    golden = GOLDENS[name]
    module = compiled(golden.model, golden.mesh, golden.partition)
    shapes = local_shapes(golden.model, golden.mesh, golden.partition)
    wanted = collections.Counter()
    for path, _, names in params_of(golden.model):
        if shared := shared_over(names, golden):
            wanted[shared, shapes[path]] += 1
    found = collections.Counter(
        (axes_of(instruction, golden.mesh), array.sizes)
        for instruction, _, _ in module.runs()
        if instruction.opcode.removesuffix("-start") == "all-reduce"
        and axes_of(instruction, golden.mesh)
        for array in arrays(instruction.shape)
        if array.sizes in shapes.values()
    )
    assert found == wanted


def params_of(model: ModelSettings) -> list[tuple[str, parameters.Spec, tuple]]:
    specs = inventory.specs(architecture.describe(model, ROUTER))
    return placement.leaves(specs, parameters.axes(specs))


def local_shapes(
    model: ModelSettings, mesh: MeshSettings, partition: PartitionSettings
) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter on one device."""
    placed, table = make_mesh(mesh), rules.table(partition)
    return {
        path: rules.sharding(placed, names, table).shard_shape(array.shape)
        for path, array, names in params_of(model)
    }


def shared_over(names: tuple, golden: Golden) -> str:
    """The mesh axes on which a parameter of these logical axes is the same."""
    table = rules.table(golden.partition)
    used = {axis for name in names if name for axis in table[name]}
    return "×".join(
        axis for axis in AXES if getattr(golden.mesh, axis) > 1 and axis not in used
    )
