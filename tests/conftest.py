"""Eight simulated devices for every test, and one part of the list on request."""

import os
import zlib

from launch.config.platform import CPU_FLAG

# Before jax starts: half the compile time for slower code, also in the processes that
# tests start. The demo's test takes the flags that users get.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    f"{CPU_FLAG}"
)

import jax
import pytest

from moe.testing import MESHES
from partitioning.mesh import make_mesh


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Keeps part i of n of the tests when SWITCHYARD_SHARD is "i/n", 1 ≤ i ≤ n."""
    shard = os.environ.get("SWITCHYARD_SHARD")
    if not shard:
        return
    index, count = (int(part) for part in shard.split("/"))
    if not 1 <= index <= count:
        raise pytest.UsageError(f"SHARD={shard}: use i/n with 1 ≤ i ≤ n")
    kept, dropped = [], []
    for item in items:
        mine = zlib.crc32(item.nodeid.encode()) % count == index - 1
        (kept if mine else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.fixture(scope="session")
def meshes() -> dict[str, jax.sharding.Mesh]:
    """The meshes of `moe.testing.MESHES`; too few devices fail, never skip."""
    assert jax.device_count() == 8, f"tests need 8 devices, not {jax.device_count()}"
    return {name: make_mesh(settings) for name, settings in MESHES.items()}
