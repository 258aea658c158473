"""Loads on the experts from (name, seed, step): even, uneven, and changing.

For tests, benchmarks and self-checks: logits that make routers choose so, in NumPy, the
same wherever they are made.
"""

from collections.abc import Callable, Mapping

import numpy as np

BARRED = -30.0  # the logit of an expert that gets nothing


def _balanced(E: int, devices: int, step: int) -> np.ndarray:
    """Every expert alike."""
    return np.ones(E)


def _hot_expert(E: int, devices: int, step: int) -> np.ndarray:
    """One expert is wanted as much as all others together."""
    return np.where(np.arange(E) == E // 2, max(E - 1, 1), 1.0)


def _hot_set(E: int, devices: int, step: int) -> np.ndarray:
    """An eighth of the experts, spread out, is wanted by four fifths of the tokens."""
    hot = np.arange(E) % 8 == 0
    return np.where(hot, 0.8 / hot.sum(), 0.2 / max((~hot).sum(), 1))


def _hot_device(E: int, devices: int, step: int) -> np.ndarray:
    """The experts of the first device are wanted by four fifths of the tokens."""
    hot = np.arange(E) < E // devices
    return np.where(hot, 0.8 / hot.sum(), 0.2 / max((~hot).sum(), 1))


def _zero_load_device(E: int, devices: int, step: int) -> np.ndarray:
    """Nobody wants the experts of the last device."""
    return (
        np.where(np.arange(E) < E - E // devices, 1.0, 0.0)
        if devices > 1
        else (np.ones(E))
    )


def _rotating(E: int, devices: int, step: int) -> np.ndarray:
    """The hot expert is another one each step."""
    return np.roll(_hot_expert(E, devices, step), step)


def _bursts(E: int, devices: int, step: int) -> np.ndarray:
    """Even, but every fourth step all tokens want one expert."""
    wanted = np.arange(E) == step // 4 % E
    return wanted.astype(float) if step % 4 == 3 else np.ones(E)


WORKLOADS: Mapping[str, Callable[[int, int, int], np.ndarray]] = {
    "balanced": _balanced,
    "hot_expert": _hot_expert,
    "hot_set": _hot_set,
    "hot_device": _hot_device,
    "zero_load_device": _zero_load_device,
    "rotating": _rotating,
    "bursts": _bursts,
}


def logits(
    name: str,
    shape_GSE: tuple[int, int, int],
    *,
    seed: int = 0,
    step: int = 0,
    devices: int = 1,
) -> np.ndarray:
    """Draws logits whose K best follow the workload's odds, without replacement.

    log p plus Gumbel noise (arXiv:1903.06059, section 2.3). "balanced" is exactly so
    for any K if E divides the tokens: their preferences are rotations of one order.

    Args:
        name: key of `WORKLOADS`.
        shape_GSE: groups, tokens, experts.
        seed: PRNG seed for the draws.
        step: number of the step, with draws of its own; some workloads change with it.
        devices: size of the expert axis, for those that single out a device.
    Returns:
        float32 [G, S, E].
    Raises:
        ValueError: there is no such workload, or E does not divide over the devices.
    """
    if shape_GSE[-1] % devices:
        raise ValueError(
            f"{shape_GSE[-1]} experts do not divide over {devices} devices"
        )
    if name not in WORKLOADS:
        raise ValueError(f"{name!r} is no workload: {', '.join(WORKLOADS)}")
    G, S, E = shape_GSE
    rng = np.random.default_rng([seed, step])
    if name == "balanced":
        order_E = rng.permutation(E)
        start_GS1 = np.arange(G * S).reshape(G, S, 1)
        rank_GSE = (order_E - start_GS1) % E
        return (2.0 - 4.0 * rank_GSE / E).astype(np.float32)
    odds_E = WORKLOADS[name](E, devices, step)
    with np.errstate(divide="ignore"):
        log_odds_E = np.log(odds_E / odds_E.sum())
    drawn_GSE = log_odds_E + rng.gumbel(size=shape_GSE)
    return np.maximum(drawn_GSE, BARRED).astype(np.float32)


def tokens(
    logits_GSE: np.ndarray, model_dim: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Makes tokens and router weights whose product is the given logits.

    The first E numbers of a token are its logits, the others are noise.

    Returns:
        x_GSM and router_ME, float32.
    Raises:
        ValueError: a token is too narrow for its logits.
    """
    G, S, E = logits_GSE.shape
    if model_dim < E:
        raise ValueError(f"a token of {model_dim} numbers cannot hold {E} logits")
    x_GSM = np.random.default_rng(seed).normal(size=(G, S, model_dim))
    x_GSM[..., :E] = logits_GSE
    return x_GSM.astype(np.float32), np.eye(model_dim, E, dtype=np.float32)
