"""One run, whole. Read before jax is imported: standard library only."""

import dataclasses
import re
from typing import Literal

import moe.constraints
import partitioning.settings
import tasks.settings
from launch.config import division
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
    AXES,
    MeshSettings,
    PartitionSettings,
    fitting,
)
from tasks import ramp
from tasks.settings import DataSettings, FilterSettings, MixtureSettings

_IN_BUCKET = re.compile(r"(gs|s3)://[^/\s]+/[^\s]*[^/\s]/*")  # and never all of one


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


def problems(settings: Settings) -> list[str]:
    """Lists every rule that the settings break, in each record and between them."""
    # Where there is no length, which is a problem of its own, one that fits any group.
    data, router = settings.data, settings.router
    length = data.length if data.length > 0 else max(router.group_size, 1)
    return [
        *partitioning.settings.problems(settings.mesh),
        *moe.constraints.problems(
            settings.model,
            router,
            settings.execution,
            settings.loss,
            settings.train,
            length=length,
            encoder_router=settings.encoder_router,
            encoder_length=data.encoder_length,
        ),
        *tasks.settings.problems(settings.data, settings.mixture, settings.filters),
        *_range_problems(settings),
        *_optimizer_problems(settings.optimizer),
        *ramp.problems(settings.train.batch_size, settings.train.batch_ramp),
        *_text_problems(settings),
        *_size_problems(settings),
        *_device_problems(settings.platform, settings.mesh),
        *_process_problems(settings.platform),
    ]


def _range_problems(settings: Settings) -> list[str]:
    """Numbers out of range, whatever the other settings are."""
    loop, loss, sample = settings.loop, settings.loss, settings.sample
    optimizer, platform = settings.optimizer, settings.platform
    at_least_1 = {
        "CHECKPOINT_PERIOD": loop.checkpoint_period_steps,
        "KEEP_CHECKPOINTS": loop.keep_checkpoints,
        "EVAL_PERIOD": loop.eval_period_steps,
        "LOG_PERIOD": loop.log_period_steps,
        "MAX_SKIPPED_STEPS": loop.max_skipped_steps,
        "SAMPLE_TOKENS": sample.num_tokens,
        "NUM_BEAMS": sample.num_beams,
        "MUON_STEPS": optimizer.muon_steps,
        "JOIN_TIMEOUT": platform.join_timeout_seconds,
        "HEARTBEAT_TIMEOUT": platform.heartbeat_timeout_seconds,
    }
    at_least_0 = {
        "CHECKPOINT_MINUTES": loop.checkpoint_minutes,
        "KEEP_PERIOD": loop.keep_period_steps,
        "KEEP_BEST": loop.keep_best,
        "EVAL_BATCHES": loop.eval_batches,
        "LAST_EVAL_BATCHES": loop.last_eval_batches,
        "LOAD_PERIOD": loop.load_period_steps,
        "TRAIN_TOKENS": settings.train.train_tokens,
        "TASK_METRICS_PERIOD": loop.task_metrics_period_steps,
        "MAX_ROLLBACKS": loop.max_rollbacks,
        "REPLAY_PERIOD": loop.replay_period_steps,
        "SPIKE_STDDEVS": loop.spike_stddevs,
        "GRACE_SECONDS": loop.grace_seconds,
        "AUX_LOSS_FACTOR": loss.balance_weight,
        "ROUTER_Z_LOSS_FACTOR": loss.router_z_weight,
        "IMPORTANCE_LOSS_FACTOR": loss.importance_weight,
        "LOAD_LOSS_FACTOR": loss.load_weight,
        "Z_LOSS": loss.z_weight,
        "AHEAD_LOSS_FACTOR": loss.ahead_weight,
        "LOSS_NORMALIZING_FACTOR": loss.normalizing_factor,
        "WARMUP_STEPS": optimizer.warmup_steps,
        "SCHEDULE_STEPS": optimizer.schedule_steps,
        "WEIGHT_DECAY": optimizer.weight_decay,
        "CLIP_NORM": optimizer.clip_norm,
        "MUON_RMS": optimizer.muon_rms,
        "QK_CLIP": optimizer.qk_clip,
        "SIMULATED_DEVICES": platform.simulated_devices,
        "NUM_PROCESSES": platform.num_processes,
        "SAMPLE_TEMPERATURE": sample.temperature,
        "SAMPLE_TOP_K": sample.top_k,
        "LENGTH_PENALTY": sample.length_penalty,
    }
    positive = {
        "LEARNING_RATE": optimizer.learning_rate,
        "EPSILON": optimizer.eps,
        "ROPE_BASE": settings.model.rope_base,
    }
    fractions = {
        "FINAL_LEARNING_RATE_FRACTION": (optimizer.final_fraction, "[0, 1]"),
        "DECAY_FRACTION": (optimizer.decay_fraction, "(0, 1]"),
        "BETA1": (optimizer.b1, "[0, 1)"),
        "BETA2": (optimizer.b2, "[0, 1)"),
        "MUON_BETA": (optimizer.muon_beta, "[0, 1)"),
        "SAMPLE_TOP_P": (sample.top_p, "(0, 1]"),
        "LABEL_SMOOTHING": (loss.label_smoothing, "[0, 1)"),
    }
    int32 = {"SAMPLE_TOKENS": sample.num_tokens, "SAMPLE_TOP_K": sample.top_k}
    seeds = {
        "SEED": settings.train.seed,
        "HASH_SEED": settings.router.hash_seed,
        "SAMPLE_SEED": sample.seed,
    }
    timeout = loop.step_timeout_seconds
    wrong_timeout = timeout < 0 and timeout != -1
    return [
        *[f"STEP_TIMEOUT = {timeout:g}: must be 0, -1 or more than 0"] * wrong_timeout,
        *(f"{m} = {x}: must be at least 1" for m, x in at_least_1.items() if x < 1),
        *(f"{m} = {x}: cannot be negative" for m, x in at_least_0.items() if x < 0),
        *(f"{m} = {x}: must be above 0" for m, x in positive.items() if x <= 0),
        *(
            f"{macro} = {x}: must be in {interval}"
            for macro, (x, interval) in fractions.items()
            if not 0 <= x <= 1
            or ("(0" in interval and x == 0)
            or ("1)" in interval and x == 1)
        ),
        *(f"{m} = {x}: must be below 2**31" for m, x in int32.items() if x >= 2**31),
        *(
            f"{macro} = {seed}: must be in [0, 2**32)"
            for macro, seed in seeds.items()
            if not 0 <= seed < 2**32
        ),
    ]


def _optimizer_problems(optimizer: OptimizerSettings) -> list[str]:
    """Settings of another optimizer, or of another schedule."""
    default = OptimizerSettings()
    muon = "OPTIMIZER", ("muon",)
    falling = "SCHEDULE", ("cosine", "wsd")
    belongs_to: dict[str, tuple[str, str, tuple[str, ...]]] = {
        "BETA2": ("b2", "OPTIMIZER", ("adamw", "muon")),
        "EPSILON": ("eps", "OPTIMIZER", ("adamw", "muon")),
        "MUON_BETA": ("muon_beta", *muon),
        "MUON_STEPS": ("muon_steps", *muon),
        "MUON_RMS": ("muon_rms", *muon),
        "FINAL_LEARNING_RATE_FRACTION": ("final_fraction", *falling),
        "SCHEDULE_STEPS": ("schedule_steps", *falling),
        "DECAY_FRACTION": ("decay_fraction", "SCHEDULE", ("wsd",)),
        "DECAY_SHAPE": ("decay_shape", "SCHEDULE", ("wsd",)),
    }
    found = []
    options = {
        "OPTIMIZER": (optimizer.name, optimizer.options),
        "SCHEDULE": (optimizer.schedule, optimizer.schedule_options),
    }
    for choice, (taken, given) in options.items():
        if given and ":" not in taken:
            found.append(
                f"{choice}_OPTIONS = {given} means nothing to {choice} = {taken!r}, "
                "only to one of your own: set it to {}"
            )
    if ":" in optimizer.name and optimizer.b1 != default.b1:
        found.append(
            f"BETA1 = {optimizer.b1} means nothing to OPTIMIZER = {optimizer.name!r}: "
            f"leave it at {default.b1}, and use OPTIMIZER_OPTIONS"
        )
    for macro, (field, choice, owners) in belongs_to.items():
        value, unused = getattr(optimizer, field), getattr(default, field)
        taken, _ = options[choice]
        if taken not in owners and value != unused:
            found.append(
                f"{macro} = {value!r} means nothing to {choice} = {taken!r}, only to "
                f"{' and '.join(map(repr, owners))}: leave it at {unused!r}"
            )
    return found


def _text_problems(settings: Settings) -> list[str]:
    """Names that name nothing, and flags that are none."""
    data, platform = settings.data, settings.platform
    texts = {
        "MODEL_DIR": settings.loop.model_dir,
        "STORE_DIR": data.store_dir,
        "MIXTURE_OR_TASK_NAME": data.mixture_or_task_name,
        "VOCABULARY": data.vocabulary,
        "TRAIN_SPLIT": data.train_split,
        "HELDOUT_SPLIT": data.heldout_split,
    }
    found = [f"{macro} is empty" for macro, text in texts.items() if not text.strip()]
    checkpoint_dir = settings.loop.checkpoint_dir
    paths = {
        **texts,
        "COMPILATION_CACHE_DIR": platform.compilation_cache_dir,
        "CHECKPOINT_DIR": checkpoint_dir,
    }
    found += [
        f"{macro} = {text!r} holds a NUL, which no path or name may: take it out"
        for macro, text in paths.items()
        if "\0" in text
    ]
    if "://" in settings.loop.model_dir:
        found.append(
            f"MODEL_DIR = {settings.loop.model_dir!r}: a run writes to a folder, which "
            "all processes share, such as one on NFS or a mounted bucket; only "
            "STORE_DIR and CHECKPOINT_DIR may be gs:// or s3://"
        )
    if checkpoint_dir and not _IN_BUCKET.fullmatch(checkpoint_dir):
        found.append(
            f"CHECKPOINT_DIR = {checkpoint_dir!r}: must be '' (MODEL_DIR/checkpoints) "
            "or a folder in a bucket, such as 'gs://bucket/runs/mine' or "
            "'s3://bucket/runs/mine'"
        )
    for macro in ("STORE_DIR", "VOCABULARY"):
        scheme, there, _ = texts[macro].partition("://")
        if there and scheme not in ("gs", "s3"):
            found.append(
                f"{macro} = {texts[macro]!r}: must be a path, or begin with gs:// or "
                "s3://"
            )
    module = data.mixture_or_task_module
    if not all(part.isidentifier() for part in module.split(".")):
        found.append(
            f"MIXTURE_OR_TASK_MODULE = {module!r}: must be the dotted name of a "
            "module, such as 'tasks.python_text'"
        )
    flags = {
        "XLA_FLAGS": platform.xla_flags,
        "LIBTPU_INIT_ARGS": platform.libtpu_init_args,
    }
    for macro, values in flags.items():
        found += [
            f"{macro} holds {flag!r}: each flag is one text that starts with -- and "
            "has no spaces"
            for flag in values
            if not flag.startswith("--") or flag.split() != [flag]
        ]
    return found


def _learning_problems(settings: Settings) -> list[str]:
    """What the optimizer and its schedule ask of the rest of a run."""
    optimizer, model, train = settings.optimizer, settings.model, settings.train
    found = []
    if optimizer.warmup_steps > train.train_steps:
        found.append(
            f"WARMUP_STEPS = {optimizer.warmup_steps} is longer than the run of "
            f"TRAIN_STEPS = {train.train_steps}: the peak would never be reached"
        )
    if optimizer.qk_clip and model.qk_norm != "none":
        found.append(
            f"QK_CLIP = {optimizer.qk_clip:g} means nothing to QK_NORM = "
            f"{model.qk_norm!r}, which undoes what it does: leave one of them "
            "out"
        )
    steps = optimizer.schedule_steps or train.train_steps
    falling = optimizer.decay_fraction * steps
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + falling > steps:
        found.append(
            f"WARMUP_STEPS = {optimizer.warmup_steps} and DECAY_FRACTION = "
            f"{optimizer.decay_fraction:g} of {steps} steps, {falling:g}, leave none "
            "at the peak: one of them must be smaller"
        )
    if optimizer.rounding != "nearest" and settings.execution.param_dtype == "float32":
        found.append(
            f"ROUNDING = {optimizer.rounding!r} means nothing to PARAM_DTYPE = "
            "'float32': leave it at 'nearest', or set PARAM_DTYPE to 'bfloat16'"
        )
    if optimizer.offload and settings.platform.name == "cpu":
        found.append(
            "OFFLOAD_OPTIMIZER = True: with PLATFORM = 'cpu' there is no other memory "
            "to keep the optimizer's state in; set it to False"
        )
    return found


def _size_problems(settings: Settings) -> list[str]:
    """Sizes that do not suit one another."""
    data, mesh, model = settings.data, settings.mesh, settings.model
    train, loop = settings.train, settings.loop
    found = []
    pieces = {"bytes": 259, "sentencepiece": data.vocabulary_size}
    needed = pieces.get(data.vocabulary, -data.extra_ids) + data.extra_ids
    if model.vocab_size < needed:
        found.append(
            f"VOCAB_SIZE = {model.vocab_size} has no row for every one of the "
            f"{needed:,} ids of VOCABULARY = {data.vocabulary!r}: use {needed} or more"
        )
    if loop.task_metrics_period_steps and data.objective != "seq2seq":
        found.append(
            f"TASK_METRICS_PERIOD = {loop.task_metrics_period_steps}: targets "
            f"are predicted from inputs, and OBJECTIVE = {data.objective!r} has none: "
            "set OBJECTIVE to 'seq2seq', or TASK_METRICS_PERIOD to 0"
        )
    saves, scores = loop.checkpoint_period_steps, loop.eval_period_steps
    if loop.keep_best and scores > 0 and saves % scores:
        found.append(
            f"KEEP_BEST = {loop.keep_best} needs the held-out loss of every "
            f"checkpoint: CHECKPOINT_PERIOD = {saves} must be a multiple of "
            f"EVAL_PERIOD = {scores}"
        )
    found += _learning_problems(settings)
    if min(dataclasses.astuple(mesh)) < 1:
        return found  # a problem of its own
    routers = {"GROUP_SIZE": (settings.router, data.length)}
    if model.shape == "encoder_decoder":
        routers["ENCODER_GROUP_SIZE"] = (settings.encoder_router, data.encoder_length)
    return found + division.problems(
        mesh,
        settings.partition,
        model,
        {
            macro: (router, max(length, 1))
            for macro, (router, length) in routers.items()
        },
        settings.execution,
        train,
    )


def _device_problems(platform: PlatformSettings, mesh: MeshSettings) -> list[str]:
    """Simulated devices that are too few, or that would not be used."""
    number = platform.simulated_devices
    if number < 1:
        return []
    if platform.name != "cpu":
        return [
            f"SIMULATED_DEVICES = {number} are CPU devices, but PLATFORM = "
            f"{platform.name!r}: set PLATFORM to 'cpu' or SIMULATED_DEVICES to 0"
        ]
    together = number * platform.num_processes
    if platform.num_processes > 1 and mesh.num_devices != together:
        return [
            f"SIMULATED_DEVICES = {number} of each of NUM_PROCESSES = "
            f"{platform.num_processes} are {together} together, and the mesh "
            f"({division.named(mesh, AXES) or 'every axis 1'}) has {mesh.num_devices}: "
            "the numbers must be the same"
        ]
    if platform.num_processes == 1 and mesh.num_devices > number:
        return [
            f"SIMULATED_DEVICES = {number} are fewer than the {mesh.num_devices} of "
            f"the mesh ({division.named(mesh, AXES)}): set SIMULATED_DEVICES to "
            f"{mesh.num_devices}, or an axis smaller"
        ]
    return []


def _process_problems(platform: PlatformSettings) -> list[str]:
    """Processes that could not find one another."""
    number, address = platform.num_processes, platform.coordinator_address
    found = []
    if address:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            found.append(
                f"COORDINATOR_ADDRESS = {address!r}: must be the host and a free port "
                "of process 0, such as '10.0.0.1:9876'"
            )
        if number == 1:
            found.append(
                f"COORDINATOR_ADDRESS = {address!r} would be ignored, since "
                "NUM_PROCESSES = 1: set both or neither"
            )
    if platform.process_id < -1 or 1 <= number <= platform.process_id:
        found.append(
            f"PROCESS_ID = {platform.process_id}: must be below NUM_PROCESSES = "
            f"{number}, counted from 0, or -1, which asks the environment"
        )
    return found
