"""The contract between routers and transports: who sits in which slot.

An Assignment is two mutually inverse integer maps and the gates. Every movement of
tokens, forward and backward, is a gather through one map or the other.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """What a router saw, summed over the tokens of each group; real tokens only.

    Sums merge exactly over groups, devices and microbatches; `moe.training.losses`
    forms each loss from them once.

    Attributes:
        tokens_G: real tokens.
        probability_GE: router probabilities, the only sum with a gradient to the
            router through the balance loss.
        first_GE: tokens whose first choice was the expert.
        chosen_GE: choices made, before capacity.
        kept_GE: choices that received a slot.
        padding_G: choices that padding tokens would have made.
        z_G: squared log-sum-exp of the logits.
        entropy_G: entropy of the router's probabilities, in nats.
    """

    tokens_G: jax.Array
    probability_GE: jax.Array
    first_GE: jax.Array
    chosen_GE: jax.Array
    kept_GE: jax.Array
    padding_G: jax.Array
    z_G: jax.Array
    entropy_G: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
    """Tokens to slots and back, within each group.

    Choice number s·J + j is the j-th choice of token s; slot number e·C + c is the
    c-th slot of expert e. The two maps invert each other.

    Attributes:
        choice_of_slot_GEC: int32, the choice that fills a slot, or -1 if it is empty.
        slot_of_choice_GSJ: int32, the slot that a choice fills, or -1 if it has none.
        gate_GSJ: float32, the weight of that expert's output in the token's output.
        sums: what the losses and the ledger need.
    """

    choice_of_slot_GEC: jax.Array
    slot_of_choice_GSJ: jax.Array
    gate_GSJ: jax.Array
    sums: RouterSums


def fill_slots(
    expert_GSJ: jax.Array,
    active_GSJ: jax.Array,
    *,
    num_experts: int,
    capacity: int,
    slot_order: Literal["token_major", "choice_major"],
) -> tuple[jax.Array, jax.Array]:
    """Gives slots to choices in order of arrival until an expert is full.

    Cost does not grow with the number of experts: a stable sort by expert leaves each
    expert's choices side by side, in order.

    Args:
        expert_GSJ: int32, the expert of each choice.
        active_GSJ: bool, False for choices that want no slot.
        num_experts: E.
        capacity: C, slots per expert per group.
        slot_order: "token_major" walks token by token; "choice_major" all first
            choices, then all second choices.
    Returns:
        choice_of_slot_GEC and slot_of_choice_GSJ, as in `Assignment`.
    """
    J = expert_GSJ.shape[-1]

    def one_group(
        expert_SJ: jax.Array, active_SJ: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        number_SJ = jnp.arange(expert_SJ.size, dtype=jnp.int32).reshape(expert_SJ.shape)
        wanted_SJ = jnp.where(active_SJ, expert_SJ, num_experts)
        if slot_order == "choice_major":
            number_SJ, wanted_SJ = number_SJ.T, wanted_SJ.T
        number, wanted = number_SJ.reshape(-1), wanted_SJ.reshape(-1)

        arrival = jnp.argsort(wanted, stable=True).astype(jnp.int32)
        place = jnp.argsort(arrival).astype(jnp.int32)  # where each was sorted to
        size_E = jnp.sum(wanted[:, None] == jnp.arange(num_experts), axis=0)
        start_E = jnp.cumsum(size_E) - size_E

        slot = jnp.arange(capacity)
        source_EC = jnp.minimum(start_E[:, None] + slot, wanted.size - 1)
        filled_EC = slot < size_E[:, None]
        choice_of_slot_EC = jnp.where(filled_EC, number[arrival[source_EC]], -1)

        rank = place - jnp.append(start_E, 0)[wanted]
        seated = (wanted < num_experts) & (rank < capacity)
        slot_of_choice = jnp.where(seated, wanted * capacity + rank, -1)
        if slot_order == "choice_major":
            slot_of_choice = slot_of_choice.reshape(J, -1).T
        return choice_of_slot_EC, slot_of_choice.reshape(expert_SJ.shape)

    return jax.vmap(one_group)(expert_GSJ, active_GSJ)
