"""Speed of one sparse layer beside a dense one of the same active FLOPs.

    python -m benchmarks.moe_layer [--case NAME ...] [--repeats 7] [--platform cpu]

Forward and backward of the feed-forward layer alone, everything in one run and
interleaved, so that a noisy machine is noisy for all. "balanced" sends every expert the
same number of rows; "natural" is a random router on random tokens. Beside the ratio to
the dense layer stand the share of dropped choices, the time that reading the weights
alone takes, and peak memory as the compiler plans it.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from launch.config.platform import prepare_environment
from launch.config.settings import PlatformSettings


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a layer.

    Attributes:
        name: how it is asked for.
        tokens: in all.
        model_dim: M.
        mlp_dim: F of one expert.
        num_experts: E.
        num_selected: K.
        dtype: type of activations, and of the weights as they are read.
    """

    name: str
    tokens: int
    model_dim: int
    mlp_dim: int
    num_experts: int
    num_selected: int
    dtype: str = "float32"


CPU_CASES = (
    Case("mixtral", 2048, 512, 1024, 8, 2),
    *(Case(f"rows256_e{E}", 256 * E, 512, 512, E, 1) for E in (8, 16, 32, 64)),
    Case("rows64_e64", 64 * 64, 512, 512, 64, 1),
)
GPU_CASES = tuple(
    Case(f"width4096_f{F}", 16_384, 4096, F, E, 2, "bfloat16")
    for F, E in ((4096, 16), (1024, 64), (256, 64))
)
# Transport, its capacity factor (0 drops nothing), and the load.
VARIANTS = (
    ("all_to_all", 1.0, "balanced"),
    ("all_to_all", 1.25, "natural"),
    ("ragged", 1.0, "balanced"),
    ("ragged", 0.0, "balanced"),
    ("ragged", 0.0, "natural"),
    ("ring", 0.0, "natural"),
)


def main() -> None:
    """Times the cases asked for and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", help="names; default: all of the platform")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each")
    parser.add_argument("--platform", choices=["cpu", "gpu"], default="cpu")
    options = parser.parse_args()
    platform = "cpu" if options.platform == "cpu" else "cuda"
    prepare_environment(PlatformSettings(platform, compilation_cache_dir=""))
    cases = CPU_CASES if options.platform == "cpu" else GPU_CASES
    unknown = set(options.case or ()) - {case.name for case in cases}
    if unknown:
        parser.error(
            f"no case {', '.join(unknown)}: {', '.join(c.name for c in cases)}"
        )
    per_row = {}
    for case in cases:
        if not options.case or case.name in options.case:
            per_row[case.name] = time_case(case, options.repeats)
    scaling = [(n, s) for n, s in per_row.items() if n.startswith("rows256")]
    if len(scaling) > 1:
        base = scaling[0][1]
        print("\ncost per row, ragged and balanced, over that of the fewest experts:")
        print("  " + ", ".join(f"{n} {s / base:.2f}" for n, s in scaling))


def time_case(case: Case, repeats: int) -> float:
    """Prints the table of one case; returns seconds per row of "ragged", balanced."""
    import jax

    layers: dict[Any, Layer] = {"dense": dense_layer(case)}
    for variant in VARIANTS:
        layers[variant] = sparse_layer(case, *variant)
    seconds: dict[Any, list[float]] = {name: [] for name in layers}
    rates, reads = [], []
    for _ in range(repeats):
        rates.append(matmul_rate(case))
        reads.append(read_seconds(case))
        for name, layer in layers.items():
            began = time.perf_counter()
            jax.block_until_ready(layer.run())
            seconds[name].append(time.perf_counter() - began)
    times = {name: statistics.median(s) for name, s in seconds.items()}
    rate = statistics.median(rates)
    floor = statistics.median(reads)
    rows = case.tokens * case.num_selected
    flops = 3 * 2 * rows * 3 * case.model_dim * case.mlp_dim
    device = jax.devices()[0]
    print(
        f"\n{case.name}: {case.tokens:,} tokens, M {case.model_dim}, F {case.mlp_dim} "
        f"swiglu, E {case.num_experts}, K {case.num_selected}, {case.dtype}, "
        f"{rows // case.num_experts} rows per expert; {device.device_kind}; products "
        f"{rate / 1e9:,.0f} GFLOP/s"
    )
    print(
        f"{'layer':12} {'capacity':>8} {'load':>9} {'ms':>8} {'÷ dense':>8} "
        f"{'of rate':>8} {'÷ reading':>9} {'dropped':>8} {'peak MB':>8}"
    )
    for name, layer in layers.items():
        transport, factor, load = (name, "", "") if name == "dense" else name
        capacity = "none" if factor == 0.0 else factor
        reading = f"{times[name] / floor:9.1f}" if name != "dense" else f"{'':9}"
        print(
            f"{transport:12} {capacity!s:>8} {load:>9} {times[name] * 1e3:8.1f} "
            f"{times[name] / times['dense']:8.2f} "
            f"{flops / times[name] / rate:8.0%} {reading} "
            f"{layer.dropped:8.1%} {layer.peak_bytes / 2**20:8.0f}"
        )
    return times["ragged", 0.0, "balanced"] / rows


@dataclasses.dataclass(frozen=True)
class Layer:
    """A compiled layer, ready to run forward and backward.

    Attributes:
        run: returns its gradients.
        dropped: share of choices without a slot.
        peak_bytes: most bytes of temporaries at once, as the compiler plans them.
    """

    run: Callable[[], Any]
    dropped: float
    peak_bytes: int


def sparse_layer(case: Case, transport: str, factor: float, load: str) -> Layer:
    """Compiles the sparse layer on one device."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moe import workloads
    from moe.model import parameters, sparse
    from moe.model.execution import Execution
    from moe.model.view import Routed
    from moe.settings import (
        DenseSettings,
        ExecutionSettings,
        RouterSettings,
        SparseSettings,
    )
    from moe.testing.whole_arrays import layer
    from partitioning.mesh import make_mesh
    from partitioning.settings import MeshSettings

    S = min(case.tokens, 2048)
    router = RouterSettings(
        num_selected=case.num_selected,
        renormalize="before_drop" if case.num_selected > 1 else "no",
        group_size=S,
        capacity_factor=factor,
    )
    settings = SparseSettings(
        case.num_experts, DenseSettings(case.mlp_dim, "swiglu"), router
    )
    execution = Execution(
        ExecutionSettings(
            transport=transport,  # type: ignore[arg-type]
            dtype=case.dtype,  # type: ignore[arg-type]
        ),
        make_mesh(MeshSettings()),
    )
    specs = sparse.specs(settings, case.model_dim)
    arrays = parameters.draw(specs, jax.random.key(0), "float32")
    shape_GSE = (case.tokens // S, S, case.num_experts)
    rng = np.random.default_rng(0)
    if load == "balanced":
        x_GSM, arrays["router"] = workloads.tokens(
            workloads.logits(load, shape_GSE), case.model_dim
        )
    else:  # a random router on random tokens
        x_GSM = rng.normal(size=(*shape_GSE[:2], case.model_dim))
        arrays["router"] = jnp.asarray(
            rng.normal(size=(case.model_dim, case.num_experts))
            / np.sqrt(case.model_dim),
            jnp.float32,
        )
    routed = Routed(
        mask_BL=jnp.ones(shape_GSE[:2], bool),
        row_B=jnp.arange(shape_GSE[0]),
        id_BL=jnp.zeros(shape_GSE[:2], jnp.int32),
    )

    def objective(arrays: Any, x_GSM: jax.Array) -> tuple[jax.Array, Any]:
        key = jax.random.key(0)
        y_GSM, sums = layer(arrays, x_GSM, routed, key, 0, settings, execution)
        return jnp.sum(y_GSM.astype(jnp.float32) * 1e-3), sums

    arguments = (arrays, jnp.asarray(x_GSM, case.dtype))
    run, (_, sums), peak = compiled(objective, arguments)
    chosen, kept = int(sums.chosen_GE.sum()), int(sums.kept_GE.sum())
    return Layer(run, 1 - kept / chosen, peak)


def dense_layer(case: Case) -> Layer:
    """Compiles a dense feed-forward of K·F, the same active FLOPs."""
    import jax
    import jax.numpy as jnp

    from moe.model import parameters
    from moe.model.feed_forward import dense
    from moe.settings import DenseSettings

    settings = DenseSettings(case.mlp_dim * case.num_selected, "swiglu")
    specs = dense.specs(settings, case.model_dim)
    arrays = parameters.draw(specs, jax.random.key(0), "float32")
    x_BLM = jax.random.normal(
        jax.random.key(1), (1, case.tokens, case.model_dim), case.dtype
    )

    def objective(arrays: Any, x_BLM: jax.Array) -> tuple[jax.Array, None]:
        y_BLM = dense.feed_forward(arrays, x_BLM, "swiglu")
        return jnp.sum(y_BLM.astype(jnp.float32) * 1e-3), None

    run, _, peak = compiled(objective, (arrays, x_BLM))
    return Layer(run, 0.0, peak)


def compiled(objective: Callable, arguments: Any) -> tuple[Callable, Any, int]:
    """Compiles and warms up value and gradients."""
    import jax

    step = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    program = step.lower(*arguments).compile()
    (_, aux), _ = jax.block_until_ready(program(*arguments))
    peak = program.memory_analysis().temp_size_in_bytes
    return functools.partial(program, *arguments), (None, aux), peak


def matmul_rate(case: Case) -> float:
    """FLOP/s of a plain product of the case's shape over all cores."""
    import jax
    import jax.numpy as jnp

    rows = min(case.tokens * case.num_selected, 8192)
    left = jnp.ones((rows, case.model_dim), case.dtype)
    right = jnp.ones((case.model_dim, 2 * case.mlp_dim), case.dtype)
    product = _product()
    jax.block_until_ready(product(left, right))
    began = time.perf_counter()
    for _ in range(5):
        out = product(left, right)
    jax.block_until_ready(out)
    flops = 2 * rows * case.model_dim * 2 * case.mlp_dim
    return 5 * flops / (time.perf_counter() - began)


def read_seconds(case: Case) -> float:
    """Time to read all experts' weights three times, as forward and backward must."""
    import jax

    size = case.num_experts * case.model_dim * case.mlp_dim * 3
    weights = _weights(size, case.dtype)
    total = _total()
    jax.block_until_ready(total(weights))
    began = time.perf_counter()
    for _ in range(3):
        jax.block_until_ready(total(weights))
    return time.perf_counter() - began


@functools.cache
def _product() -> Callable:
    import jax
    import jax.numpy as jnp

    return jax.jit(jnp.matmul)


@functools.cache
def _total() -> Callable:
    import jax
    import jax.numpy as jnp

    return jax.jit(jnp.sum)


@functools.lru_cache(maxsize=1)
def _weights(size: int, dtype: str) -> Any:
    import jax.numpy as jnp

    return jnp.ones(size, dtype)


if __name__ == "__main__":
    main()
