"""Every setting of the model and of learning, with the rules they must obey.

Read before jax is imported: standard library only. `configs/base.gin` fills these
records; nothing else does. Units stand last in a name; papers stand beside the knob.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """How tokens choose experts.

    Attributes:
        num_selected: K, experts per token. 1 is Switch (arXiv:2101.03961), 2 GLaM
            (arXiv:2112.06905).
        renormalize: divide the K gates by their sum, before anything is dropped.
        second_policy: "all" keeps every choice; "random" keeps the second with
            probability 2·g2 (GShard, arXiv:2006.16668, Algorithm 1). Training only.
        jitter: multiply the router's input by U(1 - jitter, 1 + jitter), in training.
        slot_order: "token_major" fills slots token by token, so that no later token
            can evict an earlier one; "choice_major" fills all first choices first.
        group_size: S, tokens that compete for the same slots.
        capacity_factor: slots per expert are ceil(S·K·capacity_factor / E).
        eval_capacity_factor: the same outside training; 0 means that nothing drops.
        min_capacity: the least number of slots per expert and group.
    """

    num_selected: int = 1
    renormalize: bool = False
    second_policy: Literal["all", "random"] = "all"
    jitter: float = 0.0
    slot_order: Literal["token_major", "choice_major"] = "token_major"
    group_size: int = 256
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 0.0
    min_capacity: int = 4


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """A decoder-only transformer with a sparse layer every `moe_every` layers.

    Attributes:
        vocab_size: V, rows of the embedding; at least the vocabulary's size.
        num_layers: layers in all, dense and sparse.
        model_dim: M.
        num_heads: N.
        head_dim: D.
        mlp_dim: F of a dense layer.
        activation: "relu", "gelu", "geglu" or "swiglu"; the last two are gated.
        moe_every: every n-th layer is sparse; 0 makes every layer dense.
        num_experts: E.
        expert_mlp_dim: F of one expert.
        transport: how tokens travel: "all_to_all", or "einsum", the readable oracle.
        dropout: probability of zeroing an activation on the residual path.
        rope_base: base of the rotary position angles (arXiv:2104.09864).
        tie_embeddings: the output projection is the embedding.
        dtype: type of activations; parameters, router and losses are float32.
        remat: what the backward pass keeps: "none" recomputes nothing, "minimal"
            keeps matrix products and everything that travelled, "full" keeps only
            the layers' inputs and so repeats the exchanges.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    activation: Literal["relu", "gelu", "geglu", "swiglu"] = "gelu"
    moe_every: int = 2
    num_experts: int = 8
    expert_mlp_dim: int = 1024
    transport: Literal["all_to_all", "einsum"] = "all_to_all"
    dropout: float = 0.0
    rope_base: float = 10_000.0
    tie_embeddings: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "minimal", "full"] = "minimal"

    @property
    def num_sparse_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers // self.moe_every if self.moe_every else 0


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Weights of what is added to the cross-entropy.

    Attributes:
        balance_weight: of the auxiliary load-balance loss (arXiv:2101.03961, eq. 4).
        balance_scope: "group" forms E·Σ f·P in every group and averages; "global"
            forms it once over the whole batch.
        router_z_weight: of the router z-loss (arXiv:2202.08906, eq. 5).
        z_weight: of (log Z)² of the output softmax.
    """

    balance_weight: float = 1e-2
    balance_scope: Literal["group", "global"] = "group"
    router_z_weight: float = 1e-3
    z_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning-rate schedule.

    Attributes:
        name: "adamw" (arXiv:1711.05101) or "adafactor" (arXiv:1804.04235).
        learning_rate: its peak.
        schedule: after the warm-up, "rsqrt" decays as 1/√step, "cosine" falls to
            `final_fraction` at the last step, "constant" stays.
        warmup_steps: linear rise, from peak / warmup_steps in the first.
        final_fraction: end of the cosine, as a fraction of the peak.
        b1: decay of the first moment; adafactor keeps one only if it is above 0.
        b2: decay of the second moment (adamw).
        eps: added to the root of the second moment (adamw).
        weight_decay: on matrices only, times the learning rate.
        clip_norm: bound of the global gradient norm; 0 does not clip.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["rsqrt", "cosine", "constant"] = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How long, on how much at once, from which seed.

    Attributes:
        batch_size: B, sequences per step over all devices and microbatches.
        microbatches: pieces a step is computed in; the result is the same.
        train_steps: the step at which the run is complete.
        seed: of initialisation, data order and every random draw.
    """

    batch_size: int
    microbatches: int = 1
    train_steps: int = 1000
    seed: int = 0


def capacity(router: RouterSettings, num_experts: int, *, train: bool) -> int:
    """Returns C, slots per expert and group, in exact arithmetic.

    ceil(S·K·factor / E), at least `min_capacity` and at most S. A float product can
    round up past the exact value, so the factor is taken as the decimal that the user
    wrote. A token chooses an expert at most once, so S slots can never overflow: that
    is what a factor of 0 asks for.
    """
    factor = router.capacity_factor if train else router.eval_capacity_factor
    if factor == 0:
        return router.group_size
    tokens = router.group_size * router.num_selected
    slots = math.ceil(tokens * Fraction(str(factor)) / num_experts)
    return min(max(slots, router.min_capacity), router.group_size)


def problems(
    model: ModelSettings, router: RouterSettings, train: TrainSettings, *, length: int
) -> list[str]:
    """Lists the rules that the settings break, whatever the mesh."""
    found = []

    def require(holds: bool, fault: str) -> None:
        if not holds:
            found.append(fault)

    positive = {
        "VOCAB_SIZE": model.vocab_size,
        "NUM_LAYERS": model.num_layers,
        "EMBED_DIM": model.model_dim,
        "NUM_HEADS": model.num_heads,
        "HEAD_DIM": model.head_dim,
        "MLP_DIM": model.mlp_dim,
        "BATCH_SIZE": train.batch_size,
        "MICROBATCHES": train.microbatches,
        "TRAIN_STEPS": train.train_steps,
    }
    for macro, value in positive.items():
        require(value >= 1, f"{macro} = {value}: must be at least 1")
    require(
        model.head_dim % 2 == 0,
        f"HEAD_DIM = {model.head_dim}: rotary positions turn pairs, so it must be even",
    )
    require(
        0 <= model.dropout < 1, f"DROPOUT_RATE = {model.dropout}: must be in [0, 1)"
    )
    require(model.moe_every >= 0, f"MOE_EVERY = {model.moe_every}: 0 means dense")
    if model.moe_every > 0:
        found += _sparse_problems(model, router, length)
    return found


def _sparse_problems(
    model: ModelSettings, router: RouterSettings, length: int
) -> list[str]:
    """The rules that only a model with sparse layers must obey."""
    found = []
    if model.num_layers % model.moe_every:
        found.append(
            f"NUM_LAYERS = {model.num_layers} is not a multiple of MOE_EVERY = "
            f"{model.moe_every}: layers repeat in periods of MOE_EVERY"
        )
    if model.num_experts < 1:
        found.append(f"NUM_EXPERTS = {model.num_experts}: must be at least 1")
    if model.expert_mlp_dim < 1:
        found.append(f"EXPERT_MLP_DIM = {model.expert_mlp_dim}: must be at least 1")
    if not 1 <= router.num_selected <= max(model.num_experts, 1):
        found.append(
            f"NUM_SELECTED_EXPERTS = {router.num_selected}: must be between 1 and "
            f"NUM_EXPERTS = {model.num_experts}"
        )
    if router.second_policy == "random" and router.num_selected != 2:
        found.append(
            "SECOND_EXPERT_POLICY = 'random' is defined for NUM_SELECTED_EXPERTS = 2, "
            f"not {router.num_selected}"
        )
    if router.renormalize and router.num_selected == 1:
        found.append(
            "RENORMALIZE_GATES = True with NUM_SELECTED_EXPERTS = 1 makes each gate 1, "
            "and the router would learn nothing from the loss: set it to False"
        )
    if not 0 <= router.jitter < 1:
        found.append(f"JITTER_NOISE = {router.jitter}: must be in [0, 1)")
    if router.capacity_factor < 0 or router.eval_capacity_factor < 0:
        found.append(
            "TRAIN_CAPACITY_FACTOR and EVAL_CAPACITY_FACTOR cannot be negative"
        )
    if router.group_size < 1 or length % router.group_size:
        divisors = [d for d in range(1, length + 1) if length % d == 0]
        nearest = sorted(divisors, key=lambda d: abs(d - router.group_size))[:2]
        found.append(
            f"GROUP_SIZE = {router.group_size} does not divide a sequence of "
            f"{length} tokens: nearest are "
            f"{' and '.join(map(str, sorted(nearest)))}"
        )
    return found
