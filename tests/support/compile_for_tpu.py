"""Compiles a sparse layer, forward and backward, with the TPU's own compiler.

    python tests/support/compile_for_tpu.py TOPOLOGY TRANSPORT DTYPE [in_rounds] [4x8]

The last word is data × expert, 4x4 by default.

In a process of its own, because that compiler can end it. Needs `libtpu`, no TPU.
Prints one line of JSON: operations by name, kernels, precisions.
"""

import collections
import json
import os
import re
import sys

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else one process at a time
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from moe.model import sparse
from moe.model.execution import Execution
from moe.model.view import Routed
from moe.settings import (
    DenseSettings,
    ExecutionSettings,
    RouterSettings,
    SparseSettings,
)
from moe.testing.whole_arrays import layer
from partitioning import rules
from partitioning.settings import AXES

S, M, E, F = 256, 256, 16, 512
OPERATIONS = (
    "all-to-all|ragged-all-to-all|all-gather|all-reduce|reduce-scatter|"
    "collective-permute|sort|scatter"
)


def main(topology: str, transport: str, dtype: str, *words: str) -> None:
    """Compiles for a mesh of data × expert and says what came out."""
    sizes = next((word for word in words if "x" in word), "4x4")
    data, expert = map(int, sizes.split("x"))
    B = max(32, data * expert)
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    made = topologies.make_mesh(described, (1, 1, data, 1, expert, 1), AXES)
    mesh = Mesh(made.devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    bounded = transport in ("all_to_all", "einsum")
    router = RouterSettings(
        num_selected=2,
        renormalize="before_drop",
        group_size=S,
        capacity_factor=1.25 if bounded else 0.0,
    )
    s = SparseSettings(E, DenseSettings(F, "swiglu"), router)
    execution = Execution(
        ExecutionSettings(transport=transport, dtype=dtype),
        mesh,
        in_rounds="in_rounds" in words,
    )
    weights = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(
            spec.shape, "float32", sharding=rules.sharding(mesh, spec.axes)
        ),
        sparse.specs(s, M),
    )
    x_BLM = jax.ShapeDtypeStruct(
        (B, S, M), dtype, sharding=rules.sharding(mesh, ("batch",))
    )

    def objective(weights, x_BLM):
        routed = Routed(
            jnp.ones((B, S), bool), jnp.zeros((B, S), jnp.int32), jnp.arange(B)
        )
        key = jax.random.key(0)
        y_BLM, sums = layer(weights, x_BLM, routed, key, 0, s, execution)
        return jnp.sum(y_BLM.astype(jnp.float32)) + jnp.sum(sums.z_G)

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(objective, argnums=(0, 1))).lower(weights, x_BLM)
        text = lowered.compile().as_text()
    operations = re.findall(rf" ({OPERATIONS})(?:-start)?\(", text)
    kernels = re.findall(r'custom_call_target="([^"]+)"', text)
    # Scores and indices are sorted, and counts scattered; activations, the only
    # bfloat16 here, are neither.
    moved = re.findall(r"= \(?[^=]*bf16[^=]* (?:sort|scatter)\(", text)
    print(
        json.dumps(
            {
                "operations": collections.Counter(operations),
                "kernels": collections.Counter(kernels),
                "sorts_and_scatters_of_activations": len(moved),
                "highest_precision_products": len(
                    re.findall(r"operand_precision=\{highest,highest\}", text)
                ),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
