"""How many choices a router without preferences drops, by chance alone.

Standard library only.
"""

import dataclasses
import math

from moe.routing.capacity import capacity, never_drops
from moe.settings import RouterSettings

# With fewer slots per expert and group chance drops much, however even the router: at a
# capacity factor of 1.25 and 32 slots 1 %, at 8 slots 7 %, at 4 slots 12 %, at 2 20 %.
FEW_SLOTS = 8


def expected_drops(
    num_tokens: int, num_experts: int, num_choices: int, slots: int
) -> float:
    """Returns the expected fraction of choices that find their expert full.

    Each of S tokens is at an expert with the chance p = K / E, whatever the others do:
    its arrivals are binomial, and those above C are dropped, a fraction of
    Σ_{a > C} (a - C)·P(a) / (S·p). A trained router, with its preferences, drops more;
    one whose loads are balanced in every group, less. For many experts this is the
    Poisson law of mean S·K / E.

    Args:
        num_tokens: S, tokens that compete for the same slots.
        num_experts: E.
        num_choices: K, experts that each token visits; all prototypes' together.
        slots: C, slots of one expert for these tokens.
    Raises:
        ValueError: a token cannot choose so many experts.
    """
    S, E, K, C = num_tokens, num_experts, num_choices, slots
    if not (S >= 1 and 1 <= K <= E and C >= 0):
        raise ValueError(
            f"{S} tokens, {E} experts, {K} choices, {C} slots: there must be a token, "
            "between 1 and all experts for it, and no fewer than 0 slots"
        )
    if C >= S:
        return 0.0
    if K == E:
        return 1 - C / S  # everyone is everywhere
    p = K / E
    log_odds, log_nobody = math.log(p) - math.log1p(-p), S * math.log1p(-p)

    def probability(arrivals: int) -> float:
        log_ways = (
            math.lgamma(S + 1)
            - math.lgamma(arrivals + 1)
            - math.lgamma(S - arrivals + 1)
        )
        return math.exp(log_ways + arrivals * log_odds + log_nobody)

    homeless = math.fsum((a - C) * probability(a) for a in range(C + 1, S + 1))
    return min(homeless / (S * p), 1.0)


def of_router(router: RouterSettings, num_experts: int) -> float | None:
    """Returns `expected_drops` in training, or None where no such law holds.

    None for experts that choose, balanced assignments and hashed tokens, whose loads
    are not chance's; and where a choice may be taken back or made again.
    """
    plain = router.overflow == "drop" and router.second_policy == "all"
    if not plain or router.family not in ("token_choice", "prototypes"):
        return None
    return expected_drops(
        router.group_size,
        num_experts,
        router.num_choices(num_experts),
        capacity(router, num_experts, train=True),
    )


def few_slots(router: RouterSettings, num_experts: int) -> str:
    """Warns of so few slots per expert and group that chance drops much; else ""."""
    S, factor = router.group_size, router.capacity_factor
    slots = capacity(router, num_experts, train=True)
    roomy = slots >= FEW_SLOTS or never_drops(router, num_experts, train=True)
    if roomy or router.family == "expert_choice":  # whose experts are always full
        return ""
    wider = router
    while capacity(wider, num_experts, train=True) < FEW_SLOTS:
        wider = dataclasses.replace(wider, group_size=2 * wider.group_size)
    return (
        f"{slots} per expert and group, so that chance alone overfills some experts "
        f"and leaves others empty: {FEW_SLOTS} or more would take GROUP_SIZE = "
        f"{wider.group_size} instead of {S} (over several rows: GROUP_ROWS), fewer "
        f"NUM_EXPERTS than {num_experts}, or a larger TRAIN_CAPACITY_FACTOR than "
        f"{factor:g}; "
        "TRAIN_CAPACITY_FACTOR = 0 drops nothing"
    )
