"""Compiles the gradient of a dense model with the TPU's own compiler.

    python tests/support/compile_attention_for_tpu.py TOPOLOGY DTYPE ATTENTION_KERNEL \
        [latent]

In a process of its own, because that compiler can end it. Needs `libtpu`, no TPU.
Prints one line of JSON: kernels by name, collectives, arrays of all scores.
"""

import collections
import dataclasses
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

from moe.model import parameters
from moe.model.build import build
from moe.settings import ExecutionSettings, ModelSettings, RouterSettings
from moe.testing.whole_arrays import forward
from partitioning import rules
from partitioning.settings import AXES

B, L = 8, 1024
MODEL = ModelSettings(
    vocab_size=256,
    num_layers=4,
    model_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=512,
    moe_every=0,
    attention_windows=(300, 0),
)
# Of latent attention keys are wider than values: 192 and 128, as DeepSeek-V3's.
LATENT = dataclasses.replace(
    MODEL,
    num_kv_heads=0,
    head_dim=128,
    attention="latent",
    kv_latent_dim=512,
    rope_head_dim=64,
)


def main(topology: str, dtype: str, kernel: str, kind: str = "heads") -> None:
    """Compiles for data 4 × model 4 and says what came out."""
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    made = topologies.make_mesh(described, (1, 1, 4, 1, 1, 4), AXES)
    mesh = Mesh(made.devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    execution = ExecutionSettings(
        dtype=dtype, attention_block=0, attention_kernel=kernel
    )
    settings = LATENT if kind == "latent" else MODEL
    model = build(settings, RouterSettings(), execution, mesh)
    shapes = parameters.shapes(model.specs, "float32")
    params = jax.tree.map(
        lambda shape, spec: jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=rules.sharding(mesh, spec.axes)
        ),
        shapes,
        model.specs,
    )
    tokens = jax.ShapeDtypeStruct(
        (B, L), jnp.int32, sharding=rules.sharding(mesh, ("batch", "length"))
    )
    names = ("input_tokens", "segment_ids", "positions")

    def loss(params, batch):
        logits_BLV, _ = forward(model, params, batch, jnp.arange(B))
        return jnp.sum(logits_BLV**2)

    with jax.set_mesh(mesh):
        batch = {f"decoder_{name}": tokens for name in names}
        text = jax.jit(jax.grad(loss)).lower(params, batch).compile().as_text()
    kernels = re.findall(r"%splash_mha_(\w+?)_segmented\S* = ", text)
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    collectives = re.findall(rf" ({kinds})(?:-start)?\(", text)
    print(
        json.dumps(
            {
                "kernels": collections.Counter(kernels),
                "collectives": collections.Counter(collectives),
                "arrays_of_scores": len(re.findall(rf"\[[\d,]*{L},{L}\]", text)),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
