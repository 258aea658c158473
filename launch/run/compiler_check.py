"""XLA's CPU compiler against NumPy, on programs that it is known to get wrong.

    python -m launch.run.compiler_check

says what it makes of them under the XLA_FLAGS of the environment. The compilers of
jaxlib 0.10.2 and 0.12.0.1 are wrong by default: what they hand to the YNN library in
one piece, a product and what is done with it, comes back as if read from elsewhere.
`launch.config.platform.CPU_FLAG` hands it nothing.
"""

import functools
import math
import os
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from launch.config.platform import CPU_FLAG
from launch.errors import EXIT_DONE, EXIT_USER_ERROR, UserError

TOLERANCE = 1e-4  # float32 rounds these sums by 3e-6 of the largest value
SMALL, LARGE = (5, 60, 60), (32_769, 3)


class CompilerCheckError(UserError):
    """The compiler of this machine's CPU computes wrong numbers."""


def check() -> None:
    """Compares the compiler with NumPy if jax is on the CPU: three small programs.

    Raises:
        CompilerCheckError: what is off by how much, and which flag is to be taken out.
    """
    if jax.default_backend() != "cpu":
        return
    found = differences()
    if all(difference <= TOLERANCE for difference in found.values()):
        return
    advice = _advice(os.environ.get("XLA_FLAGS", ""))
    raise CompilerCheckError(
        f"XLA's CPU compiler (jaxlib {jaxlib.__version__}) computes wrong numbers:\n"
        f"{_rows(found)}\n"
        f'Nothing was trained or scored. {advice}, or set SELF_CHECK to "off" to go on '
        "all the same."
    )


@functools.cache
def differences() -> dict[str, float]:
    """Returns by how much each program is off, as a part of the largest value.

    Each is compiled alone: beside others the compiler cuts it in other pieces.
    """
    return {
        f"{name}, float32{list(shape)}": _difference(program, oracle, shape)
        for name, (program, oracle, shape) in {
            "a product summed with its operand": (_summed, _summed_by_numpy, SMALL),
            "the gradient of that": (_gradient, _gradient_by_numpy, SMALL),
            "squares of products of rows": (_squares, _squares_by_numpy, LARGE),
        }.items()
    }


def _difference(
    program: Callable[[jax.Array], jax.Array],
    oracle: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, ...],
) -> float:
    """Compiles a program for one device and compares it with its oracle."""
    x = np.sin(12.9898 * np.arange(math.prod(shape))).reshape(shape).astype(np.float32)
    alone = jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("one",))
    with jax.set_mesh(alone):  # the caller may have set that of a run
        actual = np.asarray(jax.jit(program)(x), np.float64)
    expected = oracle(x.astype(np.float64))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.max(np.abs(actual - expected)) / np.max(np.abs(expected))
    return float(difference) if np.isfinite(difference) else math.inf


def _summed(x_BIJ: jax.Array) -> jax.Array:
    return jnp.sum((x_BIJ @ jnp.full_like(x_BIJ, 0.5)) * x_BIJ, axis=-1)


def _summed_by_numpy(x_BIJ: np.ndarray) -> np.ndarray:
    # Every element of the product's row is half the sum of the operand's row.
    return 0.5 * x_BIJ.sum(-1) ** 2


def _gradient(x_BIJ: jax.Array) -> jax.Array:
    return jax.grad(lambda x_BIJ: jnp.sum(_summed(x_BIJ)))(x_BIJ)


def _gradient_by_numpy(x_BIJ: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x_BIJ.sum(-1, keepdims=True), x_BIJ.shape)


def _squares(x_BI: jax.Array) -> jax.Array:
    return jax.vmap(lambda x_I: jnp.sum((jnp.eye(len(x_I)) @ x_I) ** 2))(x_BI)


def _squares_by_numpy(x_BI: np.ndarray) -> np.ndarray:
    return (x_BI**2).sum(-1)


def _rows(found: dict[str, float]) -> str:
    return "\n".join(
        f"  {name:53}  off by {difference:.3g}" for name, difference in found.items()
    )


def _advice(flags: str) -> str:
    """What to do, by what XLA_FLAGS holds."""
    given = [flag for flag in flags.split() if flag.startswith(CPU_FLAG)]
    if CPU_FLAG in given:
        return f"{CPU_FLAG} is set and does not help: install another jaxlib"
    if given:
        return (
            f"Take {given[0]} out of XLA_FLAGS, in the environment or in the "
            f"configuration: without it {CPU_FLAG} is set, which is right"
        )
    return f"Add {CPU_FLAG} to XLA_FLAGS, which is right"


def main() -> int:
    """Prints what each program is off by.

    Returns:
        0 if all are right, else 1.
    """
    print(f"jax {jax.__version__}, jaxlib {jaxlib.__version__}")
    print(f"XLA_FLAGS: {os.environ.get('XLA_FLAGS', '')}")
    print(_rows(differences()))
    right = all(difference <= TOLERANCE for difference in differences().values())
    return EXIT_DONE if right else EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
