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
from moe.settings import HeadsSettings
from partitioning import rules

ROW = ("batch", "length")
BY_HEAD = (*ROW, "heads", "head_dim")


def method_of(run: Run, s: HeadsSettings, length: int) -> tuple[Kernel | None, str]:
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


def kinds(run: Run) -> list[tuple[HeadsSettings, int]]:
    """Returns each kind of layer that attends to its own tokens, and their number."""
    found = [
        (s, run.settings.length_of(name))
        for name, stack in run.settings.layers.stacks.items()
        for s in stack.settings("heads")
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


def _draw(run: Run, s: HeadsSettings, method: Kernel, length: int) -> tuple[Any, ...]:
    """Queries, keys, values, gradients of the output; and who they are."""
    mesh = run.settings.mesh
    B, L = mesh.batch_shards, min(length, 2 * kernel_method.block(method, length))
    prefix = run.settings.data.prefix_attention == "bidirectional"
    heads = (s.num_heads, s.kv_heads, s.kv_heads, s.num_heads)
    placed = rules.sharding(run.mesh, BY_HEAD), rules.sharding(run.mesh, ROW)

    @functools.partial(jax.jit, out_shardings=(*[placed[0]] * 4, placed[1], placed[1]))
    def draw() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), len(heads))
        arrays = (
            jax.random.normal(key, (B, L, n, s.head_dim), run.settings.execution.dtype)
            for key, n in zip(keys, heads, strict=True)
        )
        place_L = jnp.arange(L, dtype=jnp.int32)
        row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
        # Two segments, of which one has a prefix, and padding.
        end_B1 = L // 3 + row_B1 % 7
        segment_BL = jnp.where(place_L < end_B1, 1, 2) * (place_L < L - L // 8)
        prefix_BL = (place_L < end_B1 // 2) & prefix
        return *arrays, segment_BL, prefix_BL.astype(jnp.int32)

    return draw()


def _attended(
    run: Run, s: HeadsSettings, method: Kernel | None, arguments: tuple[Any, ...]
) -> dict[str, Any]:
    """Output, and the gradients of queries, keys and values."""
    grid = run.learner.model.grid
    has_prefix = run.settings.data.prefix_attention == "bidirectional"
    scoring = Scoring(s.scale, s.window, causal=s.causal)

    def on_device(
        query: Any, key: Any, value: Any, d_mixed: Any, segment: Any, prefix: Any
    ) -> dict[str, Any]:
        place_L = jnp.arange(segment.shape[1], dtype=jnp.int32)
        who = Who(place_L, segment, prefix if has_prefix else None)

        def attend(query: Any, key: Any, value: Any) -> Any:
            given = query, key, value, who, who, scoring
            if method is None:
                return whole.attend(*given)
            return kernel.attend(*given, method=method)

        mixed, transposed = jax.vjp(attend, query, key, value)
        gradients = zip(("queries", "keys", "values"), transposed(d_mixed), strict=True)
        return {"output": mixed, **dict(gradients)}

    by_head, by_row = rules.spec(BY_HEAD), rules.spec(ROW)
    cut = jax.jit(grid.run(on_device, (*[by_head] * 4, by_row, by_row), by_head))
    return cut(*arguments)
