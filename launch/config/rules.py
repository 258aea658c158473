"""Rules of a run: of each record, and between them. Standard library only."""

import dataclasses
import re

import moe.constraints
import partitioning.settings
import tasks.settings
from launch.config import division
from launch.config.settings import LoopSettings, PlatformSettings, Settings
from moe.settings import OptimizerSettings
from partitioning.settings import AXES, MeshSettings
from tasks import ramp

_IN_BUCKET = re.compile(r"(gs|s3)://[^/\s]+/[^\s]*[^/\s]/*")  # and never all of one


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
        "START_FROM": settings.loop.start_from,
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
    found += _start_problems(settings.loop)
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


def _start_problems(loop: LoopSettings) -> list[str]:
    """What is wrong with where the first parameters come from."""
    start, patterns = loop.start_from, loop.start_patterns
    found, unused = [], LoopSettings.start_patterns
    if start and not start.strip():
        found.append(
            f"START_FROM = {start!r} names nothing: give a run's folder, or ''"
        )
    if "://" in start:
        found.append(
            f"START_FROM = {start!r}: must be a run's folder on this machine, or a "
            "checkpoint in one; of a run whose checkpoints are in a bucket too"
        )
    if not start and patterns != unused:
        found.append(
            f"START_PATTERNS = {patterns} means nothing to START_FROM = '': leave it "
            f"at {unused}, or name a run"
        )
    if start and not patterns:
        found.append(
            "START_PATTERNS = () takes nothing: leave it at ('*',), or set START_FROM "
            "to ''"
        )
    return found


def _learning_problems(settings: Settings) -> list[str]:
    """What the optimizer and its schedule ask of the rest of a run."""
    optimizer, model, train = settings.optimizer, settings.model, settings.train
    found, loop, unused = [], settings.loop, LoopSettings.spike_stddevs
    if loop.spike_action == "none" and loop.spike_stddevs != unused:
        found.append(
            f"SPIKE_STDDEVS = {loop.spike_stddevs:g} means nothing to SPIKE_ACTION = "
            f"'none': leave it at {unused:g}, or set SPIKE_ACTION to 'skip' or "
            "'rollback'"
        )
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
