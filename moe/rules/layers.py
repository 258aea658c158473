"""Rules of the number of layers, and of which are sparse. Standard library only."""

from moe import architecture
from moe.settings import ModelSettings, RouterSettings


def layer_problems(model: ModelSettings) -> list[str]:
    """Lists what is wrong with the number of layers, and with which are sparse."""
    found = []
    for name, side in architecture.sides(model).items():
        own = "ENCODER_" if name != model.shape and name == "encoder" else ""
        found += _period_problems(side, f"NUM_{own}LAYERS", f"{own}MOE_EVERY")
    if not found and model.layer_sharing == "all" and not _shares(model):
        found.append(
            "LAYER_SHARING = 'all' means nothing to layers of which none repeats: set "
            "it to 'none'"
        )
    each = model.experts_per_layer
    numbers = [
        len(architecture.sparse_layers(side))
        for side in architecture.sides(model).values()
    ]
    number, fewest = sum(numbers), min(filter(None, numbers), default=0)
    if not found and fewest and not 0 <= model.first_hash_layers <= fewest:
        found.append(
            f"FIRST_HASH_LAYERS = {model.first_hash_layers}: must be between 0 and the "
            f"{fewest} sparse layers of a stack"
        )
    if found or not each:
        return found
    if not architecture.has_experts(model):
        return [
            f"EXPERTS_PER_LAYER = {each} means nothing to MOE_EVERY = 0: set it to ()"
        ]
    if len(each) != number or min(each) < 1:
        return [
            f"EXPERTS_PER_LAYER = {each}: must have a number of at least 1 for each of "
            f"the {number} sparse layers, or be () for NUM_EXPERTS in all"
        ]
    if max(each) != model.num_experts:
        return [
            f"NUM_EXPERTS = {model.num_experts} must be the largest of "
            f"EXPERTS_PER_LAYER = {each}: set it to {max(each)}"
        ]
    return []


def _shares(model: ModelSettings) -> bool:
    """Whether layers repeat, so that they can share parameters."""
    stacks = (
        architecture.stack_of(s, RouterSettings(), crosses=False)
        for s in architecture.sides(model).values()
    )
    return any(segment.shared for stack in stacks for segment in stack.segments)


def _period_problems(side: ModelSettings, number: str, every: str) -> list[str]:
    """What is wrong with one stack, in the words of two macros."""
    period, first = side.moe_every, side.first_dense_layers
    if period < 0:
        return [f"{every} = {period}: 0 means dense"]
    if not period:
        return []
    rest = side.num_layers - first
    if first < 0:
        return [f"FIRST_DENSE_LAYERS = {first}: cannot be negative"]
    if first and rest < period:
        return [
            f"FIRST_DENSE_LAYERS = {first} leaves {rest} of {number} = "
            f"{side.num_layers} for a period of {every} = {period}"
        ]
    if rest % period:
        less = f" less FIRST_DENSE_LAYERS = {first}" if first else ""
        return [
            f"{number} = {side.num_layers}{less} is not a multiple of {every} = "
            f"{period}: layers repeat in periods of {every}"
        ]
    return []
