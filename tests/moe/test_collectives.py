"""The exchanges that XLA compiles for each transport: the ones we meant, and no others.

On CPU, where the ragged exchange is a padded all-to-all of the same offsets.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from moe.model import parameters, sparse
from moe.model.execution import Execution
from moe.model.remat import rematerialised
from moe.model.view import Routed
from moe.settings import (
    DenseSettings,
    ExecutionSettings,
    RouterSettings,
    SparseSettings,
)
from moe.testing import MESHES
from moe.testing.whole_arrays import layer
from partitioning.mesh import make_mesh

B, L, M, E, F = 16, 8, 24, 8, 20
ROUTER = RouterSettings(num_selected=2, group_size=L, min_capacity=1)
SPARSE = SparseSettings(E, DenseSettings(F, "relu"), ROUTER)
KINDS = ("all-to-all", "all-gather", "reduce-scatter", "collective-permute")

# Counts of KINDS, forward alone and in forward and backward together.
MEANT = {
    "all_to_all": ((2, 0, 0, 0), (4, 0, 0, 0)),
    "einsum": ((2, 0, 0, 0), (4, 0, 0, 0)),
    # Gathered: the counts per expert.
    "ragged": ((2, 1, 0, 0), (4, 1, 0, 0)),
    # Gathered: tokens, gates and slots; exchanged: the other map. The gradients of
    # tokens and gates are scattered, that of the output is gathered.
    "ring": ((1, 3, 1, 0), (1, 4, 3, 0)),
}


ROUTED = Routed(
    mask_BL=jnp.ones((B, L), bool),
    id_BL=jnp.zeros((B, L), jnp.int32),
    row_B=jnp.arange(B),
)


def execution_of(transport: str, mesh: jax.sharding.Mesh) -> Execution:
    return Execution(ExecutionSettings(transport=transport, dtype="float32"), mesh)


@functools.cache
def hlo(transport: str, *, backward: bool, remat: str = "minimal") -> str:
    """Scanned layers compiled under a remat policy, for data 2 × expert 4.

    One layer's exchanges stand once in the text; without the scan XLA would merge a
    forward pass with its repetition.
    """
    mesh = make_mesh(MESHES["d2e4"])
    execution = execution_of(transport, mesh)
    specs = parameters.stack(sparse.specs(SPARSE, M), 2)
    arrays = parameters.draw(specs, jax.random.key(0), "float32")

    def body(x_BLM, arrays):
        key = jax.random.key(0)
        y_BLM, sums = layer(arrays, x_BLM, ROUTED, key, 0, SPARSE, execution)
        return x_BLM + y_BLM, jnp.sum(sums.z_G)

    def objective(arrays, x_BLM):
        y_BLM, z_P = jax.lax.scan(rematerialised(body, remat), x_BLM, arrays)
        return jnp.sum(y_BLM**2) + jnp.sum(z_P)

    function = jax.grad(objective, argnums=(0, 1)) if backward else objective
    with jax.set_mesh(mesh):
        x_BLM = jnp.ones((B, L, M))
        return jax.jit(function).lower(arrays, x_BLM).compile().as_text()


def count(text: str) -> tuple[int, ...]:
    return tuple(len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in KINDS)


def operands(text: str, kind: str) -> list[str]:
    """The result types of all operations of a kind."""
    return re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)


@pytest.mark.parametrize("transport", MEANT)
def test_exchanges_are_the_ones_we_meant_and_none_repeats(transport):
    forward, both = MEANT[transport]
    assert count(hlo(transport, backward=False)) == forward
    assert count(hlo(transport, backward=True)) == both


@pytest.mark.slow
@pytest.mark.parametrize("transport", MEANT)
def test_full_remat_repeats_them(transport):
    assert sum(count(hlo(transport, backward=True, remat="full"))) > sum(
        MEANT[transport][1]
    )


@pytest.mark.parametrize("transport", MEANT)
def test_activations_are_gathered_by_ring_alone_and_never_sorted_or_scattered(
    transport,
):
    text = hlo(transport, backward=True)
    gathers_tokens = any(f"{M}]" in shape for shape in operands(text, "all-gather"))
    assert gathers_tokens == (transport == "ring")
    for kind in ("sort", "scatter"):
        for shape in operands(text, kind):
            assert f",{M}]" not in shape, f"{kind} of activations: {shape}"


def test_no_exchange_is_compiled_for_an_expert_axis_of_one():
    mesh = make_mesh(MESHES["d8"])
    execution = execution_of("ragged", mesh)
    arrays = parameters.draw(sparse.specs(SPARSE, M), jax.random.key(0), "float32")

    def forward(arrays, x_BLM):
        return layer(arrays, x_BLM, ROUTED, None, 0, SPARSE, execution)[0]

    with jax.set_mesh(mesh):
        text = jax.jit(forward).lower(arrays, jnp.ones((B, L, M))).compile().as_text()
    assert count(text) == (0, 0, 0, 0)
