"""One run, whole. Read before jax is imported: standard library only."""

import dataclasses
from typing import Literal

from moe.settings import (
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RouterSettings,
    TrainSettings,
)
from partitioning.settings import MeshSettings
from tasks.settings import DataSettings


@dataclasses.dataclass(frozen=True)
class PlatformSettings:
    """What must be in the environment before jax starts.

    Attributes:
        name: "cpu", "cuda", "tpu", or "auto", which takes what jax finds.
        simulated_devices: CPU devices to simulate; 0 leaves the real ones.
        xla_flags: appended to XLA_FLAGS, such as ("--xla_cpu_use_xnnpack=true",).
        libtpu_init_args: appended to LIBTPU_INIT_ARGS.
        compilation_cache_dir: keeps compiled steps between runs; "" keeps none.
    """

    name: Literal["auto", "cpu", "cuda", "tpu"] = "auto"
    simulated_devices: int = 0
    xla_flags: tuple[str, ...] = ()
    libtpu_init_args: tuple[str, ...] = ()
    compilation_cache_dir: str = ""


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What happens around the steps.

    Attributes:
        model_dir: checkpoints, metrics and the report of this run.
        checkpoint_period_steps: between checkpoints; the last step always saves.
        keep_checkpoints: how many are kept.
        eval_period_steps: between held-out evaluations; the last step always has one.
        eval_batches: batches per periodic evaluation; 0 and the last evaluation
            score every held-out token once.
        log_period_steps: between records of metrics.
        max_skipped_steps: consecutive non-finite steps after which the run gives up.
    """

    model_dir: str
    checkpoint_period_steps: int = 1000
    keep_checkpoints: int = 3
    eval_period_steps: int = 1000
    eval_batches: int = 0
    log_period_steps: int = 10
    max_skipped_steps: int = 10


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How a continuation is drawn.

    Attributes:
        prompt: text to continue when training ends; "" draws none.
        num_tokens: tokens to draw at most.
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens; 0 from all.
        top_p: draw from the smallest set of this probability; 1 from all.
        seed: of the draws.
    """

    prompt: str = ""
    num_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a run, as `configs/base.gin` binds them."""

    platform: PlatformSettings
    mesh: MeshSettings
    model: ModelSettings
    router: RouterSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    train: TrainSettings
    data: DataSettings
    loop: LoopSettings
    sample: SampleSettings
