"""Rules of groups of tokens and the slots that they compete for."""

from moe.routing.capacity import capacity
from moe.settings import ModelSettings, RouterSettings


def capacity_problems(
    model: ModelSettings, router: RouterSettings, length: int
) -> list[str]:
    """Groups that do not divide a sequence, and experts without a slot."""
    found = _group_problems(router, length)
    factors = (router.capacity_factor, router.eval_capacity_factor)
    sizes = (router.group_size, router.capacity_multiple, model.num_experts)
    if min(*factors, router.min_capacity) < 0 or min(sizes) < 1:
        return found  # problems of their own
    if router.family == "expert_choice" and router.capacity_factor == 0:
        found.append(
            "TRAIN_CAPACITY_FACTOR = 0 with ROUTER = 'expert_choice': experts that "
            "choose without a limit all take every token; 1.0 or 2.0 are usual"
        )
    for macro, train in (
        ("TRAIN_CAPACITY_FACTOR", True),
        ("EVAL_CAPACITY_FACTOR", False),
    ):
        if capacity(router, model.num_experts, train=train) < 1:
            found.append(
                f"{macro} leaves every expert without a slot: {router.group_size} "
                f"tokens per group over NUM_EXPERTS = {model.num_experts} round to 0; "
                "raise it, GROUP_SIZE or MIN_EXPERT_CAPACITY, or set CAPACITY_ROUNDING "
                "= 'ceil'"
            )
    return found


def _group_problems(router: RouterSettings, length: int) -> list[str]:
    """Groups take as many tokens of each of their rows, and cut rows evenly."""
    S, rows = router.group_size, router.group_rows
    if rows < 1:
        return []  # a problem of its own
    if S < 1 or S % rows or length % (S // rows):
        sizes = [d * rows for d in range(1, length + 1) if length % d == 0]
        below = [size for size in sizes if size < S][-1:]
        above = [size for size in sizes if size > S][:1]
        of_each = f", cut over GROUP_ROWS = {rows} rows," if rows > 1 else ""
        return [
            f"GROUP_SIZE = {S}{of_each} does not divide a sequence of {length} tokens: "
            f"nearest are {' and '.join(map(str, below + above))}"
        ]
    return []
