"""Which transport `TRANSPORT = "auto"` takes, and what devices cannot do."""

import types

import numpy as np
import pytest

from moe.dispatch import auto
from moe.settings import DenseSettings, RouterSettings, SparseSettings

pytestmark = pytest.mark.fast

V5E, V6E, V4 = "TPU v5 lite", "TPU v6 lite", "TPU v4"


@pytest.mark.parametrize(
    ("platform", "kind", "per_slice", "has"),
    [
        ("cpu", "cpu", 8, False),
        ("gpu", "NVIDIA H100 80GB HBM3", 64, True),
        ("tpu", V4, 4096, True),
        ("tpu", V6E, 256, True),
        # Larger slices of v5e are refused: "limited ICI routing".
        ("tpu", V5E, 16, True),
        ("tpu", V5E, 32, False),
        ("tpu", "TPU v5e", 256, False),
        ("tpu", "TPU v5", 256, True),  # v5p
    ],
)
def test_which_devices_have_a_ragged_exchange(platform, kind, per_slice, has):
    assert auto.has_ragged_exchange(platform, kind, per_slice) == has


def test_slices_that_a_slow_network_joins_count_for_themselves():
    device = types.SimpleNamespace(platform="tpu", device_kind=V5E)

    def mesh(replica: int) -> types.SimpleNamespace:
        devices = np.full((replica, 1, 16 // 2, 1, 2, 1), device)
        return types.SimpleNamespace(devices=devices, shape={"replica": replica})

    assert auto.mesh_has_ragged_exchange(mesh(replica=4))
    wide = mesh(replica=2)
    wide.shape["replica"] = 1
    assert not auto.mesh_has_ragged_exchange(wide)


DROPLESS = RouterSettings(num_selected=2, capacity_factor=0.0)


@pytest.mark.parametrize(
    ("router", "axis_size", "ragged", "train", "taken"),
    [
        (RouterSettings(), 1, False, True, "ragged"),  # nothing is exchanged
        (RouterSettings(), 8, True, True, "all_to_all"),
        # Outside training nothing drops.
        (RouterSettings(), 8, True, False, "ragged"),
        (RouterSettings(), 8, False, False, "ring"),
        (RouterSettings(eval_capacity_factor=2.0), 8, True, False, "all_to_all"),
        (DROPLESS, 8, True, True, "ragged"),
        (DROPLESS, 8, False, True, "ring"),
        (DROPLESS, 2, True, True, "ring"),
    ],
)
def test_auto_takes_what_the_devices_have(router, axis_size, ragged, train, taken):
    s = SparseSettings(64, DenseSettings(8, "gelu"), router)
    found, _ = auto.transport_for("auto", s, axis_size, ragged, train=train)
    assert found == taken
