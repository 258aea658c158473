"""What no file of the repository does, and who listens where: docs/security.md."""

import ast
import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import audit
import pytest

from launch.errors import ProcessError
from launch.job import meet
from tasks import files

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ("configs", "launch", "moe", "partitioning", "tasks", "benchmarks")
# Modules whose reading runs what was read.
RUNS_WHAT_IT_READS = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve",
    "marshal", "torch", "yaml", "jsonpickle", "pandas",
}  # fmt: skip
# These compute beside torch; what they save, they never load by it.
MAY_IMPORT = {
    ("benchmarks/mixtral.py", "torch"),
    ("benchmarks/public_models/theirs.py", "torch"),
    ("launch/exchange/theirs.py", "torch"),  # whose models it reads as safetensors
}
# Names by which a server is opened, and the one place that does so.
SERVERS = {
    "create_server", "bind", "listen", "start_server", "create_unix_server",
    "HTTPServer", "ThreadingHTTPServer", "TCPServer", "UDPServer", "ThreadingTCPServer",
    "start_unix_server", "serve_forever", "SimpleXMLRPCServer", "Listener",
    "ServerProxy", "start_trace_server",
}  # fmt: skip
LISTENS = {("launch/job/meet.py", "create_server")}


def trees(folders: tuple[str, ...] = PROGRAM) -> Iterator[tuple[str, ast.AST]]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text())


def unsafe(tree: ast.AST) -> list[str]:
    """What a file does that could run what it reads, or what a user wrote."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                modules = [alias.name.partition(".")[0] for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                modules = [module.partition(".")[0]]
            case _:
                modules = []
        found += [f"import {name}" for name in modules if name in RUNS_WHAT_IT_READS]
        if isinstance(node, ast.Call):
            found += _unsafe_call(node)
    return found


def _unsafe_call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}

    def says(argument: str, value: object) -> bool:
        said = given.get(argument)
        return isinstance(said, ast.Constant) and said.value is value

    found = []
    if name in ("eval", "exec", "compile", "builtins.eval", "builtins.exec"):
        found.append(name)
    if name in ("os.system", "os.popen", "tempfile.mktemp"):
        found.append(name)
    if "shell" in given and not says("shell", False):
        found.append(f"{name}(shell=...)")
    if name in ("np.load", "numpy.load", "jnp.load"):
        if not says("allow_pickle", False):
            found.append(f"{name} without allow_pickle=False")
    elif "allow_pickle" in given and not says("allow_pickle", False):
        found.append(f"{name}(allow_pickle=...)")
    return found


def test_nothing_is_read_by_what_would_run_it():
    assert not [
        f"{where}: {what}"
        for where, tree in trees()
        for what in unsafe(tree)
        if (where, what.removeprefix("import ")) not in MAY_IMPORT
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch.nn as nn",
        "def late():\n    import yaml",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "np.save(path, x, allow_pickle=allowed)",
        "eval(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_check_of_what_is_read_sees_every_form(source):
    assert unsafe(ast.parse(source))
    assert not unsafe(ast.parse("np.load(path, allow_pickle=False)\nast.unparse(x)"))


# --------------------------------------------------------------------- who listens


def servers(tree: ast.AST) -> set[str]:
    """The names by which a file opens a server."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    names = {ast.unparse(call.func).rpartition(".")[2] for call in calls}
    return names & SERVERS


def test_one_file_listens():
    # inspect.Signature.bind opens nothing; a free port of loopback is let go at once.
    found = {(where, name) for where, tree in trees() for name in servers(tree)}
    no_server = {"launch/run/own_code.py", "benchmarks/reliability/others.py"}
    assert found - {(where, "bind") for where in no_server} == LISTENS
    assert servers(ast.parse("socket.socket().bind(('', 1))")) == {"bind"}


def test_nothing_names_all_interfaces():
    everywhere = re.compile(r"""["'](0\.0\.0\.0|::|\[::\])(:\d+)?["']""")
    assert not [
        f"{where}: {hit[0]}"
        for where, _ in trees()
        for hit in everywhere.finditer((ROOT / where).read_text())
    ]


def test_process_0_listens_where_it_is_told_and_nowhere_else():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    address = f"127.0.0.1:{port}"
    assert meet.own_address(address) == address

    def preside() -> None:
        with pytest.raises(ProcessError, match="1 of NUM_PROCESSES = 2"):
            meet.call(address, 0, 2, {}, bind_address=address, timeout_seconds=1)

    presiding = threading.Thread(target=preside)
    presiding.start()
    here = _listening(port)
    while not here and presiding.is_alive():
        here = _listening(port)
    presiding.join()
    assert here == {"0100007F"}  # 127.0.0.1, as /proc/net/tcp writes it


def _listening(port: int) -> set[str]:
    """The addresses on which somebody listens at a port, as the system writes them."""
    found = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if int(number, 16) == port and state == "0A":
                found.add(address)
    return found


# ---------------------------------------------------------------------------- keys


def test_an_error_of_a_bucket_does_not_say_the_password():
    error = ValueError("GET https://user:planted@host.invalid/x: refused")
    assert files.reason(error) == "GET https://…@host.invalid/x: refused"


# --------------------------------------------------------------------------- locks


@pytest.mark.parametrize("lock", audit.locks(), ids=lambda lock: lock.name)
def test_every_lock_pins_by_hash_and_names_no_index(lock):
    assert audit.faults(lock.read_text()) == []


def test_every_lock_is_found():
    listing = subprocess.run(
        ["git", "ls-files", "*.lock"], cwd=ROOT, capture_output=True, text=True
    )
    named = {ROOT / name for name in listing.stdout.split()}
    assert named == set(audit.locks())
    assert len(named) == 2


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("numpy==2.0", "is no exact version"),
        (f"numpy>=2.0 --hash=sha256:{'0' * 64}", "is no exact version"),
        (f"numpy==2.0 --hash=md5:{'0' * 32}", "is no exact version"),
        (f"x @ file:///x --hash=sha256:{'0' * 64}", "names an address: '://'"),
        ("--find-links=wheels", "names an address: 'find-links'"),
        ("# nothing", "pins nothing"),
    ],
)
def test_a_lock_that_does_not_pin_is_found(line, fault):
    good = f"jax==0.10.2 ; python_version > '3' \\\n    --hash=sha256:{'a' * 64}\n"
    assert audit.faults(good) == []
    text = line if line.startswith("#") else good + line
    assert any(found.startswith(fault) for found in audit.faults(text))


def test_what_pip_audit_finds_is_told_from_no_answer():
    package = {"name": "x", "version": "1", "vulns": [{"id": "CVE-1"}]}
    found = json.dumps({"dependencies": [package, {"name": "y", "version": "2"}]})
    assert audit.known_vulnerabilities(found) == ["x 1: CVE-1"]
    assert audit.known_vulnerabilities('{"dependencies": []}') == []
    assert audit.known_vulnerabilities("no route to host") is None
