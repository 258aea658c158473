"""Which transport carries the tokens of a pass, and how much room it has."""

import dataclasses
import importlib
from typing import Any

from moe.dispatch import auto
from moe.dispatch.room import Room, room_for
from moe.model.execution import Execution
from moe.settings import SparseSettings


def exchange_of(
    s: SparseSettings, execution: Execution, tokens: int, *, train: bool
) -> tuple[Any, str, Room]:
    """Returns the transport of a pass, its name, and the sizes of its exchange.

    Args:
        s: record of the layer.
        execution: the transport that was asked for, the row budget and the mesh.
        tokens: tokens that each device routes at once.
        train: whether capacity is that of training.
    """
    mesh = execution.mesh
    axis_size = mesh.shape["expert"]
    has_ragged = auto.mesh_has_ragged_exchange(mesh)
    name, _ = auto.transport_for(
        execution.settings.transport, s, axis_size, has_ragged, train=train
    )
    room = room_for(
        s.router,
        s.num_experts,
        tokens,
        axis_size,
        mesh.devices.flat[0].platform,
        row_budget=execution.settings.row_budget,
        train=train,
    )
    if name in auto.PADDED:  # the rectangle holds all that have a slot
        room = dataclasses.replace(room, num_rounds=1)
    return importlib.import_module(f"moe.dispatch.{name}"), name, room
