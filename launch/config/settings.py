"""One run, whole. Read before jax is imported: standard library only."""

import dataclasses
from typing import Literal

from moe import architecture
from moe.layers import Layers
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RouterSettings,
    TrainSettings,
)
from partitioning.settings import (
    MeshSettings,
    PartitionSettings,
    fitting,
)
from tasks import ramp
from tasks.settings import DataSettings, FilterSettings, MixtureSettings


@dataclasses.dataclass(frozen=True)
class PlatformSettings:
    """What must be in the environment before jax starts.

    Attributes:
        name: "cpu", "cuda", "tpu", or "auto", which takes what jax finds.
        simulated_devices: CPU devices to simulate; 0 leaves the real ones.
        xla_flags: appended to XLA_FLAGS, such as ("--xla_cpu_use_xnnpack=true",); where
            the CPU may be used, CPU_FLAG of launch/config/platform.py is too.
        libtpu_init_args: appended to LIBTPU_INIT_ARGS.
        compilation_cache_dir: keeps compiled steps between runs; "" keeps none, "auto"
            chooses a folder of the user's.
        num_processes: that run this one job together; 0 asks the cluster's launcher.
        coordinator_address: "host:port" of process 0; "" asks the cluster's launcher.
        process_id: number of this one, from 0; -1 is told by the environment.
        join_timeout_seconds: how long processes wait for one another at the start.
        heartbeat_timeout_seconds: silence after which a process counts as dead.
    """

    name: Literal["auto", "cpu", "cuda", "tpu"] = "auto"
    simulated_devices: int = 0
    xla_flags: tuple[str, ...] = ()
    libtpu_init_args: tuple[str, ...] = ()
    compilation_cache_dir: str = "auto"
    num_processes: int = 1
    coordinator_address: str = ""
    process_id: int = -1
    join_timeout_seconds: int = 300
    heartbeat_timeout_seconds: int = 100


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What happens around the steps.

    Attributes:
        model_dir: checkpoints, metrics and the report of this run.
        checkpoint_dir: folder of a bucket that has the checkpoints; "": `model_dir`.
        start_from: another run, or a checkpoint in one, from which a run that has no
            checkpoint takes its first parameters; "": they are drawn.
        start_patterns: patterns of names of parameters that are taken from there.
        checkpoint_period_steps: between checkpoints; the last step always saves.
        checkpoint_minutes: between checkpoints at most; 0 leaves it to steps.
        keep_checkpoints: how many of the newest are kept.
        keep_period_steps: the first checkpoint of every so many steps is kept for good;
            0: none.
        keep_best: checkpoints with the least held-out loss that are kept; 0: none.
        eval_period_steps: between held-out evaluations; the last step always has one.
        eval_batches: batches of each Task in a periodic evaluation; 0 scores every
            held-out token once.
        last_eval_batches: the same of the last evaluation.
        task_metrics_period_steps: between measurements by the Tasks' own metric
            functions; the last step then has one too. 0: none while training.
        log_period_steps: between records of metrics, each of which stands for all steps
            since the one before.
        load_period_steps: between records that keep every expert's load; 0: none.
        max_skipped_steps: consecutive skipped steps after which the run goes back to
            its newest checkpoint, and passes over the data since.
        max_rollbacks: times that it does so without a new checkpoint in between, before
            it gives up; 0 gives up at once.
        spike_action: what becomes of a step whose loss is a spike: "none" is looked
            for; "skip" leaves it out, as one that is not finite; "rollback" goes back
            at once.
        spike_stddevs: deviations of the loss above its running mean from which on it is
            a spike.
        replay_period_steps: steps between those that are computed twice, and must come
            out the same to the bit; 0 computes none twice.
        compare_replicas: whether devices that hold the same parameters are compared
            before each save.
        self_check: whether the sparse layer is compared with the oracle before
            training, and the CPU's compiler with NumPy before anything is computed.
        compile_ahead: what is compiled before the first step: "all" that the run may
            need, or the "train_step" alone.
        step_timeout_seconds: that a step may take before the run is ended; 0: 50 times
            the median of the last hundred, and at least half an hour. -1: for ever.
        grace_seconds: between the scheduler's SIGTERM and its SIGKILL; 0: not known.
    """

    model_dir: str
    checkpoint_dir: str = ""
    start_from: str = ""
    start_patterns: tuple[str, ...] = ("*",)
    checkpoint_period_steps: int = 1000
    checkpoint_minutes: float = 0.0
    keep_checkpoints: int = 3
    keep_period_steps: int = 0
    keep_best: int = 0
    eval_period_steps: int = 1000
    eval_batches: int = 16
    last_eval_batches: int = 1000
    task_metrics_period_steps: int = 0
    log_period_steps: int = 10
    load_period_steps: int = 100
    max_skipped_steps: int = 10
    max_rollbacks: int = 3
    spike_action: Literal["none", "skip", "rollback"] = "none"
    spike_stddevs: float = 6.0
    replay_period_steps: int = 0
    compare_replicas: Literal["on", "off"] = "off"
    self_check: Literal["on", "off"] = "on"
    compile_ahead: Literal["all", "train_step"] = "all"
    step_timeout_seconds: float = 0.0
    grace_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How a continuation is drawn.

    Attributes:
        prompt: text to continue when training ends; "" draws none.
        num_tokens: tokens to draw at most.
        temperature: divisor of the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens; 0 from all.
        top_p: draw from the smallest set of this probability; 1 from all.
        seed: PRNG seed for the draws.
        num_beams: hypotheses of beam search, which takes the place of drawing; 1 draws.
        length_penalty: power of (5 + length) / 6, over which log-probabilities of
            beams are compared.
    """

    prompt: str = ""
    num_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0
    num_beams: int = 1
    length_penalty: float = 0.6


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a run, as `configs/base.gin` binds them."""

    platform: PlatformSettings
    mesh: MeshSettings
    partition: PartitionSettings
    model: ModelSettings
    router: RouterSettings
    encoder_router: RouterSettings
    execution: ExecutionSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    train: TrainSettings
    data: DataSettings
    mixture: MixtureSettings
    filters: FilterSettings
    loop: LoopSettings
    sample: SampleSettings

    def __post_init__(self) -> None:
        """Cuts heads of keys over the mesh only where they divide."""
        kv_heads = self.model.num_kv_heads or self.model.num_heads
        cut = fitting(self.partition, self.mesh.model, kv_heads)
        object.__setattr__(self, "partition", cut)

    @property
    def layers(self) -> Layers:
        """What the model's words mean for each layer."""
        return architecture.describe(self.model, self.router, self.encoder_router)

    @property
    def batch_sizes(self) -> ramp.Sizes:
        """Rows of every batch."""
        return ramp.sizes(self.train.batch_size, self.train.batch_ramp)

    @property
    def names_code(self) -> bool:
        """Whether it names code that is not Switchyard's own, as "module:name"."""
        router, beside, optimizer = self.router, self.encoder_router, self.optimizer
        names = (router.family, beside.family, optimizer.name, optimizer.schedule)
        return any(":" in name for name in (*names, self.data.objective))

    def length_of(self, stack: str) -> int:
        """Returns the tokens of a row that go through a stack."""
        beside = stack == "encoder" and self.data.layout == "encoder_decoder"
        return self.data.encoder_length if beside else self.data.length
