"""What launch uses of jax that is public nowhere is there, and does what we rely on."""

import ast
import inspect
import re
import socket
from pathlib import Path

import pytest
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax._src.lib import _jax

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]

# Another one needs a test below.
USED = {
    ("launch/job/end.py", "jax._src.distributed"),
    ("launch/job/together.py", "jax._src.clusters.ClusterEnv"),
}


def imported(path: Path) -> set[str]:
    """Every name that a file imports, in full."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_no_other_private_module_is_used():
    assert {
        (str(path.relative_to(ROOT)), name)
        for folder in ("launch", "moe", "partitioning", "tasks")
        for path in (ROOT / folder).rglob("*.py")
        for name in imported(path)
        if re.match(r"(jax|jaxlib)\..*\b_", name)
    } == USED


def test_launchers_are_asked_in_this_order_and_answer_in_that():
    ask = ClusterEnv.auto_detect_unset_distributed_params
    assert [*inspect.signature(ask).parameters] == [
        *("coordinator_address", "num_processes", "process_id", "local_device_ids"),
        *("cluster_detection_method", "initialization_timeout"),
    ]
    # What is known already comes back as it was given, in the order of the first four.
    assert ask("host:1", 2, 1, [0], None, 5) == ("host:1", 2, 1, [0])


def test_a_process_alone_has_no_client():
    assert distributed.global_state.client is None


@pytest.fixture
def client():
    """The client of a coordinator, as `jax.distributed.initialize` makes it."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    service = _jax.get_distributed_runtime_service(address, 1)
    client = _jax.get_distributed_runtime_client(address, 0, init_timeout=10)
    client.connect()
    yield client
    client.shutdown()
    service.shutdown()


def test_the_coordinator_keeps_words_and_waits_at_barriers(client):
    with pytest.raises(Exception, match="NOT_FOUND"):
        client.key_value_try_get("how it ended")
    client.key_value_set("how it ended", "well")
    with pytest.raises(Exception, match="EXISTS"):
        client.key_value_set("how it ended", "badly")
    assert client.key_value_try_get("how it ended") == "well"
    assert client.blocking_key_value_get("how it ended", 1000) == "well"
    client.key_value_set("heard/1", "1")
    assert client.key_value_dir_get("heard/") == [("heard/1", "1")]
    client.wait_at_barrier("all are here", 1000)
