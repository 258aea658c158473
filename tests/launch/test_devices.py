"""What is said where the platform of a run is not there."""

import jax
import pytest
from commands import TINY, Place, inline

from launch.config import devices, reader
from launch.config.settings import PlatformSettings
from launch.errors import ConfigError
from launch.run import assemble

LIBTPU = (
    "Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so "
    "(set JAX_PLATFORMS='' to automatically choose an available backend)"
)
TPU = ("--gin.PLATFORM=tpu", "--gin.SIMULATED_DEVICES=0")
NO_TPU = (
    "DeviceError: PLATFORM = 'tpu', and jax finds no TPU here that it can use (jax "
    "says: Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so): "
    "take another hardware file, such as hardware/cpu1.gin, or ask `switchyard train "
    "--dry_run` or `switchyard plan`, which need none"
)


@pytest.fixture
def absent(monkeypatch):
    """Lets jax find no device, for the reason that is given."""
    monkeypatch.delenv("JAX_PLATFORMS")

    def give(error):
        def find():
            raise error

        monkeypatch.setattr(jax, "devices", find)

    return give


@pytest.mark.fast
def test_training_on_a_platform_that_is_not_there_is_one_sentence(absent, tmp_path):
    absent(RuntimeError(LIBTPU))
    done = inline("train", TINY, *TPU, f"--gin.MODEL_DIR={tmp_path / 'run'}", "--quiet")
    assert (done.code, done.out, done.err) == (1, "", f"{NO_TPU}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_a_model_of_a_platform_that_is_not_there_is_one_sentence(
    absent, tmp_path, verb
):
    config = reader.read(
        ["runs/tiny.gin"], [word.removeprefix("--gin.") for word in TPU]
    )
    (tmp_path / "config.gin").write_text(config.operative, encoding="utf-8")
    absent(RuntimeError(LIBTPU))
    # Neither store nor checkpoint is there: the devices are looked for first.
    words = [f"--model_dir={tmp_path}", "--gin.PLATFORM=tpu"]  # else a device of here
    done = inline(verb, *words, "--quiet")
    assert (done.code, done.out, done.err) == (1, "", f"{NO_TPU}\n")


@pytest.mark.fast
def test_slices_that_no_axis_joins_are_a_problem_of_the_configuration(monkeypatch):
    def make_mesh(settings, devices):
        raise ValueError("the mesh data 2 lies over 2 slices: set MESH_REPLICA = 2")

    monkeypatch.setattr(assemble, "make_mesh", make_mesh)
    with pytest.raises(ConfigError, match="set MESH_REPLICA = 2"):
        assemble.assemble(reader.read(["runs/tiny.gin"]))


@pytest.mark.fast
def test_gpus_that_jax_does_not_see_are_missing_too(absent):
    absent(AssertionError())  # all that jax says of them
    with pytest.raises(devices.DeviceError) as raised:
        devices.here(PlatformSettings("cuda"))
    assert str(raised.value).startswith(
        "PLATFORM = 'cuda', and jax finds no GPU here that it can use: take another"
    )


@pytest.mark.fast
def test_a_platform_of_the_environment_is_named_as_the_users(absent, monkeypatch):
    absent(RuntimeError(LIBTPU))
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(
        devices.DeviceError, match=r"^your JAX_PLATFORMS = 'tpu'.*unset"
    ):
        devices.here(PlatformSettings("cpu"))


def test_a_pod_that_is_not_there_is_said_before_its_processes_are_sought(tmp_path):
    # NUM_PROCESSES is 0: no launcher says which process this is either.
    done = Place(tmp_path).run(
        *("train", "--gin_file=runs/glam_64b_64e.gin", "--quiet"),
        "--gin_file=hardware/v4_8x8x16.gin",
    )
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("DeviceError: PLATFORM = 'tpu', and jax finds no TPU here")
    assert "hardware/cpu1.gin" in line


@pytest.mark.fast
def test_a_mesh_that_is_too_large_for_the_machine_says_both_numbers():
    done = inline(
        "train",
        TINY,
        "--gin.SIMULATED_DEVICES=0",
        "--gin.MESH_DATA=16",
        "--gin.BATCH_SIZE=16",
        "--quiet",
    )
    assert done.code == 1
    assert done.err.splitlines()[1:] == [
        "  the mesh data 16 needs 16 devices and 8 are here: shrink the MESH_ axes, or "
        "set PLATFORM = 'cpu' and SIMULATED_DEVICES = 16"
    ]
