"""Jobs of two processes, preparations and evaluations, killed until they are done."""

import dataclasses
import hashlib
import random
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.reliability import compare, lives
from benchmarks.reliability.soak import LAST_STEP
from launch.errors import EXIT_LOST_PROCESS

Say = Callable[[str], None]


@dataclasses.dataclass
class Killed:
    """What was killed, and what came of it.

    Attributes:
        what: what the table calls it.
        outcome: what has to come of it.
        kills: number of processes that were killed.
        finished: number of those that were done in the end.
        lost: number of those that were not, or ended otherwise.
        wrong: what told these from the undisturbed one.
    """

    what: str
    outcome: str
    kills: int = 0
    finished: int = 0
    lost: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)

    def ended(self, wrong: Sequence[str]) -> None:
        """Counts one, and what is wrong with it."""
        self.finished += 1
        self.lost += bool(wrong)
        self.wrong += wrong


def pairs(
    shared: Path, store: Path, kills: int, rng: random.Random, say: Say
) -> Killed:
    """Kills one of two processes, or both, again and again.

    Args:
        shared: folder for the runs.
        store: prepared tokens.
        kills: number of kills at least.
        rng: source of the instants, and of who is killed.
        say: shows a line.
    """
    killed = Killed(
        "kill -9 of one of two processes, or of both",
        "the other names it and ends with 134; started again, the same bits",
    )
    base = lives.fresh(shared / "pair")
    for _ in range(2):  # the second finds every program compiled
        lives.fresh(base)
        began = time.monotonic()
        codes = [life.end() for life in _pair(base, store)]
        if any(codes):
            raise RuntimeError(f"the undisturbed pair ended with {codes}")
    length = time.monotonic() - began
    folder = shared / "disturbed_pair"
    while killed.kills < kills:
        lives.fresh(folder)
        wrong = _disturb_pair(killed, folder, store, length, rng)
        killed.ended(wrong or compare.differences(folder, base, LAST_STEP))
        say(f"pair {killed.finished}: {killed.kills} killed, {killed.wrong}")
    return killed


def _disturb_pair(
    killed: Killed, folder: Path, store: Path, length: float, rng: random.Random
) -> list[str]:
    """Starts a pair again after each kill, until it is done; returns what is wrong."""
    for _ in range(100):
        both, victims = _pair(folder, store), []
        if _wait(both, rng.uniform(0, 1.5 * length)):
            victims = rng.sample(both, rng.choice([1, 1, 2]))
            for life in victims:
                life.signal(signal.SIGKILL)
            killed.kills += len(victims)
        try:
            codes = [life.end(120) for life in both]
        except TimeoutError as error:
            for life in both:
                life.signal(signal.SIGKILL)
            return [str(error)]
        if not any(codes):
            return []
        right = {-signal.SIGKILL, EXIT_LOST_PROCESS, 0}
        if not victims or not set(codes) <= right:
            return [f"exit codes {codes}"]
    return ["not done after 100 lives"]


def preparations(shared: Path, kills: int, rng: random.Random, say: Say) -> Killed:
    """Kills preparations; the store must come out the same, file by file."""
    killed = Killed("kill -9 while preparing tokens", "the same store, file by file")
    base, store = shared / "prepared" / "base", shared / "prepared" / "store"
    lives.fresh(base.parent)
    began = time.monotonic()
    lives.prepare(base)
    length, wanted = time.monotonic() - began, _digests(base)
    while killed.kills < kills:
        lives.fresh(store).rmdir()
        words, output = lives.preparing(store), store.with_suffix(".log")
        wrong = _until_done(killed, words, output, length, rng)
        made = {
            n: d for n, d in wanted.items() if "/pack-" not in n or (store / n).exists()
        }
        killed.ended(wrong or _other_files(store, made))
        say(f"store {killed.finished}: {killed.kills} kills, {killed.wrong}")
    return killed


def evaluations(
    shared: Path, run: Path, kills: int, rng: random.Random, say: Say
) -> Killed:
    """Kills evaluations of a finished run, which must stay as it was."""
    killed = Killed(
        "kill -9 while evaluating", "the same scores; the run stays as it was"
    )
    words = ["evaluate", f"--model_dir={run}", "--quiet"]
    output = shared / "evaluated.log"
    began = time.monotonic()
    if code := lives.Life(words, output).end():
        raise RuntimeError(f"evaluate ended with {code}: see {output}")
    length = time.monotonic() - began
    scores, before = output.read_text(), _digests(run)
    while killed.kills < kills:
        wrong = _until_done(killed, words, output, length, rng)
        if not wrong and output.read_text() != scores:
            wrong = ["scores"]
        killed.ended([*wrong, *_other_files(run, before)])
        say(
            f"scored {killed.finished}: {killed.kills} kills, {killed.wrong or 'right'}"
        )
    return killed


def _until_done(
    killed: Killed, words: list[str], output: Path, length: float, rng: random.Random
) -> list[str]:
    """Starts a command again after each kill; returns what is wrong in the end."""
    for _ in range(100):
        output.unlink(missing_ok=True)
        life = lives.Life(words, output)
        if _wait([life], rng.uniform(0, 1.3 * length)):
            life.signal(signal.SIGKILL)
            killed.kills += 1
        try:
            code = life.end(120)
        except TimeoutError as error:
            return [str(error)]
        if code == 0:
            return []
        if code != -signal.SIGKILL:
            return [f"exit code {code}"]
    return ["not done after 100 lives"]


def _pair(folder: Path, store: Path) -> list[lives.Life]:
    """Starts both processes of a job, on one device each."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    words = lives.words_of(
        folder,
        store,
        MESH_DATA=2,
        NUM_PROCESSES=2,
        COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
    )
    return [
        lives.Life(words, folder.with_suffix(f".{process}.log"), process=process)
        for process in range(2)
    ]


def _wait(living: Sequence[lives.Life], seconds: float) -> bool:
    """Waits so long; False if one of them is over before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(life.is_over() for life in living):
            return False
        time.sleep(0.001)
    return True


def _other_files(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """Names the files of a folder that are not as they were."""
    found = _digests(folder).items() ^ wanted.items()
    return [f"{name} of {folder.name}" for name in sorted({name for name, _ in found})]


def _digests(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
