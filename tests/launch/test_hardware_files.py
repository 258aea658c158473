"""Every hardware file sets the mesh that it says, and flags its compiler knows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.config import reader
from launch.config.platform import CPU_FLAG
from launch.config.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPILER = Path(sys.prefix, "tpu-compiler")
FILES = sorted((ROOT / "configs" / "hardware").glob("*.gin"))
SMALLEST = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}
FITS = ["NUM_EXPERTS=64", "BATCH_SIZE=4096"]

WORKER = Path(__file__).parents[1] / "support" / "flags_worker.py"


def settings_of(path: Path) -> Settings:
    return reader.read(["runs/tiny.gin", str(path)], FITS).settings


def named(*prefixes: str) -> list:
    found = [path for path in FILES if path.name.startswith(prefixes)]
    assert found
    return [pytest.param(path, id=path.stem) for path in found]


def compile_under(flags: str, topology: str) -> subprocess.CompletedProcess:
    # The TPU's compiler reads XLA_FLAGS too, as it does while planning.
    assert (COMPILER / "libtpu").is_dir(), "no TPU compiler: run `make tpu-compiler`"
    return subprocess.run(
        [sys.executable, str(WORKER), topology],
        env=os.environ
        | {"PYTHONPATH": f"{COMPILER}:{ROOT}"}
        | {"XLA_FLAGS": CPU_FLAG, "LIBTPU_INIT_ARGS": flags},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


@pytest.mark.fast
@pytest.mark.parametrize("path", named("v", "7x", "a100", "h100"))
def test_the_mesh_has_as_many_devices_as_the_file_says(path):
    head = path.read_text(encoding="utf-8").partition("\n\n")[0]
    for word in ("# Mesh: ", "# For: "):
        assert word in head
    mesh = settings_of(path).mesh
    said = re.search(r"# Mesh: (.*)\.\n", head)
    assert said is not None
    sizes = [int(n) for n in re.findall(r"(?:data|expert|replica) (\d+)", said[1])]
    product = 1
    for size in sizes:
        product *= size
    assert mesh.num_devices == product


@pytest.mark.slow
@pytest.mark.parametrize("path", named("v4", "v5", "v6", "7x"))
def test_the_tpu_compiler_knows_every_flag(path):
    flags = " ".join(settings_of(path).platform.libtpu_init_args)
    assert flags
    done = compile_under(flags, SMALLEST[path.stem.partition("_")[0]])
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_tpu_compiler_refuses_a_flag_that_it_does_not_know():
    assert compile_under("--xla_tpu_no_such_flag=true", "v5e:2x2").returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("path", named("a100", "h100", "v100"))
def test_xla_knows_every_flag_of_a_gpu(path):
    # Any backend reads all of XLA_FLAGS, and ends the process at one it does not know.
    def start(flags: str) -> int:
        return subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            capture_output=True,
            timeout=100,
        ).returncode

    assert start(" ".join(settings_of(path).platform.xla_flags)) == 0
    assert start("--xla_gpu_no_such_flag=true") != 0
