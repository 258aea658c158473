"""Speed of the demo's train step: sparse, dense of the same active FLOPs, roofline.

    python -m benchmarks.train_step [--steps 6] [--gin.MACRO=VALUE ...]

Everything is timed in one run, on the mesh of configs/runs/demo.gin and on one device,
interleaved so that a noisy machine is noisy for all. The roofline is this machine's
rate of float32 matrix products of the model's own shape.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from launch.config import reader
from launch.config.platform import prepare_environment

RUN = "configs/runs/demo.gin"
MODELS = {
    "switch top-1": "configs/models/demo_switch.gin",
    "glam top-2": "configs/models/demo_glam.gin",
    "dense": "configs/models/demo_dense.gin",
}
ONE_DEVICE = ["MESH_DATA=1", "MESH_EXPERT=1"]


def main() -> None:
    """Times every model on both meshes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each")
    options, rest = parser.parse_known_args()
    bindings = [word.removeprefix("--gin.") for word in rest]
    configs = {
        (model, mesh): reader.read([RUN, path], [*changes, *bindings])
        for mesh, changes in (("demo mesh", []), ("one device", ONE_DEVICE))
        for model, path in MODELS.items()
    }
    prepare_environment(configs["dense", "demo mesh"].settings.platform)

    import jax

    steps = {}
    for name, config in configs.items():
        began = time.perf_counter()
        steps[name] = prepare_step(config)
        print(f"{' · '.join(name)}: ready in {time.perf_counter() - began:.1f} s")
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    gflops = []
    for _ in range(options.steps):
        gflops.append(matmul_gflops(jax))
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    report(configs, seconds, statistics.median(gflops))


def prepare_step(config: reader.ResolvedConfig) -> Callable[[], None]:
    """Compiles and warms up one train step on random tokens."""
    import jax
    import numpy as np

    from launch.run.assemble import assemble

    run = assemble(config)
    with jax.set_mesh(run.mesh):
        step, state = run.compile_train_step(), run.init_state()
    rng = np.random.default_rng(0)
    shape = next(iter(run.batch_shapes().values())).shape
    tokens = rng.integers(3, config.settings.model.vocab_size, shape)
    ones = np.ones(shape)
    batch = {
        "decoder_target_tokens": tokens,
        "decoder_input_tokens": np.roll(tokens, 1, axis=1),
        "decoder_loss_weights": ones,
        "decoder_segment_ids": ones,
        "decoder_positions": np.arange(shape[1]) * ones,
    }
    batch = {name: array.astype(np.int32) for name, array in batch.items()}
    batch = jax.device_put(batch, run.batch_sharding)
    held: list[Any] = [state, np.int32(0)]

    def once() -> None:
        held[0], metrics = step(held[0], batch, held[1])
        held[1] += 1
        assert metrics["state/taken"] == 1

    once()
    return once


def matmul_gflops(jax: Any) -> float:
    """Rate of a float32 product [4096, 256] × [256, 1024] over all cores."""
    import jax.numpy as jnp

    left, right = jnp.ones((4096, 256)), jnp.ones((256, 1024))
    product = jax.jit(jnp.matmul)
    product(left, right).block_until_ready()
    began = time.perf_counter()
    for _ in range(10):
        out = product(left, right)
    out.block_until_ready()
    return 10 * 2 * 4096 * 256 * 1024 / (time.perf_counter() - began) / 1e9


def report(
    configs: dict[Any, reader.ResolvedConfig],
    seconds: dict[Any, list[float]],
    gflops: float,
) -> None:
    """Prints medians as ratios to the dense model and to the roofline."""
    from moe.accounting import count

    print(f"\nroofline: {gflops:.0f} GFLOP/s in float32 products\n")
    print(
        f"{'model':13} {'mesh':11} {'tokens/s':>9} {'÷ dense':>8} "
        f"{'÷ roofline':>10} {'spread':>7}"
    )
    for (model, mesh), times in seconds.items():
        settings = configs[model, mesh].settings
        tokens = settings.train.batch_size * settings.data.length
        speed = tokens / statistics.median(times)
        dense = tokens / statistics.median(seconds["dense", mesh])
        counts = count(
            settings.layers, settings.data.length, settings.data.encoder_length
        )
        share = speed * counts.train_flops_per_token / 1e9 / gflops
        spread = (max(times) - min(times)) / statistics.median(times)
        print(
            f"{model:13} {mesh:11} {speed:9,.0f} {speed / dense:8.2f} "
            f"{share:10.2f} {spread:7.0%}"
        )


if __name__ == "__main__":
    main()
