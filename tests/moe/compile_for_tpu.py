"""Compiles a sparse layer, forward and backward, with the TPU's own compiler.

    python tests/moe/compile_for_tpu.py TOPOLOGY TRANSPORT DTYPE [in_rounds] [4x8]

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
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from moe.model.moe_layer import Layer, MoE, Tokens, moe_layer
from moe.model.parameters import logical_axes
from moe.settings import ModelSettings, RouterSettings
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
    model = ModelSettings(
        vocab_size=2,
        num_layers=1,
        model_dim=M,
        num_heads=1,
        head_dim=2,
        mlp_dim=1,
        activation="swiglu",
        moe_every=1,
        num_experts=E,
        expert_mlp_dim=F,
        transport=transport,
        dtype=dtype,
    )
    bounded = transport in ("all_to_all", "einsum")
    router = RouterSettings(
        num_selected=2,
        renormalize="before_drop",
        group_size=S,
        capacity_factor=1.25 if bounded else 0.0,
    )
    layer = Layer(model, router, mesh, in_rounds="in_rounds" in words)
    shapes = nnx.eval_shape(lambda: MoE(jax.random.key(0), model, router))
    definition = nnx.graphdef(shapes)
    weights = jax.tree.map(
        lambda s, axes: jax.ShapeDtypeStruct(
            s.shape, s.dtype, sharding=rules.sharding(mesh, axes)
        ),
        nnx.to_pure_dict(nnx.state(shapes)),
        logical_axes(shapes),
    )
    x_BLM = jax.ShapeDtypeStruct(
        (B, S, M), dtype, sharding=rules.sharding(mesh, ("batch",))
    )

    def objective(weights, x_BLM):
        tokens = Tokens(
            jnp.ones((B, S), bool), jnp.arange(B), jnp.zeros((B, S), jnp.int32)
        )
        y_BLM, sums = moe_layer(
            nnx.merge(definition, weights), x_BLM, tokens, jax.random.key(0), 0, layer
        )
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
