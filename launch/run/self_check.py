"""Sparse layers and attention's kernel against oracles on the real devices.

Kernels that were silently wrong, and collectives that were scheduled wrongly, have cost
others weeks. One small batch, forward and backward, shows most of it in seconds.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.errors import UserError
from launch.run import attention_check
from launch.run.assemble import Run
from moe.model import parameters, sparse
from moe.model.exchange import exchange_of
from moe.model.execution import Execution
from moe.model.view import Routed
from moe.settings import SparseSettings
from moe.testing.whole_arrays import layer
from partitioning import rules

# Of what one expert, or one array, is off by, in the norm. Products in bfloat16, and
# in float32 on accelerators, which multiply it in fewer bits, differ by their rounding.
TOLERANCES = {"exact": 1e-4, "rounded": 3e-2}
LONGEST_GROUP = 128


class SelfCheckError(UserError):
    """What this run would compute on these devices is wrong."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a program compares with the oracle.

    Attributes:
        program: "training", "evaluation" or "rounds" of a sparse layer, or "attention".
        way: its transport, or its kernel.
        differences: relative difference of the output and, but for evaluation, of each
            gradient.
        tolerance: what they may be.
    """

    program: str
    way: str
    differences: Mapping[str, float]
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest difference; not a number if any is not."""
        return float(np.max(list(self.differences.values())))

    @property
    def is_right(self) -> bool:
        """Whether all is within tolerance; False if anything is not a number."""
        return self.worst <= self.tolerance

    @property
    def what(self) -> str:
        """The setting that decides it, and what it is."""
        if self.program == "attention":
            return f"ATTENTION_KERNEL, here {self.way!r},"
        return f"TRANSPORT = {self.way!r}"


def check(run: Run) -> str:
    """Compares one sparse layer of the run with `einsum` and batched products.

    So it is computed in training, in evaluation and, if steps may have to be taken in
    rounds, in rounds. A kernel that attends is compared with all scores held at once.

    Returns:
        What was found, in a line; "" for a model without experts or kernels.
    Raises:
        SelfCheckError: something differs by more than its rounding.
    """
    found = compare(run)
    if not found:
        return ""
    wrong = [comparison for comparison in found if not comparison.is_right]
    if not wrong:
        words = ", ".join(f"{c.program} {c.way!r} to {c.worst:.1e}" for c in found)
        return f"equal to the oracle: {words}"
    where = f"{run.mesh.devices.size} {run.mesh.devices.flat[0].platform} devices"
    raise SelfCheckError(
        "\n".join(
            [
                *(line for comparison in wrong for line in _told(comparison, where)),
                f"Nothing was trained. Set {_instead(wrong)}, look for flags in "
                "XLA_FLAGS that change kernels or schedules, or pass --self_check=off "
                "to go on all the same.",
            ]
        )
    )


def _instead(wrong: list[Comparison]) -> str:
    """What computes the same without what is wrong."""
    attention = {comparison.program == "attention" for comparison in wrong}
    words = {True: "ATTENTION_KERNEL to 'off'", False: "TRANSPORT to 'all_to_all'"}
    return " and ".join(words[each] for each in sorted(attention))


def _told(wrong: Comparison, where: str) -> list[str]:
    """What is off, line by line."""
    return [
        f"{wrong.what} differs from the oracle in {wrong.program} "
        f"by {wrong.worst:.3g} on {where}, and may by {wrong.tolerance:g}:",
        *(f"  {name:32} {value:.3g}" for name, value in wrong.differences.items()),
    ]


def compare(run: Run) -> list[Comparison]:
    """Runs a layer of each kind on one small batch, and measures how far it is off."""
    kinds = dict.fromkeys(run.settings.layers.settings("sparse"))
    found = []
    for s in kinds:
        which = f" of {s.num_experts} experts" if len(kinds) > 1 else ""
        found += [
            dataclasses.replace(one, program=one.program + which)
            for one in _compare_layer(run, s)
        ]
    for kernel, ours, oracle in attention_check.results(run):
        differences = _differences(ours, oracle, run.mesh)
        found.append(Comparison("attention", kernel, differences, _tolerance(run)))
    return found


def _tolerance(run: Run) -> float:
    on_cpu = run.mesh.devices.flat[0].platform == "cpu"
    exact = run.settings.execution.dtype == "float32" and on_cpu
    return TOLERANCES["exact" if exact else "rounded"]


def _compare_layer(run: Run, s: SparseSettings) -> list[Comparison]:
    """Compares one kind of sparse layer with the oracle, in every program."""
    S = min(s.router.group_size, LONGEST_GROUP)
    s = dataclasses.replace(
        s,
        router=dataclasses.replace(
            s.router,
            group_size=S,
            group_rows=1,
            min_capacity=max(s.router.min_capacity, 1),
        ),
    )
    execution = run.learner.model.execution
    mesh = execution.mesh

    def with_room(row_budget: float, **changes: Any) -> Execution:
        settings = dataclasses.replace(
            execution.settings, row_budget=row_budget, **changes
        )
        return dataclasses.replace(execution, settings=settings)

    # Room for everything: what exceeds it is the loop's affair, not the kernels'.
    enough = float(mesh.shape["expert"])
    oracle = with_room(enough, transport="einsum")
    programs = dict.fromkeys(("training", "evaluation"), with_room(enough))
    if run.may_exceed_budget:  # half of an even share: two rounds
        programs["rounds"] = dataclasses.replace(with_room(0.5), in_rounds=True)
    arguments = _draw(run, s)
    found, right = [], {}
    for program, tried in programs.items():
        train = program != "evaluation"
        if train not in right:
            right[train] = _results(s, oracle, arguments, train=train)
        _, name, _ = exchange_of(s, tried, S, train=train)
        results = _results(s, tried, arguments, train=train)
        found.append(
            Comparison(
                program=program,
                way=name,
                differences=_differences(results, right[train], mesh),
                tolerance=_tolerance(run),
            )
        )
    return found


def _draw(run: Run, s: SparseSettings) -> tuple[Any, ...]:
    """Weights, tokens, gradients of the output, and token ids, where they live."""
    execution, embedding = run.learner.model.execution, run.settings.layers.embedding
    mesh, grid = execution.mesh, execution.grid
    # A group for each device.
    B = run.settings.mesh.batch_shards
    L = s.router.group_size * grid.size("context", "model")
    specs = sparse.specs(s, embedding.width)
    shapes = parameters.shapes(specs, "float32")
    by_row = rules.sharding(mesh, ("batch",))
    places = jax.tree.map(
        lambda spec: rules.sharding(mesh, spec.axes, grid.table), specs
    )

    @functools.partial(jax.jit, out_shardings=(places, by_row, by_row, by_row))
    def draw() -> tuple[Any, ...]:
        keys = iter(jax.random.split(jax.random.key(0), 3))
        weights = jax.tree.map(
            lambda s: _scattered(s.shape) / s.shape[-2 if s.ndim > 1 else -1] ** 0.5,
            shapes,
        )
        x_BLM, d_y_BLM = (
            jax.random.normal(
                next(keys), (B, L, embedding.width), execution.settings.dtype
            )
            for _ in range(2)
        )
        id_BL = jax.random.randint(next(keys), (B, L), 0, embedding.vocab_size)
        return weights, x_BLM, d_y_BLM, id_BL

    return draw()


def _scattered(shape: tuple[int, ...]) -> jax.Array:
    """Numbers without a pattern of variance 1; random ones take longer to compile."""
    number = sum(
        jax.lax.broadcasted_iota(jnp.float32, shape, i) * (12.9898 + 7.233 * i)
        for i in range(len(shape))
    )
    return 2**0.5 * jnp.sin(number)


def _results(
    s: SparseSettings, execution: Execution, arguments: tuple[Any, ...], *, train: bool
) -> dict[str, Any]:
    """Output and, in training, gradients; the last tokens of each row are padding."""

    def objective(weights: Any, x_BLM: Any, d_y_BLM: Any, id_BL: Any) -> Any:
        B, L = id_BL.shape
        routed = Routed(
            mask_BL=jnp.broadcast_to(jnp.arange(L) < L - L // 8, (B, L)),
            id_BL=id_BL,
            row_B=jnp.arange(B),
        )
        key = jax.random.key(1) if train else None
        y_BLM, _ = layer(weights, x_BLM, routed, key, 0, s, execution)
        return jnp.sum((y_BLM * d_y_BLM).astype(jnp.float32)), y_BLM

    if not train:
        return {"output": jax.jit(objective)(*arguments)[1]}
    (_, y_BLM), (d_weights, d_x_BLM) = jax.jit(
        jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    )(*arguments)
    return {"output": y_BLM, "tokens": d_x_BLM, "weights": d_weights}


def _differences(ours: Any, oracle: Any, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Relative difference in the norm, expert by expert where there are experts.

    The arrays stay where they are: other processes hold parts of them.
    """
    replicated = rules.replicated(mesh)
    norms = jax.jit(
        lambda trees: jax.tree_util.tree_map_with_path(_norms, *trees),
        out_shardings=replicated,
    )
    found = {}
    for path, (norm, off) in jax.tree_util.tree_leaves_with_path(
        jax.device_get(norms((oracle, ours))), is_leaf=lambda x: isinstance(x, tuple)
    ):
        # An expert that no token visited is measured against the average one.
        floor = np.sqrt(np.mean(norm.astype(np.float64) ** 2))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = float(np.max(off / np.maximum(norm, max(floor, 1e-30))))
    return found


def _norms(path: Any, expected: jax.Array, actual: jax.Array) -> tuple[Any, Any]:
    """The norm of an array, and of its difference from another, of each expert."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axis = tuple(range(1 if "experts" in name else 0, expected.ndim))
    expected, actual = expected.astype(jnp.float32), actual.astype(jnp.float32)
    return (
        jnp.sqrt(jnp.sum(expected**2, axis=axis)),
        jnp.sqrt(jnp.sum((actual - expected) ** 2, axis=axis)),
    )
