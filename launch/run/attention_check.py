"""The kernel that attends in a run, and its oracle, on the real devices."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from launch.run.assemble import Run
from moe.model.attention import kernel, kernel_method, whole
from moe.model.attention.kernel_method import Kernel
from moe.model.attention.mask import Who
from moe.model.attention.scoring import Scoring
from moe.settings import HeadsSettings, LatentSettings
from partitioning import rules
from partitioning.settings import BATCH_AXES

AttentionSettings = HeadsSettings | LatentSettings

ROW = ("batch", "length")
BY_HEAD = (*ROW, "heads", "head_dim")
HEADS = ("heads",)


def method_of(run: Run, s: AttentionSettings, length: int) -> tuple[Kernel | None, str]:
    """Returns the kernel that attends in training and scoring, and why; None if none.

    Args:
        run: its devices, and its settings.
        s: kind of layer.
        length: tokens of its rows.
    """
    settings, device = run.settings, run.mesh.devices.flat[0]
    return kernel_method.of_heads(
        s,
        settings.execution,
        device.platform,
        device.device_kind,
        length=length,
        whole=settings.mesh.context == 1,
        prefix=settings.data.prefix_attention == "bidirectional",
    )


def kinds(run: Run) -> list[tuple[AttentionSettings, int]]:
    """Returns each kind of layer that attends to its own tokens, and their number."""
    found = [
        (s, run.settings.length_of(name))
        for name, stack in run.settings.layers.stacks.items()
        for s in (*stack.settings("heads"), *stack.settings("latent"))
    ]
    return list(dict.fromkeys(found))


def results(run: Run) -> Iterator[tuple[Kernel, Any, Any]]:
    """Attends as each kind of layer does, with its kernel and with all scores held.

    Each device has its own row of two blocks, at most, and its own heads.

    Yields:
        The kernel, then output and gradients by name: its own, and the oracle's.
    """
    for s, length in kinds(run):
        method, _ = method_of(run, s, length)
        if method is not None:
            arguments = _draw(run, s, method, length)
            ours, oracle = (
                _attended(run, s, each, arguments) for each in (method, None)
            )
            yield method, ours, oracle


def _draw(
    run: Run, s: AttentionSettings, method: Kernel, length: int
) -> tuple[Any, ...]:
    """Queries, keys, values, sinks, gradients of the output; and who they are."""
    mesh = run.settings.mesh
    B, L = mesh.batch_shards, min(length, 2 * kernel_method.block(method, length))
    prefix = run.settings.data.prefix_attention == "bidirectional"
    kv_heads = s.own_kv_heads(mesh.model) * mesh.model  # each device's, beside another
    K, X = s.key_width, s.value_width
    heads = (s.num_heads, K), (kv_heads, K), (kv_heads, X), (s.num_heads, X)
    by_head, of_heads, by_row = (
        rules.sharding(run.mesh, axes) for axes in (BY_HEAD, HEADS, ROW)
    )

    @functools.partial(
        jax.jit, out_shardings=(*[by_head] * 4, of_heads, by_row, by_row)
    )
    def draw() -> tuple[Any, ...]:
        *keys, own_key = jax.random.split(jax.random.key(0), len(heads) + 1)
        arrays = (
            jax.random.normal(key, (B, L, *head), run.settings.execution.dtype)
            for key, head in zip(keys, heads, strict=True)
        )
        place_L = jnp.arange(L, dtype=jnp.int32)
        row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
        # Two segments, of which one has a prefix, and padding.
        end_B1 = L // 3 + row_B1 % 7
        segment_BL = jnp.where(place_L < end_B1, 1, 2) * (place_L < L - L // 8)
        prefix_BL = (place_L < end_B1 // 2) & prefix
        sink_N = jax.random.normal(own_key, (s.num_heads,))
        return *arrays, sink_N, segment_BL, prefix_BL.astype(jnp.int32)

    return draw()


def _attended(
    run: Run, s: AttentionSettings, method: Kernel | None, arguments: tuple[Any, ...]
) -> dict[str, Any]:
    """Output, and the gradients of queries, keys, values, and sinks if there are."""
    grid = run.learner.model.grid
    has_prefix = run.settings.data.prefix_attention == "bidirectional"
    names = ("queries", "keys", "values", *(("sinks",) if s.sinks else ()))

    def on_device(*given: Any) -> dict[str, Any]:
        *asked, d_mixed, sink_N, segment, prefix = given
        place_L = jnp.arange(segment.shape[1], dtype=jnp.int32)
        who = Who(place_L, segment, prefix if has_prefix else None)

        def attend(query: Any, key: Any, value: Any, sink_N: Any = None) -> Any:
            scoring = Scoring(s.scale, s.window, s.cap, None, sink_N, causal=s.causal)
            given = query, key, value, who, who, scoring
            if method is None:
                return whole.attend(*given)
            return kernel.attend(*given, method=method)

        sink = (sink_N,) if s.sinks else ()
        mixed, transposed = jax.vjp(attend, *asked, *sink)
        gradients = dict(zip(names, transposed(d_mixed), strict=True))
        if s.sinks:
            gradients["sinks"] = grid.sum(gradients["sinks"], BATCH_AXES)
        return {"output": mixed, **gradients}

    by_head, of_heads, by_row = (rules.spec(axes) for axes in (BY_HEAD, HEADS, ROW))
    found = dict.fromkeys(("output", *names), by_head)
    found |= {"sinks": of_heads} if s.sinks else {}
    cut = grid.run(on_device, (*[by_head] * 4, of_heads, by_row, by_row), found)
    return jax.jit(cut)(*arguments)
