"""Where the time of a CPU train step goes: seconds of all threads by kind of operation.

    python -m benchmarks.profile_step [--steps 5] [--gin.MACRO=VALUE ...]

The Mixtral shape of `benchmarks.mixtral`, without PyTorch; `--gin.XLA_FLAGS='(...)'`
and `--gin.SCAN_LAYERS=True` compare. Also prints seconds and page faults of a step, and
two primitives that library flags have slowed down: a norm and a softmax.
"""

import argparse
import collections
import glob
import re
import resource
import statistics
import tempfile
import time

from benchmarks.mixtral import HARDWARE, MIXTRAL, RUN, timed
from benchmarks.train_step import matmul_gflops, prepare_step
from launch.config import reader
from launch.config.platform import prepare_environment


def main() -> None:
    """Times some steps, profiles one, and prints both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    options, rest = parser.parse_known_args()
    bindings = [f"{macro}={value!r}" for macro, value in MIXTRAL.items()]
    bindings += [word.removeprefix("--gin.") for word in rest]
    config = reader.read([RUN, HARDWARE], bindings)
    prepare_environment(config.settings.platform)

    import jax

    step = prepare_step(config)
    before = resource.getrusage(resource.RUSAGE_SELF)
    seconds = [timed(step) for _ in range(options.steps)]
    after = resource.getrusage(resource.RUSAGE_SELF)
    tokens = config.settings.train.batch_size * config.settings.data.length
    median = statistics.median(seconds)
    print(
        f"{tokens / median:,.0f} tokens/s, {median:.2f} s a step; of the threads "
        f"{(after.ru_utime - before.ru_utime) / options.steps:.2f} s of user and "
        f"{(after.ru_stime - before.ru_stime) / options.steps:.2f} s of system time, "
        f"{(after.ru_minflt - before.ru_minflt) // options.steps:,} page faults; "
        f"products {matmul_gflops(jax):.0f} GFLOP/s"
    )
    print_primitives(options.steps)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        print_operations(folder)


def print_primitives(repeats: int) -> None:
    """Times a norm of 12.5 million numbers and a softmax of 64 × 256 × 256."""
    import jax
    import jax.numpy as jnp

    norm = jax.jit(lambda x: jnp.sqrt(jnp.sum(x * x)))
    for name, function, shape in (
        ("norm", norm, (12_500_000,)),
        ("softmax", jax.jit(jax.nn.softmax), (64, 256, 256)),
    ):
        x = jnp.ones(shape)
        jax.block_until_ready(function(x))
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(function(x))
            times.append(time.perf_counter() - began)
        print(f"{name:8} {statistics.median(times) * 1e3:6.1f} ms")


def print_operations(folder: str) -> None:
    """Adds up the events of XLA's threads by the kind of operation."""
    import jax

    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    total: collections.Counter[str] = collections.Counter()
    number: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        for line in plane.lines:
            if "XLAEigen" in line.name:
                for event in line.events:
                    kind = re.sub(r"[.\d]+$", "", event.name)
                    total[kind] += event.duration_ns
                    number[kind] += 1
    print(f"\n{'thread ms':>9} {'calls':>6}  operation (loops contain others)")
    for kind, nanoseconds in total.most_common(25):
        print(f"{nanoseconds / 1e6:9.1f} {number[kind]:6}  {kind}")


if __name__ == "__main__":
    main()
