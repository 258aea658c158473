"""Losses, the optimizer, and how long a run is.

Read before jax is imported: standard library only. `configs/base.gin` fills these
records; nothing else does. Units stand last in a name; papers stand beside the knob.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from moe.settings.own import NO_KNOB, NO_OPTIONS, Named, Options


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Weights of what is added to the cross-entropy.

    Attributes:
        balance_weight: weight of the auxiliary load-balance loss (arXiv:2101.03961,
            eq. 4).
        balance_scope: "group" forms E·Σ f·P in every group and averages, "sequence" in
            every sequence (DeepSeek-V3, eq. 17); "global" forms it once over the whole
            batch.
        balance_counts: f are fractions of first choices ("first": Switch, Praxis) or
            of all choices ("all": DeepSeek, Megatron).
        over_layers: all losses of routers are summed over the sparse layers
            (Mesh-TensorFlow, Praxis) or averaged ("mean": Flaxformer).
        importance_weight: weight of the squared coefficient of variation of the
            experts' summed probabilities (V-MoE, arXiv:2106.05974, eq. 8; 0.005).
        load_weight: weight of V-MoE's load loss (eq. 9; 0.005), the squared
            coefficient of variation of each expert's probability of being selected if
            the noise were drawn again; needs noisy logits.
        router_z_weight: weight of the router z-loss (arXiv:2202.08906, eq. 5).
        z_weight: weight of (log Z)² of the output softmax.
        ahead_weight: weight of the cross-entropy of tokens after the next, averaged
            over how far ahead they are (arXiv:2412.19437, eq. 25; 0.3, later 0.1).
        label_smoothing: probability that the other tokens of the vocabulary share in
            what is learnt (arXiv:1512.00567, section 7); reported losses have none.
        normalizing_factor: what the sums of cross-entropy and z-loss are divided by in
            what is learnt, as T5X does; 0 takes the number of target tokens.
    """

    balance_weight: float = 1e-2
    balance_scope: Literal["group", "sequence", "global"] = "group"
    balance_counts: Literal["first", "all"] = "first"
    over_layers: Literal["sum", "mean"] = "sum"
    importance_weight: float = 0.0
    load_weight: float = 0.0
    router_z_weight: float = 1e-3
    z_weight: float = 0.0
    ahead_weight: float = 0.3
    label_smoothing: float = 0.0
    normalizing_factor: float = 0.0


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning-rate schedule.

    Attributes:
        name: "adamw" (arXiv:1711.05101), "adafactor" (arXiv:1804.04235), "muon"
            (arXiv:2502.16982), which leaves all but matrices to Adam; or "module:name"
            of a function (specs, **options) of somebody's own, which returns what takes
            the place of Adam's scaling.
        options: further arguments of that one.
        own: what that name stands for, once it is imported.
        learning_rate: its peak.
        schedule: course after the warm-up, over the updates made, which skipped steps
            are not: "rsqrt" decays as 1/√step, "cosine" falls to `final_fraction` at
            step `schedule_steps`, "constant" stays, "wsd" stays and falls to it at the
            end (arXiv:2404.06395, section 4); or "module:name" of a function
            (peak, num_steps, **options) of somebody's own, which returns the course.
        schedule_steps: where the cosine, or the fall of "wsd", ends; 0 takes the run's
            last step.
        decay_fraction: part of those steps in which "wsd" falls.
        decay_shape: how it does: "linear", "sqrt" as 1 - √x (arXiv:2405.18392, eq. 2),
            "cosine".
        schedule_options: further arguments of a function of one's own.
        own_schedule: what that name stands for, once it is imported.
        warmup_steps: linear rise, from peak / warmup_steps in the first.
        final_fraction: end of the cosine and of "wsd", as a fraction of the peak.
        b1: decay of the first moment; adafactor keeps one only if it is above 0.
        b2: decay of the second moment (adamw, and Adam beside muon).
        eps: added to the root of the second moment (the same).
        muon_beta: decay of muon's momentum.
        muon_steps: iterations that make a matrix orthogonal.
        muon_rms: root mean square of muon's update of a matrix, over the learning
            rate; 0 takes Jordan's factor of √max(1, outputs / inputs).
        weight_decay: decay of matrices, times the learning rate.
        clip_norm: bound of the global gradient norm; 0 does not clip.
        qk_clip: bound of the logits of attention, to which the weights of queries and
            keys are brought down after a step (arXiv:2507.20534, section 2.1); 0 sets
            none.
        moment_dtype: dtype of the moments between steps.
        rounding: how an update reaches bfloat16 parameters: "nearest";
            "stochastic", so that updates below their precision count on average;
            "master", which keeps a float32 copy in the optimizer's state.
        offload: keep the optimizer's state in the host's memory.
        trainable: patterns of names of parameters that are trained; () trains all.
        frozen: patterns of those that are not.
    """

    name: Literal["adamw", "adafactor", "muon"] | Named = "adamw"
    options: Options = NO_OPTIONS
    own: Callable[..., Any] | None = dataclasses.field(default=None, metadata=NO_KNOB)
    learning_rate: float = 1e-3
    schedule: Literal["rsqrt", "cosine", "constant", "wsd"] | Named = "cosine"
    schedule_options: Options = NO_OPTIONS
    own_schedule: Callable[..., Any] | None = dataclasses.field(
        default=None, metadata=NO_KNOB
    )
    schedule_steps: int = 0
    decay_fraction: float = 0.2
    decay_shape: Literal["linear", "sqrt", "cosine"] = "linear"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    muon_beta: float = 0.95
    muon_steps: int = 5
    muon_rms: float = 0.2
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    qk_clip: float = 0.0
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    rounding: Literal["nearest", "stochastic", "master"] = "nearest"
    offload: bool = False
    trainable: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How long, on how much at once, from which seed.

    Attributes:
        batch_size: B, sequences per step over all devices and microbatches.
        batch_ramp: (number of a batch, rows from it on), from batch 0 to one of
            `batch_size`, ascending (arXiv:2201.11990, section 3.3); () has the same in
            all.
        microbatches: pieces a step is computed in; the result is the same.
        train_steps: the step at which the run is complete.
        train_tokens: tokens after which it is complete, in place of steps; 0 counts
            steps.
        seed: seed of initialisation, data order and every random draw.
    """

    batch_size: int
    batch_ramp: tuple[tuple[int, int], ...] = ()
    microbatches: int = 1
    train_steps: int = 1000
    train_tokens: int = 0
    seed: int = 0
