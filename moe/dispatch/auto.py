"""Which transport `TRANSPORT = "auto"` takes, and why. Standard library only."""

from typing import Any

from moe.routing.capacity import never_drops
from moe.settings import SparseSettings

# Transports whose rows are slots of capacity, a fixed number per expert.
PADDED = ("all_to_all", "einsum")


# What larger slices of a v5e cannot do; see docs/hardware.md.
_LARGEST_V5E_WITH_RAGGED_EXCHANGE = 16


def has_ragged_exchange(platform: str, kind: str = "", per_slice: int = 1) -> bool:
    """Whether `lax.ragged_all_to_all` runs on a kind of device.

    Args:
        platform: "cpu", "gpu" or "tpu".
        kind: name that jax gives the device, such as "TPU v5 lite".
        per_slice: devices that are joined by the fast network.
    """
    if platform == "tpu" and ("v5 lite" in kind or "v5e" in kind):
        return per_slice <= _LARGEST_V5E_WITH_RAGGED_EXCHANGE
    return platform != "cpu"


def mesh_has_ragged_exchange(mesh: Any) -> bool:
    """Whether `lax.ragged_all_to_all` runs on the devices of a jax mesh."""
    device = mesh.devices.flat[0]
    per_slice = mesh.devices.size // mesh.shape["replica"]
    return has_ragged_exchange(device.platform, device.device_kind, per_slice)


def transport_for(
    asked: str,
    s: SparseSettings,
    axis_size: int,
    ragged_exchange: bool,
    *,
    train: bool,
) -> tuple[str, str]:
    """Returns the transport of a pass, and the reason in a few words.

    Args:
        asked: the transport that was asked for.
        s: the layer: E, K and capacity.
        axis_size: size of the mesh axis `expert`.
        ragged_exchange: whether the devices have one.
        train: whether capacity is that of training.
    """
    if asked != "auto":
        return asked, "as TRANSPORT says"
    if train and s.dropout > 0:
        return "all_to_all", "dropout inside the experts is drawn per capacity slot"
    if axis_size == 1:
        return "ragged", "no expert axis: sorted rows, none of them padding"
    if not never_drops(s.router, s.num_experts, train=train):
        return "all_to_all", "capacity bounds every expert's rows"
    choices = s.router.num_choices(s.num_experts)
    if axis_size <= choices or not ragged_exchange:
        return "ring", (
            f"nothing drops, and gathering {axis_size} devices' tokens costs no more "
            f"than sending {choices} rows per token"
            if axis_size <= choices
            else "nothing drops, and these devices have no ragged exchange"
        )
    return "ragged", "nothing drops: only the rows that there are travel"
