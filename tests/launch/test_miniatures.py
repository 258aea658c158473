"""Every model of `configs/runs` learns: three steps of a miniature on eight devices.

Models that shrink to the same miniature share its steps.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from every_run import on_eight_devices

from benchmarks.ladder.rows import run_names
from launch.config import edit
from launch.config.reader import ResolvedConfig
from launch.run.assemble import assemble
from launch.verification import batches
from launch.verification.shrink import shrink
from moe.settings import OptimizerSettings, TrainSettings
from tasks import layouts

MESH = "data=2,expert=2,model=2"
STEPS = 3
# Of each kind of layers one, where no other test trains it every day.
DAILY = ("gpt2_124m", "deepseekmoe_16b")


# Of the settings, what decides a step of a given shape.
DECIDES = ("partition", "model", "router", "encoder_router", "execution", "loss")
LOSSES: dict[str, list[float]] = {}


def miniature(run: str) -> ResolvedConfig:
    """The shrunk model, in rows of its kind, with its optimizer at a rate of 0.01."""
    config = on_eight_devices(run, "FSDP=data")
    small = shrink(config.settings, [edit.parse_mesh(MESH)[0]], run, 8)
    settings = small.on(small.meshes[0])
    own = settings.optimizer
    optimizer = OptimizerSettings(own.name, learning_rate=0.01, warmup_steps=0)
    return dataclasses.replace(
        config,
        settings=dataclasses.replace(
            settings,
            optimizer=dataclasses.replace(optimizer, b1=own.b1, qk_clip=own.qk_clip),
            train=TrainSettings(settings.train.batch_size),
        ),
    )


def losses(run: str) -> list[float]:
    """The loss of each step, on the same batch."""
    config = miniature(run)
    settings = config.settings
    features = layouts.features(settings.data)
    decides = [getattr(settings, name) for name in DECIDES]
    key = repr((*decides, settings.optimizer, settings.train, features))
    if key not in LOSSES:
        made = assemble(config, jax.devices())
        batch = jax.device_put(batches.draw(settings, 0, 0), made.batch_shardings)
        step, state = made.compile_train_step(), made.init_state()
        LOSSES[key] = []
        for index in range(STEPS):  # as if each were the next batch
            state, metrics = step(state, batch, jnp.int32(index))
            assert metrics["state/taken"] == 1
            LOSSES[key].append(float(metrics["loss/total"]))
    return LOSSES[key]


@pytest.mark.parametrize(
    "run",
    [n if n in DAILY else pytest.param(n, marks=pytest.mark.slow) for n in run_names()],
)
def test_a_miniature_of_every_model_learns(run):
    found = losses(run)
    assert all(0 < loss < 100 for loss in found)
    assert all(later < sooner for sooner, later in itertools.pairwise(found)), found
