"""A run that does not fit says what is large and which knobs help, once."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from commands import inline

from launch.config import reader
from launch.run.assemble import assemble
from launch.training import memory
from launch.training.memory import OutOfMemoryError

TINY = ["runs/tiny.gin"]
KNOBS = ["MODEL_DIR=unused", "PLATFORM=auto", "SIMULATED_DEVICES=0"]
TOO_MUCH = "RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes."
# As libtpu says it, shortened.
OF_TPU = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
    "space hbm. Used 25.50G of 15.75G hbm. Exceeded hbm capacity by 9.75G."
)


@pytest.fixture(scope="module")
def run():
    return assemble(reader.read(TINY, KNOBS))


def settings_of(*bindings):
    return reader.read(TINY, [*KNOBS, *bindings]).settings


@pytest.mark.slow
def test_too_large_a_run_is_one_message_that_ends_with_1(trained, tmp_path):
    words = trained.knobs(tmp_path / "run", VOCAB_SIZE=2_000_000_000, SELF_CHECK="off")
    done = inline("train", *words, "--quiet")
    assert done.code == 1, done.err
    assert "Traceback" not in done.err
    said = done.err
    assert (
        "OutOfMemoryError: the memory of a device is too small for this run: " in said
    )
    assert re.search(r"Out of memory allocating \d{12,} bytes", said)
    assert "its largest arrays: params/embedding 238.42 GiB; params/head" in said
    assert list((tmp_path / "run").glob("checkpoints/*")) == []
    assert "what helps: " in said


def test_the_message_names_what_is_large_and_what_helps(run):
    said = memory.explanation(run, OF_TPU)
    assert "the compiler needs 25.50 GiB of 15.75 GiB" in said
    assert re.search(r"each of the 1 devices holds \d+\.\d\d MiB.*: \w+ \d", said)
    assert "MICROBATCHES = 2 (now 1)" in said
    assert 'REMAT = "full" (now "none")' in said
    assert "VOCAB_CHUNKS = 2 (now 1)" in said


def test_what_is_used_already_is_not_advised():
    used = ["MICROBATCHES=8", 'REMAT="full"', 'FSDP="data"', 'MOMENT_DTYPE="bfloat16"']
    words = " ".join(memory.remedies(settings_of(*used), "cpu", of_state=True))
    for macro in ("MICROBATCHES", "REMAT", 'FSDP = "', "MOMENT_DTYPE", "OFFLOAD"):
        assert macro not in words


def test_what_is_largest_decides_what_comes_first():
    settings = settings_of()
    mesh = dataclasses.replace(settings.mesh, data=2)
    settings = dataclasses.replace(settings, mesh=mesh)
    of_state = memory.remedies(settings, "tpu", of_state=True)
    of_steps = memory.remedies(settings, "tpu", of_state=False)
    assert of_state[0] == 'FSDP = "data"'
    assert of_steps[0] == "MICROBATCHES = 2 (now 1)"
    assert sorted(of_state) == sorted(of_steps)


def test_what_an_allocator_says_is_told_from_other_errors(run):
    with pytest.raises(OutOfMemoryError, match="too small"), memory.explained(run):
        jax.block_until_ready(jax.jit(lambda: jnp.zeros((1 << 40,)))())
    for text in ("INTERNAL: a bug", "RESOURCE_EXHAUSTED: No space left on device"):
        error = jax.errors.JaxRuntimeError(text)
        with pytest.raises(jax.errors.JaxRuntimeError) as same, memory.explained(run):
            raise error
        assert same.value is error
