"""Which transport `TRANSPORT = "auto"` takes, and why. Standard library only."""

from moe.settings import ModelSettings, RouterSettings, never_drops

# Transports whose rows are slots of capacity, a fixed number per expert.
PADDED = ("all_to_all", "einsum")


def pick(
    model: ModelSettings,
    router: RouterSettings,
    axis_size: int,
    platform: str,
    *,
    train: bool,
) -> tuple[str, str]:
    """Returns the transport of a pass, and the reason in a few words.

    Args:
        model: the transport that was asked for, and E.
        router: K and capacity.
        axis_size: size of the mesh axis `expert`.
        platform: of the mesh.
        train: whether capacity is that of training.
    """
    if model.transport != "auto":
        return model.transport, "as TRANSPORT says"
    if train and model.expert_dropout > 0:
        return "all_to_all", "dropout inside the experts is drawn per capacity slot"
    if axis_size == 1:
        return "ragged", "no expert axis: sorted rows, none of them padding"
    if not never_drops(router, model.num_experts, train=train):
        return "all_to_all", "capacity bounds every expert's rows"
    choices = router.num_choices(model.num_experts)
    if axis_size <= choices or platform == "cpu":
        return "ring", (
            f"nothing drops, and gathering {axis_size} devices' tokens costs no more "
            f"than sending {choices} rows per token"
            if axis_size <= choices
            else "nothing drops, and this platform has no ragged exchange"
        )
    return "ragged", "nothing drops: only the rows that there are travel"
