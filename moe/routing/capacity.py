"""The drop rule: how many slots an expert has, and so what finds none.

Standard library only.
"""

import math
from fractions import Fraction

from moe.settings import RouterSettings


def capacity(router: RouterSettings, num_experts: int, *, train: bool) -> int:
    """Returns C, slots per expert and group, in exact arithmetic.

    S·K·factor / E, rounded as the settings say, at least `min_capacity` and at most S.
    A float product can round up past the exact value, so the factor is taken as the
    decimal that the user wrote. A token chooses an expert at most once, so S slots can
    never overflow: that is what a factor of 0 asks for. Experts that choose always
    need a limit, so outside training they then keep that of training.
    """
    factor = router.capacity_factor if train else router.eval_capacity_factor
    if factor == 0 and router.family == "expert_choice":
        factor = router.capacity_factor
    if factor == 0:
        return router.group_size
    choices = router.num_selected if router.capacity_counts_choices else 1
    if router.family == "prototypes":
        choices *= router.num_prototypes
    exact = router.group_size * choices * Fraction(str(factor)) / num_experts
    rounded = {
        "ceil": math.ceil(exact),
        "floor": math.floor(exact),
        "half_even": round(exact),
    }
    slots = max(rounded[router.capacity_rounding], router.min_capacity)
    slots = -(-slots // router.capacity_multiple) * router.capacity_multiple
    return min(slots, router.group_size)


def never_drops(router: RouterSettings, num_experts: int, *, train: bool) -> bool:
    """Whether every choice finds a slot, however uneven they are."""
    return capacity(router, num_experts, train=train) == router.group_size


def mean_choices(router: RouterSettings, num_experts: int) -> Fraction:
    """Returns the experts that a token visits on average, if none is full."""
    if router.family == "expert_choice":
        slots = capacity(router, num_experts, train=True)
        return Fraction(slots * num_experts, router.group_size)
    return Fraction(router.num_choices(num_experts))
