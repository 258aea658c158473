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
    """Asserts what every router must keep to; see `broken_rule`."""
    broken = broken_rule(assignment, mask_GS)
    assert not broken, broken


def broken_rule(assignment: Assignment, mask_GS: np.ndarray) -> str:
    """Returns the first rule of an Assignment that is broken; "" if none is.

    The two maps invert each other, slots are filled from the first on, a token holds
    at most one slot of an expert, padding holds none, gates are finite and not
    negative, and the ledger closes in every group.
    """
    choice_of_slot = np.asarray(assignment.choice_of_slot_GEC)
    slot_of_choice = np.asarray(assignment.slot_of_choice_GSJ)
    gates = np.asarray(assignment.gate_GSJ)
    if not choice_of_slot.dtype == slot_of_choice.dtype == np.int32:
        return "the maps are not int32"
    if gates.dtype != np.float32:
        return f"gates are {gates.dtype}, not float32"
    if not np.all(np.isfinite(gates)):
        return "a gate is not finite"
    if not np.all(gates >= 0):
        return "a gate is negative"
    for g in range(len(choice_of_slot)):
        if broken := _broken_in_group(choice_of_slot[g], slot_of_choice[g], mask_GS[g]):
            return f"{broken} in group {g}"
    filled = choice_of_slot >= 0
    if not np.all(filled[..., 1:] <= filled[..., :-1]):
        return "a slot is filled after an empty one"
    return _broken_sum(assignment, filled, mask_GS)


def _broken_in_group(
    choice_of_slot: np.ndarray, slot_of_choice: np.ndarray, mask_S: np.ndarray
) -> str:
    """What the two maps of one group break."""
    C, J = choice_of_slot.shape[-1], slot_of_choice.shape[-1]
    seated = {
        (choice, slot)
        for slot, choice in enumerate(choice_of_slot.reshape(-1))
        if choice >= 0
    }
    held = {
        (choice, slot)
        for choice, slot in enumerate(slot_of_choice.reshape(-1))
        if slot >= 0
    }
    if seated != held:
        return "the two maps do not invert each other"
    if np.any(slot_of_choice[~mask_S] != -1):
        return "padding holds a slot"
    experts_of_tokens = [(choice // J, slot // C) for choice, slot in seated]
    if len(experts_of_tokens) != len(set(experts_of_tokens)):
        return "a token holds two slots of one expert"
    return ""


def _broken_sum(
    assignment: Assignment, filled_GEC: np.ndarray, mask_GS: np.ndarray
) -> str:
    """What the sums break."""
    sums = jax.tree.map(np.asarray, assignment.sums)
    C, J = filled_GEC.shape[-1], assignment.slot_of_choice_GSJ.shape[-1]
    first_try_GE = sums.kept_GE - sums.spilled_GE
    rules = {
        "kept_GE counts filled slots": sums.kept_GE == filled_GEC.sum(axis=2),
        "spilled_GE is a part of kept_GE": sums.spilled_GE <= sums.kept_GE,
        "what an expert keeps of its choices is among chosen_GE, and fits its slots": (
            first_try_GE <= np.minimum(sums.chosen_GE, C)
        ),
        "no more is kept than was chosen": (
            sums.kept_GE.sum(axis=1) <= sums.chosen_GE.sum(axis=1)
        ),
        "a token chooses an expert once": sums.chosen_GE <= sums.tokens_G[:, None],
        "tokens_G counts real tokens": sums.tokens_G == mask_GS.sum(axis=1),
        "padding_G counts J choices of each padding token": (
            sums.padding_G == J * (~mask_GS).sum(axis=1)
        ),
    }
    for rule, holds in rules.items():
        if not np.all(holds):
            return f"not true of its sums: {rule}"
    return ""
