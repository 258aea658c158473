"""The devices of this machine, or what keeps jax from them in one sentence."""

import os
from typing import TYPE_CHECKING

from launch.config.settings import PlatformSettings
from launch.errors import UserError

if TYPE_CHECKING:
    import jax

_WORDS = {"cpu": "CPU", "cuda": "GPU", "tpu": "TPU"}


class DeviceError(UserError):
    """The platform of a run is not on this machine."""


def here(platform: PlatformSettings) -> list["jax.Device"]:
    """Returns the devices that jax finds for a run.

    Raises:
        DeviceError: it finds none, and why.
    """
    import jax

    try:
        return jax.devices()
    except RuntimeError as error:
        # jax advises to take any other platform, which is not what the run asks for.
        found = str(error).partition(" (set JAX_PLATFORMS")[0]
        reason = f" (jax says: {' '.join(found.split())})"
        raise DeviceError(_sentence(platform, reason)) from error
    except AssertionError as error:  # all that jax says where it sees no GPU
        raise DeviceError(_sentence(platform, str(error))) from error


def _sentence(platform: PlatformSettings, reason: str) -> str:
    """What was asked for, what jax says of it, and what to change."""
    asked = os.environ.get("JAX_PLATFORMS") or platform.name
    setting, advice = (
        "PLATFORM",
        "take another hardware file, such as hardware/cpu1.gin",
    )
    if asked != platform.name:
        setting, advice = "your JAX_PLATFORMS", "unset it"
    return (
        f"{setting} = {asked!r}, and jax finds no {_WORDS.get(asked, 'device')} here "
        f"that it can use{reason}: {advice}, or ask `switchyard train --dry_run` or "
        "`switchyard plan`, which need none"
    )
