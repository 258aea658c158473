"""Which process of which job this is, by configuration, environment and launcher."""

import dataclasses
import math

import pytest

from launch.config.settings import PlatformSettings
from launch.errors import EXIT_LOST_PROCESS, ProcessError
from launch.job import together
from launch.job.end import _outcome
from launch.job.together import Job
from tasks.errors import StoreError

pytestmark = pytest.mark.fast

ADDRESS = "10.0.0.1:9876"


def two(**settings) -> PlatformSettings:
    return PlatformSettings(
        **{"num_processes": 2, "coordinator_address": ADDRESS} | settings
    )


def test_a_process_is_alone_unless_told_otherwise():
    assert together.find(PlatformSettings(), {"SLURM_NTASKS": "8"}) is None


@pytest.mark.parametrize(
    ("settings", "environ", "process"),
    [
        ({"process_id": 1}, {}, 1),
        ({}, {"JAX_PROCESS_ID": "1"}, 1),
        ({"process_id": 0}, {"JAX_PROCESS_ID": "1"}, 1),  # what is exported wins
        ({}, {"SLURM_PROCID": "1"}, 1),
        ({"process_id": 0}, {"SLURM_PROCID": "1"}, 0),
        ({}, {"OMPI_COMM_WORLD_RANK": "0"}, 0),
    ],
)
def test_the_number_of_a_process_is_configured_exported_or_its_rank(
    settings, environ, process
):
    assert together.find(two(**settings), environ) == Job(process, 2, ADDRESS)


def test_an_exported_address_wins():
    environ = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1", "JAX_PROCESS_ID": "0"}
    job = together.find(two(), environ)
    assert str(job) == "process 0 of 2, which meet at 10.0.0.2:1"


def test_slurm_is_asked_for_everything(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[03-04,09]",
        "SLURM_NTASKS": "3",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    job = together.find(PlatformSettings(num_processes=0))
    assert job is not None
    assert (job.process, job.number, job.local_devices) == (2, 3, [0])
    assert job.address.startswith("node03:")


@pytest.mark.parametrize(
    ("settings", "environ", "message"),
    [
        ({"num_processes": 0, "coordinator_address": ""}, {}, "no launcher (SLURM,"),
        ({}, {}, r"set PROCESS_ID (or JAX_PROCESS_ID), or NUM_PROCESSES = 1"),
        ({}, {"JAX_PROCESS_ID": "2"}, "this is process 2 of NUM_PROCESSES = 2"),
        ({}, {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID=one is not the number"),
    ],
)
def test_what_is_missing_is_said(settings, environ, message, monkeypatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ProcessError) as caught:
        together.find(two(**settings), environ)
    assert message in str(caught.value)


def test_the_others_hear_what_happened_in_one_line_and_its_exit_code():
    said = _outcome(3, StoreError("shard 7 cannot be read"), lost=False)
    assert said == {
        "process": 3,
        "code": 1,
        "message": "StoreError: shard 7 cannot be read",
    }
    assert _outcome(3, KeyboardInterrupt(), lost=False)["code"] == 130
    assert _outcome(3, RuntimeError("Gloo: x\ny"), lost=True)["code"] == (
        EXIT_LOST_PROCESS
    )
    assert _outcome(3, RuntimeError(""), lost=False)["message"] == "RuntimeError: "


@dataclasses.dataclass
class Coordinator:
    """Keeps what processes say, as jax's does."""

    said: dict[str, str] = dataclasses.field(default_factory=dict)

    def key_value_set(self, key, value):
        assert key not in self.said
        self.said[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        return self.said[key]


def test_what_process_0_finds_on_a_shared_disk_all_go_by(monkeypatch):
    coordinator = Coordinator()
    monkeypatch.setattr(together, "client", lambda: coordinator)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    found = []
    for process, shown in enumerate([{"step": 10, "loss": math.inf}, None]):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        found.append(together.as_first_finds("the record", lambda shown=shown: shown))
    assert found == [{"step": 10, "loss": math.inf}] * 2


def test_a_process_alone_goes_by_what_it_finds():
    assert together.as_first_finds("the newest checkpoint", lambda: 7) == 7
