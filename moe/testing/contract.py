"""Meshes to try, and what every Assignment must keep to."""

from collections.abc import Mapping

import jax
import numpy as np

from moe.routing.assignment import Assignment
from partitioning.settings import MeshSettings

MESHES: Mapping[str, MeshSettings] = {
    "d1": MeshSettings(),
    "d8": MeshSettings(data=8),
    "e8": MeshSettings(expert=8),
    "d2e4": MeshSettings(data=2, expert=4),
    "d4e2": MeshSettings(data=4, expert=2),
    "r2d2e2": MeshSettings(replica=2, data=2, expert=2),
    # Those that cut sequences: S must divide L / (context · model).
    "c2e4": MeshSettings(context=2, expert=4),
    "d2e2m2": MeshSettings(data=2, expert=2, model=2),
    "c2e2m2": MeshSettings(context=2, expert=2, model=2),
    "d2m4": MeshSettings(data=2, model=4),
}


def check_assignment(assignment: Assignment, mask_GS: np.ndarray) -> None:
    """Asserts what every router must keep to.

    The two maps invert each other, slots are filled from the first on, a token holds
    at most one slot of an expert, padding holds none, gates are finite and not
    negative, and the ledger closes in every group.
    """
    choice_of_slot = np.asarray(assignment.choice_of_slot_GEC)
    slot_of_choice = np.asarray(assignment.slot_of_choice_GSJ)
    gates = np.asarray(assignment.gate_GSJ)
    G, _, C = choice_of_slot.shape
    J = slot_of_choice.shape[-1]
    assert choice_of_slot.dtype == slot_of_choice.dtype == np.int32
    assert gates.dtype == np.float32
    assert np.all(np.isfinite(gates)), "a gate is not finite"
    assert np.all(gates >= 0), "a gate is negative"
    for g in range(G):
        from_slots = {
            (choice, slot)
            for slot, choice in enumerate(choice_of_slot[g].reshape(-1))
            if choice >= 0
        }
        from_choices = {
            (choice, slot)
            for choice, slot in enumerate(slot_of_choice[g].reshape(-1))
            if slot >= 0
        }
        assert from_slots == from_choices, f"the maps of group {g} do not invert"
        assert np.all(slot_of_choice[g][~mask_GS[g]] == -1), "padding holds a slot"
        experts_of_tokens = [(choice // J, slot // C) for choice, slot in from_slots]
        assert len(experts_of_tokens) == len(set(experts_of_tokens)), (
            f"a token of group {g} holds two slots of one expert"
        )
    filled = choice_of_slot >= 0
    assert np.all(filled[..., 1:] <= filled[..., :-1]), "a gap before a filled slot"

    sums = jax.tree.map(np.asarray, assignment.sums)
    np.testing.assert_array_equal(sums.kept_GE, filled.sum(axis=2), "kept_GE")
    assert np.all(sums.spilled_GE <= sums.kept_GE)
    assert np.all(sums.kept_GE - sums.spilled_GE <= np.minimum(sums.chosen_GE, C))
    assert np.all(sums.kept_GE.sum(axis=1) <= sums.chosen_GE.sum(axis=1))
    assert np.all(sums.chosen_GE <= sums.tokens_G[:, None])
    np.testing.assert_array_equal(sums.tokens_G, mask_GS.sum(axis=1))
    np.testing.assert_array_equal(sums.padding_G, J * (~mask_GS).sum(axis=1))
