"""What a run's records cost at the largest scale: shown, merged, written, read again.

    python -m benchmarks.records [--layers=48] [--experts=10240] [--megabytes=60]

- show: one redraw of the live display; of a record that was drawn before, and of a new
  one, whose extremes of load are looked for (the goal is 1 ms);
- merge: the metrics of a step added to those before, and a record written;
- resume: cutting a metrics.jsonl of so many megabytes after a step near its end;
- report: reading all of that file for a page, without drawing.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from launch.records.merge import Merged
from launch.records.write import MetricWriter
from launch.report.gather import gather
from launch.terminal.training import TrainProgress

_REPEATS = 20


def main() -> None:
    """Measures every part and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=10_240)
    parser.add_argument("--megabytes", type=int, default=60)
    options = parser.parse_args()
    metrics = step_metrics(options.layers, options.experts)
    show(metrics)
    with tempfile.TemporaryDirectory() as folder:
        merge(Path(folder), metrics)
    with tempfile.TemporaryDirectory() as folder:
        resume(Path(folder), options.megabytes << 20)


def step_metrics(layers: int, experts: int) -> dict[str, np.ndarray]:
    """Returns metrics such as a step returns."""
    rng = np.random.default_rng(0)
    load_PE = rng.random((layers, experts), np.float32)
    kinds = ("routed", "computed", "spilled", "dropped", "padding")
    names = [f"ledger/{kind}_choices" for kind in kinds]
    names += ["ledger/tokens", "ledger/tokens_without_expert"]
    per_layer = ("dropped_fraction_per_layer", "entropy_nats_per_layer")
    one = np.ones((), np.float32)
    return {
        "router/load": load_PE / load_PE.sum(axis=1, keepdims=True),
        **{name: np.full(layers, 4096, np.int32) for name in names},
        **{f"router/{name}": rng.random(layers, np.float32) for name in per_layer},
        "loss/nats_per_token": one,
        "loss/target_tokens": 1024 * one,
        "router/dropped_fraction": one,
        "state/skipped_in_a_row": np.zeros((), np.int32),
    }


def show(metrics: dict[str, np.ndarray]) -> None:
    """Draws a record again and again, and then each time another."""
    record = {"step": 1, "split": "train"} | {
        name: value.item() if value.ndim == 0 else value
        for name, value in metrics.items()
    }
    shown = TrainProgress(1_000_000, quiet=True)
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    shown.update(record)
    print(f"show again   {timed(lambda: console.print(shown)):8.2f} ms")

    def another() -> None:
        shown.update({**record})
        shown.plain_line()

    print(f"show another {timed(another):8.2f} ms")


def merge(folder: Path, metrics: dict[str, np.ndarray]) -> None:
    """Adds the metrics of steps up, and writes what they amount to."""
    merged = Merged()
    print(f"merge        {timed(lambda: merged.add(metrics)):8.2f} ms a step")
    with MetricWriter(folder, load_period_steps=0) as writer:
        record = {"step": 1, "split": "train"} | merged.record()
        print(f"write        {timed(lambda: writer.write(record)):8.2f} ms a record")
    size = (folder / "metrics.jsonl").stat().st_size // (_REPEATS + 1)
    print(f"a line       {size:8,} bytes")


def resume(folder: Path, size: int) -> None:
    """Cuts a long file near its end, and reads it."""
    numbers = {f"area/quantity_{n}": n / 7 for n in range(48)}
    step = 0
    with open(folder / "metrics.jsonl", "w") as file:
        while file.tell() < size:
            step += 1
            record = {"step": step, "split": "train", **numbers}
            file.write(json.dumps(record) + "\n")
    began = time.perf_counter()
    MetricWriter(folder, resume_step=step - 100).close()
    print(f"resume       {1e3 * (time.perf_counter() - began):8.2f} ms")
    began = time.perf_counter()
    gather(folder)
    print(
        f"report       {1e3 * (time.perf_counter() - began):8.2f} ms, {step:,} records"
    )


def timed(call: Callable[[], object]) -> float:
    """Returns the milliseconds that a call takes: the median of several."""
    call()
    took = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return 1e3 * float(np.median(took))


if __name__ == "__main__":
    main()
