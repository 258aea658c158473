"""Which routers let a token depend on others of its group, shown on their decisions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model.sparse import route_of
from moe.routing.assignment import RouterContext
from moe.settings import RouterSettings

G, S, E, V = 3, 8, 8, 50
TOP1 = RouterSettings(group_size=S)
TOP2 = dataclasses.replace(TOP1, num_selected=2, renormalize="before_drop")
PAIRS = RouterSettings(
    family="prototypes", num_prototypes=2, num_selected=2, group_size=S
)
replace = dataclasses.replace


@functools.cache
def compiled(router: RouterSettings, capacity: int, *, train: bool = True):
    """Which choices are kept, and their gates, zero if they are not."""
    order_V = np.random.default_rng(0).permutation(V).astype(np.int32)

    @jax.jit
    def run(logits_GSE, mask_GS, token_GS):
        context = RouterContext(
            mask_GS=mask_GS,
            key_G=jax.random.split(jax.random.key(0), len(mask_GS)) if train else None,
            token_GS=token_GS,
            order_V=jnp.asarray(order_V),
            bias_E=jnp.linspace(-0.2, 0.2, logits_GSE.shape[-1])
            if router.selection_bias
            else None,
        )
        route = route_of(router)
        assignment = route(logits_GSE, context, router, capacity=capacity)
        slot_GSJ = assignment.slot_of_choice_GSJ
        expert_GSJ = jnp.where(slot_GSJ >= 0, slot_GSJ // capacity, -1)
        return expert_GSJ, jnp.where(slot_GSJ >= 0, assignment.gate_GSJ, 0.0)

    return run


def drawn(seed: int):
    """Skewed logits that overflow experts, some padding, and token ids."""
    rng = np.random.default_rng(seed)
    logits_GSE = rng.normal(size=(G, S, E)) + np.linspace(2, -2, E)
    mask_GS = rng.random((G, S)) < 0.8
    return [
        logits_GSE.astype(np.float32),
        mask_GS,
        rng.integers(0, V, (G, S)).astype(np.int32),
    ]


def mixed(theirs, mine, is_mine_S):
    """One draw where `is_mine_S`, another elsewhere."""
    keep = {2: is_mine_S[None], 3: is_mine_S[None, :, None]}
    pairs = zip(theirs, mine, strict=True)
    return [np.where(keep[own.ndim], own, other) for other, own in pairs]


CAUSAL = {
    # Slots run out, but a later token never takes an earlier one's.
    "switch": (TOP1, 1),
    "top1_choice_major": (replace(TOP1, slot_order="choice_major"), 1),
    "top2": (TOP2, 1),
    "top2_random_after_drop": (
        replace(TOP2, second_policy="random", renormalize="after_drop"),
        1,
    ),
    "deepseek_v3": (
        replace(
            TOP2,
            num_selected=3,
            scores="sigmoid",
            num_expert_groups=4,
            num_selected_groups=2,
            group_score="top2_sum",
            selection_bias=True,
        ),
        1,
    ),
    "prototypes": (PAIRS, 1),
    "hashed": (RouterSettings(family="hashed", num_selected=2, group_size=S), 1),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_what_comes_later_changes_nothing_before_it(name):
    router, capacity = CAUSAL[name]
    run = compiled(router, capacity)
    changed_later, dropped = 0, 0
    for seed in range(3):
        before, others = drawn(seed), drawn(100 + seed)
        expert_GSJ, gate_GSJ = jax.device_get(run(*before))
        dropped += np.sum(expert_GSJ[before[1]] < 0)
        for t in range(1, S):
            after = mixed(others, before, np.arange(S) < t)
            other_expert_GSJ, other_gate_GSJ = jax.device_get(run(*after))
            np.testing.assert_array_equal(other_expert_GSJ[:, :t], expert_GSJ[:, :t])
            np.testing.assert_array_equal(other_gate_GSJ[:, :t], gate_GSJ[:, :t])
            changed_later += np.sum(other_expert_GSJ[:, t:] != expert_GSJ[:, t:])
    assert dropped > 0, "slots are meant to run out"
    assert changed_later > 0


ALONE = {
    "switch": TOP1,
    "glam": replace(TOP2, slot_order="choice_major"),
    "batch_priority_after_drop": replace(
        TOP2, slot_order="batch_priority", renormalize="after_drop"
    ),
    "spill": replace(TOP2, overflow="spill"),
    "prototypes": replace(PAIRS, slot_order="choice_major"),
    "hashed": replace(CAUSAL["hashed"][0], slot_order="choice_major"),
}


@pytest.mark.parametrize("name", ALONE)
def test_where_nothing_drops_a_token_depends_on_itself_alone(name):
    run = compiled(ALONE[name], S)
    own, others = drawn(0), drawn(100)
    expert_GSJ, gate_GSJ = jax.device_get(run(*own))
    assert np.all(expert_GSJ[own[1]] >= 0), "nothing is meant to drop"
    for t in range(S):
        mixture = mixed(others, own, np.arange(S) == t)
        other_expert_GSJ, other_gate_GSJ = jax.device_get(run(*mixture))
        np.testing.assert_array_equal(other_expert_GSJ[:, t], expert_GSJ[:, t])
        np.testing.assert_array_equal(other_gate_GSJ[:, t], gate_GSJ[:, t])


def test_outside_training_sinkhorn_depends_on_the_token_alone():
    run = compiled(RouterSettings(family="sinkhorn", group_size=S), S, train=False)
    own, others = drawn(0), drawn(100)
    expert_GSJ, _ = run(*own)
    for t in range(S):
        other_expert_GSJ, _ = run(*mixed(others, own, np.arange(S) == t))
        np.testing.assert_array_equal(other_expert_GSJ[:, t], expert_GSJ[:, t])


# Small cases in which the last token alone is changed, and the first one's experts are
# not what they were: (router, slots per expert, logits of all but the last token, its
# logits before and after, experts of the first token before and after).
LEAKS = {
    # Expert 0 takes one token. The last one wants it more, and then expert 1 takes
    # token 0, which is the better of the two for it.
    "expert_choice": (
        RouterSettings(family="expert_choice"),
        1,
        [[1.0, 0.0]],
        ([0.0, 1.0], [2.0, 0.0]),
        ([0, -1], [1, -1]),
    ),
    # Each expert must get half of the mass; the last one's moves from 1 to 0.
    "sinkhorn": (
        RouterSettings(family="sinkhorn"),
        2,
        [[1.0, 0.0]],
        ([0.0, 1.0], [3.0, 0.0]),
        ([0], [1]),
    ),
    # The surest token is seated first.
    "batch_priority": (
        RouterSettings(slot_order="batch_priority"),
        1,
        [[1.0, 0.0]],
        ([0.0, 1.0], [2.0, 0.0]),
        ([0], [-1]),
    ),
    # Token 0 finds its second choice taken, as first choices of all come before it.
    "choice_major": (
        RouterSettings(num_selected=2, slot_order="choice_major"),
        1,
        [[2.0, 1.0, 0.0]],
        ([2.0, 1.0, 0.0], [0.0, 2.0, 1.0]),
        ([0, 1], [0, -1]),
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", LEAKS)
def test_a_later_token_changes_an_earlier_ones_experts(name):
    router, capacity, first, (before, after), experts = LEAKS[name]
    run = compiled(replace(router, group_size=2), capacity)
    found = []
    for last in (before, after):
        logits_GSE = np.array([[*first, last]], np.float32)
        expert_GSJ, gate_GSJ = run(
            logits_GSE, np.ones((1, 2), bool), np.zeros((1, 2), np.int32)
        )
        found.append((list(expert_GSJ[0, 0]), gate_GSJ[0, 0]))
    assert [expert_J for expert_J, _ in found] == list(experts)
    assert np.any(found[0][1] != found[1][1]), "its gates change too"


def test_a_later_token_takes_the_slot_to_which_an_earlier_one_would_spill():
    # Tokens 0 and 1 want expert 0, which has one slot; token 1 spills to expert 1,
    # unless token 2 wants that first.
    run = compiled(RouterSettings(overflow="spill", group_size=3), 1)
    wants_0 = [2.0, 1.0, 0.0]
    for last, expected in (([0.0, 1.0, 2.0], 1), ([0.0, 2.0, 1.0], -1)):
        logits_GSE = np.array([[wants_0, wants_0, last]], np.float32)
        expert_GSJ, gate_GSJ = run(
            logits_GSE, np.ones((1, 3), bool), np.zeros((1, 3), np.int32)
        )
        assert expert_GSJ[0, 1, 0] == expected
        assert (gate_GSJ[0, 1, 0] > 0) == (expected >= 0)
