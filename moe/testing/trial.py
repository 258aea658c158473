"""A router of somebody's own, tried on small groups before anything is compiled."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.routing.assignment import Assignment, RouterContext
from moe.settings import RouterSettings
from moe.testing.contract import broken_rule

_GROUPS, _LONGEST = 3, 16


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Logits, real tokens, and their ids."""

    logits_GSE: np.ndarray
    mask_GS: np.ndarray
    token_GS: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the router is given."""
        return self.logits_GSE, self.mask_GS, self.token_GS

    def where(self, flag_GS: np.ndarray, other: "_Draw") -> "_Draw":
        """Another draw's tokens where a flag is set; the same padding."""
        return dataclasses.replace(
            self,
            logits_GSE=np.where(flag_GS[..., None], other.logits_GSE, self.logits_GSE),
            token_GS=np.where(flag_GS, other.token_GS, self.token_GS),
        )


def broken_rule_of_router(router: RouterSettings, num_experts: int) -> str:
    """Returns the first rule that a router of somebody's own breaks; "" if none.

    Rules are those of an Assignment; that groups do not depend on each other, nor real
    tokens on padding; and that a router that says so is causal. Few draws are made:
    what is broken seldom may be missed. What the router raises is not caught.

    Args:
        router: settings of the router, with its `own`.
        num_experts: E.
    """
    S = min(router.group_size, _LONGEST)
    router = dataclasses.replace(
        router, group_size=S, group_rows=1, slot_order="token_major"
    )
    own = router.own
    assert own is not None
    draws = [_draw(seed, S, num_experts) for seed in range(3)]
    for train, capacity in ((True, 1), (False, S)):
        run = jax.jit(_program(router, capacity, train=train))
        when = "in training" if train else "outside training"
        for draw, other in zip(draws, draws[1:] + draws[:1], strict=True):
            found = jax.device_get(run(*draw.arrays))
            broken = _broken_shape(found, router, num_experts, capacity)
            broken = broken or broken_rule(found, draw.mask_GS)
            if broken:
                return f"{broken}, {when}"
            for rule, changed_GS in _changes(draw.mask_GS, causal=own.causal):
                after = jax.device_get(run(*draw.where(changed_GS, other).arrays))
                if not _same(found, after, ~changed_GS, capacity):
                    return f"{rule}, {when}"
    return ""


def _changes(mask_GS: np.ndarray, *, causal: bool) -> list[tuple[str, np.ndarray]]:
    """Tokens that may be others without a difference to the rest, and the rule."""
    G, S = mask_GS.shape
    number_GS, place_GS = np.indices((G, S))
    rule = "what becomes of a group changes with another group"
    changes = [(rule, number_GS == g) for g in range(G)]
    rule = "what becomes of a token changes with what padding holds"
    changes.append((rule, ~mask_GS))
    rule = "it is not causal: what becomes of a token changes with later ones"
    places = sorted({1, S // 2, S - 1}) if causal else []
    return changes + [(f"{rule}, from place {t} on", place_GS >= t) for t in places]


def _draw(seed: int, S: int, num_experts: int) -> _Draw:
    """Logits that overfill experts (of the first, all are the same), and padding."""
    rng = np.random.default_rng(seed)
    logits_GSE = rng.normal(size=(_GROUPS, S, num_experts))
    logits_GSE += np.linspace(2, -2, num_experts)
    return _Draw(
        (logits_GSE * min(seed, 1)).astype(np.float32),
        rng.random((_GROUPS, S)) < 0.8,
        rng.integers(0, 100, (_GROUPS, S)).astype(np.int32),
    )


def _program(router: RouterSettings, capacity: int, *, train: bool) -> Any:
    """The router as the sparse layer calls it."""
    own = router.own
    assert own is not None

    def run(logits_GSE: jax.Array, mask_GS: jax.Array, token_GS: jax.Array) -> Any:
        if not own.reads_logits:
            logits_GSE = jnp.zeros_like(logits_GSE)
        keys_G = jax.random.split(jax.random.key(0), _GROUPS) if train else None
        context = RouterContext(mask_GS, keys_G, token_GS=token_GS)
        found = own.route(
            logits_GSE, context, router, capacity=capacity, **router.options
        )
        if not isinstance(found, Assignment):
            raise TypeError(f"it returned a {type(found).__name__}, not an Assignment")
        return found

    return run


def _broken_shape(
    found: Assignment, router: RouterSettings, num_experts: int, capacity: int
) -> str:
    G, S, J = _GROUPS, router.group_size, router.num_choices(num_experts)
    shapes = {
        "choice_of_slot_GEC": (G, num_experts, capacity),
        "slot_of_choice_GSJ": (G, S, J),
        "gate_GSJ": (G, S, J),
    }
    for name, shape in shapes.items():
        if getattr(found, name).shape != shape:
            return f"{name} is {getattr(found, name).shape}, not {shape}"
    return ""


def _same(one: Assignment, other: Assignment, of_GS: np.ndarray, capacity: int) -> bool:
    """Whether some tokens have the same experts, at the same gates."""
    found = []
    for assignment in (one, other):
        slot_NJ = assignment.slot_of_choice_GSJ[of_GS]
        gate_NJ = np.where(slot_NJ >= 0, assignment.gate_GSJ[of_GS], 0)
        expert_NJ = np.where(slot_NJ >= 0, slot_NJ // capacity, -1)
        found.append((expert_NJ, gate_NJ))
    (expert_NJ, gate_NJ), (other_expert_NJ, other_gate_NJ) = found
    return np.array_equal(expert_NJ, other_expert_NJ) and np.allclose(
        gate_NJ, other_gate_NJ, rtol=1e-5, atol=1e-6
    )
