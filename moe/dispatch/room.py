"""How many rows the experts of a device have room for."""

import dataclasses

from moe.routing.capacity import capacity
from moe.settings import RouterSettings


@dataclasses.dataclass(frozen=True)
class Room:
    """Static sizes of the exchange of one sparse layer.

    Attributes:
        axis_size: size of the mesh axis `expert`.
        num_rows: R, rows that reach the experts of a device in one round, for
            transports whose rows are not a rectangle.
        num_rounds: rounds in which even the worst assignment passes.
        platform: kind of the mesh's devices: "cpu", "gpu" or "tpu".
    """

    axis_size: int
    num_rows: int
    num_rounds: int
    platform: str


def room_for(
    router: RouterSettings,
    num_experts: int,
    tokens: int,
    axis_size: int,
    platform: str,
    *,
    row_budget: float,
    train: bool,
) -> Room:
    """Sizes the exchange.

    Where capacity bounds the rows of an expert, all of them fit. Where nothing drops,
    a device has room for `row_budget` times an even share, and what a step sends
    beyond it is computed in further rounds.

    Args:
        router: capacity.
        num_experts: E.
        tokens: on each device.
        axis_size: size of the mesh axis `expert`.
        platform: kind of the mesh's devices.
        row_budget: room for rows over an even share, where nothing drops.
        train: whether capacity is that of training.
    """
    slots = capacity(router, num_experts, train=train)
    local = num_experts // axis_size
    choices = router.num_choices(num_experts)
    groups = tokens // router.group_size
    worst = axis_size * min(tokens * min(choices, local), groups * local * slots)
    if slots < router.group_size or axis_size == 1:
        return Room(axis_size, worst, 1, platform)
    share = row_budget * tokens * choices
    rows = min(-(-int(share) // 8) * 8, worst)
    return Room(axis_size, rows, -(-worst // rows), platform)
