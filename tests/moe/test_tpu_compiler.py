"""What the TPU's own compiler makes of every transport; `make test-all` installs it."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.config.platform import CPU_FLAG
from moe.dispatch import auto

SCRIPT = Path(__file__).parents[1] / "support" / "compile_for_tpu.py"
ATTENTION = SCRIPT.with_name("compile_attention_for_tpu.py")
COMPILER = Path(sys.prefix, "tpu-compiler")
REPOSITORY = SCRIPT.parents[2]

# (all-to-all, ragged-all-to-all, all-gather, reduce-scatter) of forward and backward.
# The router's weights are summed by all-reduces besides. The gathers of "ring" are
# tokens, gates and, on the way back, the tokens' gradients; its exchange is of maps.
EXCHANGES = {
    "all_to_all": (4, 0, 0, 0),
    "einsum": (4, 0, 0, 0),
    "ragged": (0, 4, 0, 0),
    "ring": (1, 0, 3, 1),
}


def compile_in_child(
    topology: str, *words: str, script: Path = SCRIPT
) -> subprocess.CompletedProcess:
    assert (COMPILER / "libtpu").is_dir(), "no TPU compiler: run `make tpu-compiler`"
    return subprocess.run(
        [sys.executable, str(script), topology, *words],
        env=os.environ
        | {"PYTHONPATH": f"{COMPILER}:{REPOSITORY}", "XLA_FLAGS": CPU_FLAG},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


@functools.cache
def compiled(topology: str, *words: str, script: Path = SCRIPT) -> dict:
    done = compile_in_child(topology, *words, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4"])
@pytest.mark.parametrize("transport", EXCHANGES)
def test_the_compiler_takes_every_transport_with_the_exchanges_we_meant(
    topology, transport
):
    found = compiled(topology, transport, "bfloat16")
    operations = found["operations"]
    kinds = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter")
    assert tuple(operations.get(kind, 0) for kind in kinds) == EXCHANGES[transport]
    assert operations.get("collective-permute", 0) == 0
    assert found["sorts_and_scatters_of_activations"] == 0
    # Two products and their gradients, one of them again.
    uses_kernels = transport in ("ragged", "ring")
    assert (found["kernels"].get("tpu_custom_call", 0) >= 6) == uses_kernels


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["ragged", "ring"])
def test_the_compiler_takes_rounds(transport):
    found = compiled("v6e:4x4", transport, "bfloat16", "in_rounds")
    assert found["operations"]["all-reduce"] > 0  # of how many rounds there are


@pytest.mark.slow
def test_larger_slices_of_v5e_have_no_ragged_exchange_as_auto_knows():
    done = compile_in_child("v5e:4x8", "ragged", "bfloat16", "4x8")
    assert done.returncode != 0
    assert "not supported in limited ICI routing" in done.stderr
    assert not auto.has_ragged_exchange("tpu", "TPU v5 lite", per_slice=32)
    assert compiled("v6e:4x8", "ragged", "bfloat16", "4x8")["operations"]
    assert auto.has_ragged_exchange("tpu", "TPU v6 lite", per_slice=32)


@pytest.mark.slow
def test_routing_is_computed_in_full_precision_from_bfloat16_tokens():
    # Logits, and the gradients of the tokens and of the router's weights; experts are
    # bfloat16 and need not be.
    found = compiled("v5e:4x4", "all_to_all", "bfloat16")
    assert found["highest_precision_products"] == 3


@pytest.mark.slow
def test_splash_takes_values_of_another_width_than_keys():
    found = compiled("v5e:4x4", "bfloat16", "auto", "latent", script=ATTENTION)
    assert found["kernels"] == {"fwd": 2, "dq": 2, "dkv": 2}
    assert found["arrays_of_scores"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_splash_attends_each_layer_once_and_holds_no_scores(dtype):
    # A layer with a window and one without, in one loop; "minimal" attends once.
    found, without = (
        compiled("v5e:4x4", dtype, kernel, script=ATTENTION)
        for kernel in ("auto", "off")
    )
    assert found["kernels"] == {"fwd": 2, "dq": 2, "dkv": 2}
    assert found["arrays_of_scores"] == 0
    assert without["kernels"] == {}
    assert without["arrays_of_scores"] > 0
    for kind, number in without["collectives"].items():
        assert found["collectives"].get(kind, 0) <= number
