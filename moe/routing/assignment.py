"""The contract between routers and transports: who sits in which slot.

An Assignment is two mutually inverse integer maps and the gates. Every movement of
tokens, forward and backward, is a gather through one map or the other.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.settings import RouterSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterContext:
    """What a router may need beside the logits.

    Attributes:
        mask_GS: bool, True for real tokens.
        key_G: one key per group, derived from its global index; None outside
            training, where nothing is drawn.
        bias_E: float32, added to the scores for selection alone; None without.
        clean_logits_GSE: the logits before noise; None where there is no noise.
        token_GS: int32, ids of the tokens.
        order_V: int32, this layer's random order of the vocabulary; hash routing only.
    """

    mask_GS: jax.Array
    key_G: jax.Array | None = None
    bias_E: jax.Array | None = None
    clean_logits_GSE: jax.Array | None = None
    token_GS: jax.Array | None = None
    order_V: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """What a router saw, summed over the tokens of each group; real tokens only.

    Sums merge exactly over groups, devices and microbatches; `moe.training.losses`
    forms each loss from them once. Of groups of several rows (`group_rows`) there are
    sums for each row: in the names below G then counts groups times rows, those of a
    group side by side, as losses of single sequences need them.

    Attributes:
        tokens_G: real tokens.
        probability_GE: router probabilities, the only sum with a gradient to the
            router through the balance loss.
        load_GE: chances of being chosen once more if the noise were drawn again
            (arXiv:2106.05974, eq. 9); zero without noise.
        first_GE: tokens whose first choice was the expert.
        chosen_GE: choices made, before capacity.
        kept_GE: choices that received a slot.
        spilled_GE: choices of `kept_GE` that received theirs at a second attempt.
        padding_G: choices that padding tokens would have made.
        z_G: squared log-sum-exp of the logits.
        entropy_G: entropy of the router's probabilities, in nats.
        square_G: mean squared logit.
        without_expert_G: tokens that no expert computed: only the residual passes.
        excess_G: rows beyond the budget of this group's device, counted in the first
            of the device's sums; filled in by the layer.
        needed_1EH: tokens of all groups by the bias that they would need for each
            expert; see `moe.routing.needed_bias`. None unless biases are its quantiles.
        trace: what each router was given and decided; None unless it was asked for.
    """

    tokens_G: jax.Array
    probability_GE: jax.Array
    load_GE: jax.Array
    first_GE: jax.Array
    chosen_GE: jax.Array
    kept_GE: jax.Array
    spilled_GE: jax.Array
    padding_G: jax.Array
    z_G: jax.Array
    entropy_G: jax.Array
    square_G: jax.Array
    without_expert_G: jax.Array
    excess_G: jax.Array
    needed_1EH: jax.Array | None = None
    trace: "Trace | None" = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What a router was given and decided, token by token.

    Attributes:
        logits_GSE: float32, noise included.
        slot_of_choice_GSJ: slot of each choice, as in `Assignment`.
    """

    logits_GSE: jax.Array
    slot_of_choice_GSJ: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
    """Tokens to slots and back, within each group.

    Choice number s·J + j is the j-th choice of token s; slot number e·C + c is the
    c-th slot of expert e. The two maps invert each other. The slots of an expert are
    filled from the first on, without gaps.

    Attributes:
        choice_of_slot_GEC: int32, the choice that fills a slot, or -1 if it is empty.
        slot_of_choice_GSJ: int32, the slot that a choice fills, or -1 if it has none.
        gate_GSJ: float32, the weight of that expert's output in the token's output.
        sums: what the losses and the ledger need.
        trace: the logits it was made of, for whoever compares decisions.
    """

    choice_of_slot_GEC: jax.Array
    slot_of_choice_GSJ: jax.Array
    gate_GSJ: jax.Array
    sums: RouterSums
    trace: "Trace | None" = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """What a router decided, before slots are given out.

    Attributes:
        expert_GSJ: int32, the expert of each choice.
        active_GSJ: bool, False for choices that want no slot, such as padding's.
        first_GSJ: bool, choices that count as first ones.
        gate_GSJ: float32.
        probability_GSE: float32, what balance losses even out; 0 where there is none.
        load_GSE: as in `RouterSums`, per token; None without noise.
        spill_GSJ: int32 experts and float32 gates of where each choice goes if its
            expert is full; None to drop.
        priority_GS: float32, tokens with more are seated first; None for their order.
        needed_1EH: counts of tokens by the bias that they need, as in `RouterSums`.
    """

    expert_GSJ: jax.Array
    active_GSJ: jax.Array
    first_GSJ: jax.Array
    gate_GSJ: jax.Array
    probability_GSE: jax.Array
    load_GSE: jax.Array | None = None
    spill_GSJ: tuple[jax.Array, jax.Array] | None = None
    priority_GS: jax.Array | None = None
    needed_1EH: jax.Array | None = None


def assign(
    choices: Choices,
    logits_GSE: jax.Array | None,
    mask_GS: jax.Array,
    settings: RouterSettings,
    *,
    capacity: int,
) -> Assignment:
    """Gives out the slots, settles the gates, and adds up what happened.

    A choice that finds its expert full is dropped: its gate multiplies nothing and
    only the residual passes.

    Args:
        choices: a router's decisions.
        logits_GSE: float32; with several softmaxes one dimension more, [G, S, Z, E/Z];
            None for a router that has none.
        mask_GS: bool, True for real tokens.
        settings: slot order, renormalisation after dropping, gate scale.
        capacity: C, slots per expert per group.
    """
    E, J = choices.probability_GSE.shape[-1], choices.expert_GSJ.shape[-1]
    fill = jax.vmap(
        lambda *arrays: _fill_group(
            *arrays, num_experts=E, capacity=capacity, order=settings.slot_order
        )
    )
    choice_of_slot_GEC, slot_of_choice_GSJ = fill(
        choices.expert_GSJ, choices.active_GSJ, choices.priority_GS, None
    )
    second_GEC = jnp.full_like(choice_of_slot_GEC, -1)
    gate_GSJ = choices.gate_GSJ
    if choices.spill_GSJ is not None:
        next_GSJ, next_gate_GSJ = choices.spill_GSJ
        homeless_GSJ = choices.active_GSJ & (slot_of_choice_GSJ < 0)
        taken_GE = jnp.sum(choice_of_slot_GEC >= 0, axis=-1, dtype=jnp.int32)
        second_GEC, second_GSJ = fill(
            next_GSJ, homeless_GSJ, choices.priority_GS, taken_GE
        )
        choice_of_slot_GEC = jnp.maximum(choice_of_slot_GEC, second_GEC)
        slot_of_choice_GSJ = jnp.maximum(slot_of_choice_GSJ, second_GSJ)
        gate_GSJ = jnp.where(second_GSJ >= 0, next_gate_GSJ, gate_GSJ)
    if settings.renormalize == "after_drop":
        kept_gate_GSJ = jnp.where(slot_of_choice_GSJ >= 0, gate_GSJ, 0.0)
        gate_GSJ = over_sum(gate_GSJ, kept_gate_GSJ)

    def by_row(x_GS: jax.Array) -> jax.Array:
        """Each row's tokens of a group for themselves, as `RouterSums` counts them."""
        rows = settings.group_rows
        G, S, *rest = x_GS.shape
        return x_GS.reshape(G * rows, S // rows, *rest)

    def filled(choice_of_slot_GEC: jax.Array) -> jax.Array:
        rows = settings.group_rows
        row_GEC = choice_of_slot_GEC // (mask_GS.shape[1] // rows * J)  # -1 // n is -1
        is_row_GErC = row_GEC[:, :, None] == jnp.arange(rows)[:, None]
        count_GEr = jnp.sum(is_row_GErC, axis=-1, dtype=jnp.int32)
        return count_GEr.swapaxes(1, 2).reshape(-1, E)

    def count(flag_GSJ: jax.Array) -> jax.Array:
        is_expert_GSJE = choices.expert_GSJ[..., None] == jnp.arange(E)
        counted = is_expert_GSJE & (flag_GSJ & choices.active_GSJ)[..., None]
        return jnp.sum(by_row(counted), axis=(1, 2), dtype=jnp.int32)

    def over_tokens(x_GS: jax.Array) -> jax.Array:
        mask = mask_GS.reshape(*mask_GS.shape, *(1,) * (x_GS.ndim - 2))
        return jnp.sum(by_row(jnp.where(mask, x_GS, 0.0)), axis=1)

    def how_many(flag_GS: jax.Array) -> jax.Array:
        return jnp.sum(by_row(flag_GS), axis=1, dtype=jnp.int32)

    probability_GE = over_tokens(choices.probability_GSE)
    tokens_G = how_many(mask_GS)
    zero_G = jnp.zeros(tokens_G.shape)
    log_p_GSE = jnp.log(jnp.maximum(choices.probability_GSE, 1e-30))
    return Assignment(
        choice_of_slot_GEC=choice_of_slot_GEC,
        slot_of_choice_GSJ=slot_of_choice_GSJ,
        gate_GSJ=gate_GSJ * settings.gate_scale,
        sums=RouterSums(
            tokens_G=tokens_G,
            probability_GE=probability_GE,
            load_GE=jnp.zeros_like(probability_GE)
            if choices.load_GSE is None
            else over_tokens(choices.load_GSE),
            first_GE=count(choices.first_GSJ),
            chosen_GE=count(jnp.ones_like(choices.active_GSJ)),
            kept_GE=filled(choice_of_slot_GEC),
            spilled_GE=filled(second_GEC),
            padding_G=J * how_many(~mask_GS),
            z_G=zero_G if logits_GSE is None else over_tokens(_z(logits_GSE)),
            entropy_G=over_tokens(-jnp.sum(choices.probability_GSE * log_p_GSE, -1)),
            square_G=zero_G
            if logits_GSE is None
            else over_tokens(_mean_square(jax.lax.stop_gradient(logits_GSE))),
            without_expert_G=how_many(mask_GS & jnp.all(slot_of_choice_GSJ < 0, -1)),
            excess_G=jnp.zeros(tokens_G.shape, jnp.int32),
            needed_1EH=choices.needed_1EH,
        ),
    )


def _z(logits_GSE: jax.Array) -> jax.Array:
    """Squared log-sum-exp of each token, averaged over its softmaxes."""
    z = jax.nn.logsumexp(logits_GSE, axis=-1) ** 2
    return z if z.ndim == 2 else jnp.mean(z, axis=2)


def _mean_square(logits_GSE: jax.Array) -> jax.Array:
    return jnp.mean(logits_GSE**2, axis=tuple(range(2, logits_GSE.ndim)))


def renormalized(gate_GSJ: jax.Array) -> jax.Array:
    """Divides the gates of each token by their sum."""
    return over_sum(gate_GSJ, gate_GSJ)


def over_sum(gate_GSJ: jax.Array, summed_GSJ: jax.Array) -> jax.Array:
    """Divides the gates of each token by the sum of others.

    Sigmoid scores can all be 0, so the sum is bounded; the gradient divides by its
    square, which must not be 0 either.
    """
    return gate_GSJ / jnp.maximum(jnp.sum(summed_GSJ, axis=-1, keepdims=True), 1e-18)


def _fill_group(
    expert_SJ: jax.Array,
    active_SJ: jax.Array,
    priority_S: jax.Array | None,
    taken_E: jax.Array | None,
    *,
    num_experts: int,
    capacity: int,
    order: str,
) -> tuple[jax.Array, jax.Array]:
    """Gives the slots of one group to choices in order of arrival.

    A stable sort by expert leaves each expert's choices side by side, in order.

    Args:
        expert_SJ: int32, the expert of each choice.
        active_SJ: bool, False for choices that want no slot.
        priority_S: the tokens' priorities; None for the order of their positions.
        taken_E: int32, slots of each expert that are taken already; None for none.
        num_experts: E.
        capacity: C.
        order: "token_major" walks token by token; any other choice by choice.
    Returns:
        choice_of_slot_EC and slot_of_choice_SJ, as in `Assignment`.
    """
    number_SJ = jnp.arange(expert_SJ.size, dtype=jnp.int32).reshape(expert_SJ.shape)
    wanted_SJ = jnp.where(active_SJ, expert_SJ, num_experts)
    if priority_S is not None:
        queue_S = jnp.argsort(-priority_S, stable=True)
        number_SJ, wanted_SJ = number_SJ[queue_S], wanted_SJ[queue_S]
    if order != "token_major":
        number_SJ, wanted_SJ = number_SJ.T, wanted_SJ.T
    number, wanted = number_SJ.reshape(-1), wanted_SJ.reshape(-1)

    arrival = jnp.argsort(wanted, stable=True).astype(jnp.int32)
    place = jnp.argsort(arrival).astype(jnp.int32)  # where each was sorted to
    queue = wanted[arrival]
    start_E = jnp.searchsorted(queue, jnp.arange(num_experts), side="left")
    size_E = jnp.searchsorted(queue, jnp.arange(num_experts), side="right") - start_E
    first_E = jnp.zeros_like(size_E) if taken_E is None else taken_E

    rank_EC = jnp.arange(capacity) - first_E[:, None]
    source_EC = jnp.clip(start_E[:, None] + rank_EC, 0, wanted.size - 1)
    filled_EC = (rank_EC >= 0) & (rank_EC < size_E[:, None])
    choice_of_slot_EC = jnp.where(filled_EC, number[arrival[source_EC]], -1)

    shift_E = first_E - start_E
    slot = place + jnp.append(shift_E, 0)[wanted]
    seated = (wanted < num_experts) & (slot < capacity)
    slot_of_choice = jnp.where(seated, wanted * capacity + slot, -1)
    if order == "token_major" and priority_S is None:
        return choice_of_slot_EC, slot_of_choice.reshape(expert_SJ.shape)
    return choice_of_slot_EC, slot_of_choice[jnp.argsort(number)].reshape(
        expert_SJ.shape
    )
