"""Compiles a small product for a described TPU, under the flags in its environment.

    python tests/support/flags_worker.py TOPOLOGY

In a process of its own, because a flag that the compiler does not know ends it.
"""

import os
import sys

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else one process at a time
}

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def main(topology: str) -> None:
    """Compiles a product of matrices that are cut over all chips."""
    options = {}
    if topology.startswith("v4"):
        options = {
            "chip_config_name": "megacore",
            "chips_per_host_bounds": (2, 2, 1),
            "num_slices": 1,
        }
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **options
    )
    mesh = Mesh(np.array(described.devices).reshape(2, -1), ("a", "b"))
    placed = NamedSharding(mesh, PartitionSpec("a", "b"))
    x = jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=placed)
    jax.jit(lambda x: x @ x, out_shardings=placed).lower(x).compile()


if __name__ == "__main__":
    main(*sys.argv[1:])
