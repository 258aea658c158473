"""A Mixtral-shaped train step beside the same step of `transformers` in PyTorch.

    pip install -e '.[convert]'    # PyTorch; without it our step is timed alone
    python -m benchmarks.mixtral [--steps 6] [--gin.MACRO=VALUE ...]

55 million parameters: width 512, 4 layers, 8 heads of 64, in every layer 8 SwiGLU
experts of 1,024 of which each token visits 2. A step is forward, cross-entropy,
backward, clipping by norm and AdamW, on 8 sequences of 256 tokens, in float32, on all
cores. Nothing is dropped and nothing recomputed. The steps of both take turns, so that
a noisy machine is noisy for both; then the parts of ours are timed alone.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.train_step import matmul_gflops, prepare_step
from launch.config import reader
from launch.config.platform import prepare_environment
from moe.layers import Sublayer

RUN = "configs/runs/demo.gin"
HARDWARE = "configs/hardware/cpu1.gin"
MIXTRAL = {
    "VOCAB_SIZE": 512,
    "VOCABULARY_PIECES": 512,
    "EMBED_DIM": 512,
    "NUM_LAYERS": 4,
    "NUM_HEADS": 8,
    "HEAD_DIM": 64,
    "MLP_DIM": 1024,
    "ACTIVATION": "swiglu",
    "MOE_EVERY": 1,
    "NUM_EXPERTS": 8,
    "EXPERT_MLP_DIM": 1024,
    "NUM_SELECTED_EXPERTS": 2,
    "RENORMALIZE_GATES": "before_drop",
    "TRAIN_CAPACITY_FACTOR": 0.0,
    "JITTER_NOISE": 0.0,
    "TRANSPORT": "ragged",
    "SCAN_LAYERS": False,
    "DTYPE": "float32",
    "REMAT": "none",
    "BATCH_SIZE": 8,
    "LEARNING_RATE": 1e-4,
}


def main() -> None:
    """Times both steps in turn, then the parts of ours, and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each")
    options, rest = parser.parse_known_args()
    bindings = [f"{macro}={value!r}" for macro, value in MIXTRAL.items()]
    bindings += [word.removeprefix("--gin.") for word in rest]
    config = reader.read([RUN, HARDWARE], bindings)
    prepare_environment(config.settings.platform)
    torch_step = prepare_torch_step(config)

    import jax

    steps = {"switchyard": prepare_step(config)}
    if torch_step is not None:
        steps["transformers"] = torch_step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in steps}
    gflops = []
    for _ in range(options.steps):
        gflops.append(matmul_gflops(jax))
        for name, step in steps.items():
            began = time.process_time()
            seconds[name].append(timed(step))
            cpu_seconds[name].append(time.process_time() - began)
    report(config, seconds, cpu_seconds, statistics.median(gflops))
    parts = prepare_parts(config)
    part_seconds: dict[str, list[float]] = {name: [] for name in parts}
    whole = []
    for _ in range(options.steps):
        whole.append(timed(steps["switchyard"]))
        for name, part in parts.items():
            part_seconds[name].append(timed(part))
    report_parts(statistics.median(whole), part_seconds)


def timed(step: Callable[[], None]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def prepare_torch_step(config: reader.ResolvedConfig) -> Callable[[], None] | None:
    """The public model of the same sizes, with PyTorch's own AdamW; None without it."""
    missing = [
        name for name in ("torch", "transformers") if not importlib.util.find_spec(name)
    ]
    if missing:
        print(
            f"PyTorch's step is left out, {' and '.join(missing)} not being installed: "
            "pip install -e '.[convert]'"
        )
        return None
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    settings = config.settings
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=settings.model.vocab_size,
            hidden_size=settings.model.model_dim,
            intermediate_size=settings.model.expert_mlp_dim,
            num_hidden_layers=settings.model.num_layers,
            num_attention_heads=settings.model.num_heads,
            num_key_value_heads=settings.model.num_heads,
            head_dim=settings.model.head_dim,
            num_local_experts=settings.model.num_experts,
            num_experts_per_tok=settings.router.num_selected,
            max_position_embeddings=settings.data.length,
            sliding_window=None,
            use_cache=False,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    shape = (settings.train.batch_size, settings.data.length)
    tokens = torch.randint(3, settings.model.vocab_size, shape)

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    once()
    return once


def prepare_parts(config: reader.ResolvedConfig) -> dict[str, Callable[[], None]]:
    """Forward and backward of all layers' parts, one by one, and the optimizer."""
    import jax
    import jax.numpy as jnp
    import optax

    from launch.run.assemble import assemble
    from moe.model import block, parameters, view
    from moe.model.view import Stream

    run = assemble(config)
    execution, layers = run.learner.model.execution, run.settings.layers.decoder
    (one,) = layers.kinds_of_layers  # all layers are alike
    B, L = run.settings.train.batch_size, run.settings.data.length
    key = jax.random.key(0)
    x_BLM = jax.random.normal(key, (B, L, layers.width))
    ones_BL = jnp.ones((B, L), jnp.int32)
    position_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    stream = Stream(ones_BL, position_BL, ones_BL, None, jnp.arange(B))
    seen = view.of_stream(stream, None, execution)
    weights = parameters.draw(block.specs(one, layers.width), key, "float32")

    def part(each: Sublayer) -> Callable[[Any, jax.Array], jax.Array]:
        def apply(w: Any, x_BLM: jax.Array) -> jax.Array:
            kind = block.KINDS[each.kind]
            given = (w, x_BLM, seen, None, each.settings, key, jnp.int32(0), execution)
            return kind.apply(*given)[0]

        return apply

    def forward_and_backward(function: Callable, weights: Any) -> Callable[[], None]:
        def back(weights: Any, x_BLM: jax.Array) -> Any:
            y_BLM, pull = jax.vjp(function, weights, x_BLM)
            return y_BLM, pull(x_BLM)

        compiled = jax.jit(back)
        jax.block_until_ready(compiled(weights, x_BLM))

        def once() -> None:
            for _ in layers.layers:
                jax.block_until_ready(compiled(weights, x_BLM))

        return once

    def update(params: Any, gradients: Any, opt_state: Any) -> Any:
        optimizer = run.learner.optimizer
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = run.init_state()
    gradients = jax.tree.map(jnp.ones_like, state.params)
    held = [state.params, state.opt_state]
    compiled_update = jax.jit(update, donate_argnums=(0, 2))

    def optimize() -> None:
        held[:] = compiled_update(held[0], gradients, held[1])
        jax.block_until_ready(held)

    optimize()
    return {
        **{
            f"{each.name} layers": forward_and_backward(part(each), weights[each.name])
            for each in one
        },
        "clip and AdamW": optimize,
    }


def report(
    config: reader.ResolvedConfig,
    seconds: dict[str, list[float]],
    cpu_seconds: dict[str, list[float]],
    gflops: float,
) -> None:
    """Prints tokens per second, their ratio, and the share of the roofline.

    Where other jobs hold the cores, seconds of CPU over all threads say more; then set
    OMP_WAIT_POLICY=passive, or PyTorch's include those its threads spin away.
    """
    from moe.accounting import count

    settings = config.settings
    tokens = settings.train.batch_size * settings.data.length
    counts = count(settings.layers, settings.data.length, settings.data.encoder_length)
    theirs = seconds.get("transformers")
    print(f"\nroofline: {gflops:.0f} GFLOP/s in float32 products\n")
    print(
        f"{'step':13} {'tokens/s':>9} {'÷ theirs':>9} {'÷ roofline':>11} {'best':>7} "
        f"{'CPU s':>6}"
    )
    for name, times in seconds.items():
        speed = tokens / statistics.median(times)
        share = speed * counts.train_flops_per_token / 1e9 / gflops
        ratio = f"{speed * statistics.median(theirs) / tokens:.2f}" if theirs else "–"
        print(
            f"{name:13} {speed:9,.0f} {ratio:>9} {share:11.2f} "
            f"{tokens / min(times):7,.0f} {statistics.median(cpu_seconds[name]):6.2f}"
        )


def report_parts(whole: float, seconds: dict[str, list[float]]) -> None:
    """Prints where our step's time goes; what no part accounts for is the rest."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    medians["rest"] = whole - sum(medians.values())
    print(f"\n{'part':15} {'seconds':>8} {'share':>6}   of a step of {whole:.2f} s")
    for name, part in medians.items():
        print(f"{name:15} {part:8.3f} {part / whole:6.0%}")


if __name__ == "__main__":
    main()
