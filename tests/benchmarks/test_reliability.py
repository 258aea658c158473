"""The faults of docs/reliability.md, a few of each kind."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.reliability import others, page, soak, stores

ROOT = Path(__file__).resolve().parents[2]


def test_no_spoilt_file_of_a_store_is_learnt_from(tmp_path):
    found = stores.spoilt(tmp_path, times=1, seed=3)
    outcomes = {outcome for _, outcome in found}
    assert outcomes == {"refused", "not needed, or made again"}, found
    assert {way for way, _ in found} == set(stores.WAYS)
    of_others = found["replaced by another store's", "refused"]
    assert of_others > 20, "whole files, of the same names and sizes"


@pytest.mark.fast
def test_the_page_counts_what_was_injected():
    tally = soak.Tally(
        runs=2, lost=1, wrong=["records (kept in x)"], seconds=10, goodput=[0.2]
    )
    tally.faults["kill -9", "saving"] = 3
    tally.faults["SIGTERM", "training"] = 2
    spoilt = Counter({("emptied", "refused"): 7, ("deleted", "WRONG"): 1})
    killed = others.Killed("kill -9 of a pair", "the same", 5, 2, 1, ["arrays"])
    text = page.text(tally, [killed], Counter({("deleted", "fell back"): 3}), spoilt)
    assert "5 faults in 2 runs of 40 steps, in 10.0 s: one every 2.0 s" in text
    assert "**1 of 2 ended as it did; lost: 1.**" in text
    assert "| kill -9 | 3 | 3 |  |" in text
    assert "| all | 5 | 3 | 2 |" in text
    assert "| kill -9 of a pair | 5 | the same | 2 | 1 |" in text
    assert "| emptied | 7 |  | 7 |" in text
    assert "| deleted | 3 | 3 |" in text


@pytest.mark.fast
def test_the_page_names_tests_that_there_are():
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {test for _, _, test in page.TESTED} <= there


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_that_are_disturbed_end_as_one_that_is_not(trained):
    # In a process of its own: lives are forks, and this one has threads.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.reliability", "--minutes=0"),
            *("--faults=12", "--seed=5", "--print", f"--store={trained.store}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    assert "0 runs were not as the undisturbed one" in done.stdout
    assert "lost: 0.**" in done.stdout
    others_lost = re.findall(
        r"^\| kill -9 (?:of|while).*\| (\d+) \|$", done.stdout, re.M
    )
    assert others_lost == ["0", "0", "0"]


@pytest.mark.fast
def test_the_page_that_is_kept_has_all_that_is_counted():
    kept = page.PAGE.read_text(encoding="utf-8").splitlines()
    made = page.text(soak.Tally(), [], Counter(), Counter()).splitlines()
    assert [line for line in kept if line.startswith("## ")] == [
        line for line in made if line.startswith("## ")
    ]
