"""The doctor: what it says, what it calls a problem, and what it never shows."""

import errno
import fcntl
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from rich.console import Console

from launch.config.platform import CPU_FLAG
from launch.config.settings import MeshSettings, PlatformSettings
from launch.doctor import (
    accelerator,
    environment,
    examine,
    folders,
    host,
    network,
    shadows,
    software,
)
from launch.doctor.line import Line, masked

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    **commands.PLANTED,
    "JAX_COORDINATOR_BIND_ADDRESS": "http://user:planted-bound@0.0.0.0:1",
}


def verdicts(lines):
    return {line.name: line.verdict for line in lines}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ----------------------------------------------------------------------- the whole


def test_a_machine_that_can_run_is_fit_and_nothing_secret_is_shown(trained, tmp_path):
    before = sorted(trained.folder.iterdir())
    words = trained.knobs(trained.folder)
    done = trained.run(
        "doctor", *words, f"--json={tmp_path}/found.json", **SECRETS, HOME=str(tmp_path)
    )
    assert done.code == 0, done
    found = json.loads((tmp_path / "found.json").read_text())
    names = {line["name"] for line in found["lines"]}
    assert names >= {
        "python",
        "switchyard",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "tensorstore",
        "numpy",
        "ours",
        "devices",
        "first program",
        "compiler",
        "XLA_FLAGS",
        "memory",
        "cores",
        "open files",
        "MODEL_DIR",
        "MODEL_DIR locks",
        "MODEL_DIR writes",
        "STORE_DIR",
        "seqio, tensorflow",
        "encoding",
    }
    assert found["verdict"] in ("fine", "note")
    assert "not needed, the store is there" in done.out
    assert done.out.splitlines()[-1].startswith("fit")
    everything = done.out + done.err + (tmp_path / "found.json").read_text()
    for secret in (*SECRETS.values(), "planted-password", "planted-bound"):
        assert secret not in everything
    assert "http://…@0.0.0.0:1" in done.out  # it was looked at
    assert sorted(trained.folder.iterdir()) == before


def test_a_run_says_and_keeps_nothing_secret(trained):
    said = (trained.done.out + trained.done.err).encode()
    folders = (trained.folder, trained.store)
    kept = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {"config.gin", "report.json", "report.html", "manifest.json"} <= {
        path.name for path in kept
    }
    for secret in (*commands.PLANTED.values(), "planted-password"):
        assert secret.encode() not in said
        for path in kept:
            assert secret.encode() not in path.read_bytes(), path


def test_a_flag_that_ends_the_compiler_is_a_problem_and_not_the_end(trained, tmp_path):
    words = ["doctor", *trained.knobs(tmp_path), "--quiet"]
    done = trained.run(*words, XLA_FLAGS="--xla_no_such_flag=1")
    assert done.code == 1, done
    assert "problem  devices" in done.out
    assert "--xla_no_such_flag=1" in done.out
    assert "not fit: 1 problem," in done.out
    assert done.err == ""


@pytest.mark.slow
def test_without_a_gin_file_the_machine_alone_is_asked_about(tmp_path):
    place = commands.Place(tmp_path)
    done = place.run("doctor", cwd=tmp_path, JAX_PLATFORMS="cpu")
    assert done.code == 0, done
    assert "this machine, for no run of its own" in done.err
    assert "can be imported: seqio" in done.out
    assert not (tmp_path / "runs").exists()


def test_processes_of_a_job_say_what_is_alike_once(trained, tmp_path):
    words = [
        "doctor",
        *trained.knobs(trained.folder, MESH_DATA=2, NUM_PROCESSES=2),
        f"--gin.COORDINATOR_ADDRESS=127.0.0.1:{free_port()}",
        f"--json={tmp_path}/found.json",
    ]
    started = [trained.start(*words, JAX_PROCESS_ID=str(process)) for process in (0, 1)]
    first, second = [commands.finish(process) for process in started]
    assert first.code == second.code == 0, (first, second)
    assert second.out == ""
    lines = json.loads((tmp_path / "found.json").read_text())["lines"]
    by_name = {}
    for line in lines:
        by_name.setdefault(line["name"], []).append(line["processes"])
    assert by_name["jax"] == [[]]
    assert by_name["JAX_PROCESS_ID"] == [[0], [1]]
    assert by_name["clocks"] == by_name["answers"] == by_name["throughput"] == [[]]
    assert "cpu: 2 × cpu, 1 of them here" in first.out


# --------------------------------------------------------------------------- lines


@pytest.mark.fast
@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_the_terminal_and_lose_nothing(width):
    words = [f"word{number}" for number in range(60)]
    lines = [
        Line("devices", "devices", " ".join(words[:30])),
        Line("devices", "memory", "/" + "x" * 150, "problem", " ".join(words[30:])),
    ]
    out = io.StringIO()
    examine.show(lines, Console(file=out, width=width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert all(word in text.split() for word in words)
    assert text.count("x") == 150
    assert text.splitlines()[-1] == "not fit: 1 problem, 0 notes"


@pytest.mark.fast
def test_passwords_in_addresses_and_the_home_are_masked(monkeypatch):
    monkeypatch.setenv("HOME", "/where/i/live")
    assert masked("s3://me:word@host/x and gs://b/c") == "s3://…@host/x and gs://b/c"
    assert masked("in /where/i/live/runs") == "in ~/runs"
    assert masked("/where/i/lively /mnt/where/i/live") == (
        "/where/i/lively /mnt/where/i/live"
    )
    line = Line("a", "b", "/where/i/live", "note", "see http://a:b@c/")
    assert (line.value, line.remedy) == ("~", "see http://…@c/")


@pytest.mark.fast
def test_only_variables_of_the_list_are_shown():
    shown = environment.variables({**SECRETS, "JAX_DISABLE_JIT": "1", "LANG": "C"})
    assert verdicts(shown) == {
        "JAX_COORDINATOR_BIND_ADDRESS": "fine",
        "JAX_DISABLE_JIT": "note",
        "LANG": "fine",
    }
    for word in ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "PROXY"):
        assert not [name for name in environment.ALLOWED if word in name]


@pytest.mark.fast
def test_flags_with_known_faults_are_noted():
    wrong = f"{CPU_FLAG}LIBRARY_FUSION_TYPE_DOT"
    given = f"{CPU_FLAG} --xla_dump_to=/tmp/x"
    lines = environment.flags({"XLA_FLAGS": given})
    assert [line.verdict for line in lines] == ["fine"] * 3
    (line, *_) = environment.flags({"XLA_FLAGS": wrong})
    assert line.verdict == "note"
    assert "take it out" in line.remedy
    assert not [
        line
        for line in environment.flags({"XLA_FLAGS": wrong, "JAX_PLATFORMS": "tpu"})
        if line.remedy
    ]
    (line, *_) = environment.flags({"XLA_FLAGS": "xla_dump_to=x"})
    assert "not written --name=value" in line.remedy


# ------------------------------------------------------------------------ software


@pytest.mark.fast
def test_packages_that_are_too_old_or_missing_are_problems(monkeypatch):
    needed = {"jax": "99.1", "numpy": "2.0", "no-such-package": "1"}
    monkeypatch.setattr(software, "minimums", lambda: needed)
    found = {line.name: line for line in software.versions()}
    assert "older than 99.1" in found["jax"].value
    assert "'jax>=99.1'" in found["jax"].remedy
    assert found["no-such-package"].verdict == "problem"
    assert found["numpy"].verdict == found["flax"].verdict == "fine"


@pytest.mark.fast
def test_versions_are_compared_by_their_numbers():
    assert software.older("0.9.2", "0.10")
    assert software.older("1.0rc1", "1.1")
    assert not software.older("0.10.0", "0.10")
    assert not software.older("2.0", "2.0.0")
    assert software.minimums()["jax"] == "0.10"
    assert "pytest" not in software.minimums()


@pytest.mark.fast
def test_a_foreign_package_beside_ours_is_noted(tmp_path):
    (tmp_path / "tasks.py").touch()
    (tmp_path / "configs").mkdir()  # hides nothing, without an __init__.py
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "__init__.py").touch()
    assert shadows.beside([str(tmp_path), str(ROOT)]) == {
        "moe": f"{tmp_path}/moe/__init__.py",
        "tasks": f"{tmp_path}/tasks.py",
    }


@pytest.mark.fast
@pytest.mark.parametrize("name", ["tasks.py", "configs/__init__.py"])
def test_a_foreign_package_in_place_of_ours_is_said_by_every_verb(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine = 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "launch", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"is {tmp_path}/{name}: rename or move that away" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.fast
@pytest.mark.parametrize(
    ("needed", "verdict"), [(None, "note"), (True, "problem"), (False, "fine")]
)
def test_what_preparing_lacks_is_a_problem_where_tokens_are_to_be_made(
    needed, verdict, monkeypatch
):
    monkeypatch.setattr(software, "_is_there", lambda name: name != "seqio")
    assert software.preparing(needed, quiet=True).verdict == verdict


@pytest.mark.fast
def test_a_package_that_cannot_be_imported_is_said_with_its_last_word(monkeypatch):
    monkeypatch.setattr(software, "_IMPORT", "raise OSError('libstdc++ is too old')")
    line = software.preparing(True, quiet=True)
    assert line.verdict == "problem"
    assert line.value == "cannot be imported: OSError: libstdc++ is too old"


@pytest.mark.fast
def test_a_terminal_that_is_not_utf8_is_noted(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    (line,) = software.encoding()
    assert line.verdict == "note"
    assert "output ascii" in line.value


# ---------------------------------------------------------------------------- host


@pytest.mark.fast
def test_the_tightest_limit_of_memory_counts(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    gib = 1 << 30
    (proc / "meminfo").write_text(
        f"MemTotal: {64 * gib >> 10} kB\nMemAvailable: {60 * gib >> 10} kB\n"
    )
    assert host.memory(proc, groups).verdict == "fine"
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    (groups / "outer" / "inner").mkdir(parents=True)
    (groups / "outer" / "inner" / "memory.max").write_text("max\n")
    assert host.cgroup_memory(proc, groups) == (None, 0)
    (groups / "outer" / "memory.max").write_text(f"{8 * gib}\n")
    (groups / "outer" / "memory.current").write_text(f"{5 * gib}\n")
    assert host.cgroup_memory(proc, groups) == (8 * gib, 5 * gib)
    line = host.memory(proc, groups)
    assert line.verdict == "note"  # 3 GiB are left
    assert "limited to 8.59 GB" in line.value
    (groups / "outer" / "memory.current").write_text(f"{8 * gib}\n")
    assert host.memory(proc, groups).verdict == "problem"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("soft", "verdict"), [(100, "problem"), (1000, "note"), (1024, "fine")]
)
def test_few_open_files_are_said(soft, verdict, monkeypatch):
    monkeypatch.setattr(host.resource, "getrlimit", lambda kind: (soft, 4096))
    line = host.open_files()
    assert line.verdict == verdict
    assert verdict == "fine" or "`ulimit -n 1024`" in line.remedy


# ------------------------------------------------------------------------- folders


@pytest.mark.fast
def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    assert folders.nearest_folder(f"{tmp_path}/a/b/c") == tmp_path
    found = folders._written("MODEL_DIR", f"{tmp_path}/a/b/c", quiet=True)
    assert [line.name for line in found] == [
        "MODEL_DIR",
        "MODEL_DIR locks",
        "MODEL_DIR writes",
    ]
    assert f"to be made in {tmp_path}" in found[0].value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
def test_a_file_in_the_place_of_a_folder_is_a_problem(tmp_path):
    (tmp_path / "file").touch()
    (line,) = folders._written("MODEL_DIR", f"{tmp_path}/file/run", quiet=True)
    assert line.verdict == "problem"
    assert "is a file" in line.remedy


@pytest.mark.fast
def test_a_disk_that_takes_no_more_is_a_problem_and_nothing_stays(
    tmp_path, monkeypatch
):
    def full(file, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders.os, "write", full)
    *_, line = folders._written("MODEL_DIR", str(tmp_path), quiet=True)
    assert line.verdict == "problem"
    assert "No space left on device" in line.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
def test_locks_that_keep_nobody_out_are_a_problem(tmp_path, monkeypatch):
    with folders._scratch(tmp_path) as (first, second):
        assert folders._lock("MODEL_DIR", first, second).verdict == "fine"
        monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
        line = folders._lock("MODEL_DIR", first, second)
    assert (line.value, line.verdict) == ("are given twice", "problem")

    def none(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with folders._scratch(tmp_path) as (first, second):
        line = folders._lock("MODEL_DIR", first, second)
    assert "No locks available" in line.value
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------- devices, processes


@pytest.mark.fast
@pytest.mark.parametrize(
    ("number", "verdict"), [(1, "problem"), (2, "fine"), (4, "note")]
)
def test_devices_are_compared_with_the_mesh(number, verdict):
    found = accelerator.Devices("cpu", {"cpu": number}, number, None, 1, 0.1, 0, "")
    platform, mesh = PlatformSettings(name="cpu"), MeshSettings(data=2)
    lines = list(accelerator.lines(found, platform, mesh))
    assert lines[0].verdict == verdict
    assert verdict != "problem" or "SIMULATED_DEVICES = 2" in lines[0].remedy


@pytest.mark.fast
def test_a_compiler_that_is_wrong_is_a_problem_with_the_way_out():
    said = "XLA's CPU compiler is wrong:\n  a sum  off by 1\nTake that flag out."
    found = accelerator.Devices("cpu", {"cpu": 1}, 1, None, 1, 0.1, 0, said)
    *_, line = accelerator.lines(found, PlatformSettings(), MeshSettings())
    assert (line.verdict, line.remedy) == ("problem", "Take that flag out.")


def test_a_platform_that_is_not_here_is_one_sentence(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    found = accelerator.ask_child(PlatformSettings(name="cuda"), quiet=True)
    assert isinstance(found, str)
    assert "PLATFORM = 'cuda', and jax finds no GPU here" in found


@pytest.mark.fast
def test_an_answer_that_never_comes_is_given_up(monkeypatch):
    monkeypatch.setattr(accelerator, "TIME_LIMIT_SECONDS", 0.01)
    found = accelerator.ask_child(PlatformSettings(), quiet=True)
    assert found == "no answer within 0 s"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("skew", "verdict"),
    [(0.5, "fine"), (-5.0, "note"), (1.001, "fine"), (300.0, "problem")],
)
def test_clocks_that_differ_by_more_than_can_be_doubted_are_said(skew, verdict):
    heard = {1: network.Heard(0.0, 0.001), 2: network.Heard(skew, 0.01)}
    clocks, answers = network.described(heard)
    assert clocks.verdict == verdict
    assert clocks.value.startswith(f"process 2 by {skew:+.3f} s")
    assert answers.verdict == "fine"
