"""What every router was given and decided, token by token.

A router's sums already travel out of the scan over layers, group by group; here they
bring the logits and the slots along.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from moe.model import moe_layer, transformer
from moe.model.transformer import Model
from moe.routing.assignment import Assignment, RouterSums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToldSums(RouterSums):
    """Sums of each group, with what they were made of.

    Attributes:
        logits_GSE: of the router, noise included.
        slot_of_choice_GSJ: slot that each choice fills, -1 for none.
    """

    logits_GSE: jax.Array
    slot_of_choice_GSJ: jax.Array


def decide(
    model: Model, params: Any, batch: Any, row_B: jax.Array, key: jax.Array
) -> tuple[jax.Array, ToldSums | None]:
    """Runs a training step's forward pass and keeps what routers did.

    Returns:
        logits_BLV, and the sums of every layer and group, None in a dense model.
    """
    with _telling(model.router.family):
        return transformer.forward(model, params, batch, row_B, key)  # type: ignore[return-value]


@contextlib.contextmanager
def _telling(family: str) -> Iterator[None]:
    """Has a router tell, in all that is traced meanwhile."""
    route = moe_layer.ROUTERS[family]

    def telling(logits_GSE: jax.Array, *given: Any, **named: Any) -> Assignment:
        assignment = route(logits_GSE, *given, **named)
        told = ToldSums(
            **_fields(assignment.sums),
            logits_GSE=logits_GSE,
            slot_of_choice_GSJ=assignment.slot_of_choice_GSJ,
        )
        return dataclasses.replace(assignment, sums=told)

    moe_layer.ROUTERS[family] = telling
    try:
        yield
    finally:
        moe_layer.ROUTERS[family] = route


def _fields(sums: RouterSums) -> dict[str, Any]:
    return {field.name: getattr(sums, field.name) for field in dataclasses.fields(sums)}
