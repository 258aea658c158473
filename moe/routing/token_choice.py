"""Token choice: every token picks its K most probable experts.

K = 1 is the Switch Transformer (arXiv:2101.03961, section 2.1), K = 2 with
renormalised gates GShard and GLaM (arXiv:2006.16668, Algorithm 1; arXiv:2112.06905,
section 4).
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.routing.assignment import Assignment, RouterSums, fill_slots
from moe.settings import RouterSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterContext:
    """What a router may need beside the logits.

    Attributes:
        mask_GS: bool, True for real tokens.
        key_G: one key per group, derived from its global index; None outside
            training, where nothing is drawn.
    """

    mask_GS: jax.Array
    key_G: jax.Array | None


def route(
    logits_GSE: jax.Array,
    context: RouterContext,
    settings: RouterSettings,
    *,
    capacity: int,
) -> Assignment:
    """Assigns every real token to its K most probable experts, as capacity allows.

    A choice that finds its expert full is dropped: its gate multiplies nothing and
    only the residual passes. Gates are renormalised before anything is dropped. Equal
    probabilities go to the expert with the lower index.

    Args:
        logits_GSE: float32, unnormalised; padding tokens may hold anything finite.
        context: mask and keys.
        settings: K, renormalisation, slot order, second-expert policy.
        capacity: C, slots per expert per group.
    Returns:
        An Assignment with J = K. Gradients reach the logits through the gates and
        through the probability, z and entropy sums.
    """
    G, S, E = logits_GSE.shape
    K = settings.num_selected
    mask_GS = context.mask_GS
    log_prob_GSE = jax.nn.log_softmax(logits_GSE)
    prob_GSE = jnp.exp(log_prob_GSE)

    _, expert_GSK = jax.lax.top_k(jax.lax.stop_gradient(prob_GSE), K)
    chosen_GSKE = expert_GSK[..., None] == jnp.arange(E)
    gate_GSK = jnp.sum(jnp.where(chosen_GSKE, prob_GSE[:, :, None, :], 0.0), axis=-1)
    if settings.renormalize:
        gate_GSK = gate_GSK / jnp.sum(gate_GSK, axis=-1, keepdims=True)

    active_GSK = jnp.broadcast_to(mask_GS[..., None], (G, S, K))
    if settings.second_policy == "random" and context.key_G is not None:
        draw_GS = jax.vmap(lambda key: jax.random.uniform(key, (S,)))(context.key_G)
        keeps_GS = draw_GS < 2.0 * gate_GSK[..., 1]
        active_GSK = active_GSK.at[..., 1].set(active_GSK[..., 1] & keeps_GS)

    choice_of_slot_GEC, slot_of_choice_GSK = fill_slots(
        expert_GSK,
        active_GSK,
        num_experts=E,
        capacity=capacity,
        slot_order=settings.slot_order,
    )
    kept_GSK = slot_of_choice_GSK >= 0
    z_GS = jax.nn.logsumexp(logits_GSE, axis=-1) ** 2
    entropy_GS = -jnp.sum(prob_GSE * log_prob_GSE, axis=-1)
    first_GSE = chosen_GSKE[:, :, 0] & mask_GS[..., None]

    def count(flags_GSKE: jax.Array) -> jax.Array:
        return jnp.sum(flags_GSKE, axis=(1, 2), dtype=jnp.int32)

    return Assignment(
        choice_of_slot_GEC=choice_of_slot_GEC,
        slot_of_choice_GSJ=slot_of_choice_GSK,
        gate_GSJ=gate_GSK,
        sums=RouterSums(
            tokens_G=jnp.sum(mask_GS, axis=1, dtype=jnp.int32),
            probability_GE=jnp.sum(
                jnp.where(mask_GS[..., None], prob_GSE, 0.0), axis=1
            ),
            first_GE=jnp.sum(first_GSE, axis=1, dtype=jnp.int32),
            chosen_GE=count(chosen_GSKE & active_GSK[..., None]),
            kept_GE=count(chosen_GSKE & kept_GSK[..., None]),
            padding_G=K * jnp.sum(~mask_GS, axis=1, dtype=jnp.int32),
            z_G=jnp.sum(jnp.where(mask_GS, z_GS, 0.0), axis=1),
            entropy_G=jnp.sum(jnp.where(mask_GS, entropy_GS, 0.0), axis=1),
        ),
    )
