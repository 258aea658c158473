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
    """How tokens choose experts, or experts tokens.

    Attributes:
        family: "token_choice" (Switch, GShard, GLaM, Mixtral, DeepSeek), "prototypes"
            (M6-T), "expert_choice", "hashed" or "sinkhorn"; one file each in
            `moe/routing`.
        num_selected: K, experts per token: 1 is Switch (arXiv:2101.03961), 2 GLaM
            (arXiv:2112.06905). Per prototype; on average, in expert choice.
        scores: "softmax" over the experts, or "sigmoid" of each logit by itself
            (DeepSeek-V3, arXiv:2412.19437, eq. 15).
        renormalize: divide a token's gates by their sum: "no" (Switch, V-MoE, T5X);
            "before_drop", over its choices (GLaM; a softmax over the selected logits,
            as in Mixtral, is the same); "after_drop", over those that got a slot.
        gate_scale: multiplies every gate (DeepSeek-V3: 2.5).
        second_policy: "all" keeps every choice; "random" keeps the second with
            probability 2·g2 (GShard, arXiv:2006.16668, Algorithm 1). Training only.
        num_prototypes: Z, groups of experts each of which a token visits.
        num_expert_groups: groups of neighbouring experts, such as those of one node.
        num_selected_groups: groups that one token's choices may lie in.
        group_score: of a group of experts: its best score ("max", DeepSeek-V2) or the
            sum of its two best ("top2_sum", DeepSeek-V3).
        max_experts_per_token: cap of expert choice; 0 sets none.
        sinkhorn_iterations: row and column scalings of the Sinkhorn router.
        hash_seed: of the hash router's table.
        jitter: multiply the router's input by U(1 - jitter, 1 + jitter), in training.
        logit_noise: standard deviation of noise on the logits, times 1/E, in training
            (V-MoE, arXiv:2106.05974: 1).
        selection_bias: give each expert a bias on its score, for selection only, that
            evens out loads without a loss (arXiv:2408.15664).
        bias_update_rate: its step after each batch: 1e-3 there; 0 freezes it.
        logit_dtype: of the product that makes logits; probabilities and losses are
            float32.
        slot_order: "token_major" fills slots token by token, so that no later token
            can evict an earlier one; "choice_major" fills all first choices first;
            "batch_priority" does so by falling gate (V-MoE).
        overflow: a choice that finds its expert full is dropped ("drop"), or tries the
            token's next best expert once and is then dropped ("spill").
        allow_future_leak: permit routers through which a token may depend on later
            ones; a causal model then cannot be trusted to generate.
        group_size: S, tokens that compete for the same slots.
        group_rows: rows that a group takes S / group_rows tokens of each: the same cut
            of so many consecutive rows of one device and microbatch.
        capacity_factor: slots per expert are S·K·capacity_factor / E; 0 drops nothing.
        eval_capacity_factor: the same outside training.
        min_capacity: the least number of slots per expert and group.
        capacity_counts_choices: whether K is in that product: True in V-MoE, MaxText
            and Megatron, False in Mesh-TensorFlow, Flaxformer and Praxis.
        capacity_rounding: "ceil" (V-MoE), "floor" (Mesh-TensorFlow, Praxis) or
            "half_even" (Flaxformer).
        capacity_multiple: round further up to a multiple of this: 4 in Praxis, V-MoE.
        row_budget: where nothing drops, rows that the experts of a device have room
            for, over an even share. A step that needs more is repeated in rounds.
    """

    family: Literal[
        "token_choice", "prototypes", "expert_choice", "hashed", "sinkhorn"
    ] = "token_choice"
    num_selected: int = 1
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: Literal["no", "before_drop", "after_drop"] = "no"
    gate_scale: float = 1.0
    second_policy: Literal["all", "random"] = "all"
    num_prototypes: int = 1
    num_expert_groups: int = 1
    num_selected_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    max_experts_per_token: int = 0
    sinkhorn_iterations: int = 8
    hash_seed: int = 0
    jitter: float = 0.0
    logit_noise: float = 0.0
    selection_bias: bool = False
    bias_update_rate: float = 1e-3
    logit_dtype: Literal["float32", "bfloat16"] = "float32"
    slot_order: Literal["token_major", "choice_major", "batch_priority"] = "token_major"
    overflow: Literal["drop", "spill"] = "drop"
    allow_future_leak: bool = False
    group_size: int = 256
    group_rows: int = 1
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 0.0
    min_capacity: int = 4
    capacity_counts_choices: bool = True
    capacity_rounding: Literal["ceil", "floor", "half_even"] = "ceil"
    capacity_multiple: int = 1
    row_budget: float = 1.5

    @property
    def group_length(self) -> int:
        """Tokens that a group takes of each of its rows."""
        return self.group_size // max(self.group_rows, 1)

    def mean_choices(self, num_experts: int) -> Fraction:
        """Returns the experts that a token visits on average, if none is full."""
        if self.family == "expert_choice":
            slots = capacity(self, num_experts, train=True)
            return Fraction(slots * num_experts, self.group_size)
        return Fraction(self.num_choices(num_experts))

    def num_choices(self, num_experts: int) -> int:
        """Returns J, choices that a token may hold."""
        if self.family == "expert_choice":
            return min(self.max_experts_per_token or num_experts, num_experts)
        if self.family == "prototypes":
            return self.num_prototypes * self.num_selected
        return self.num_selected


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
        mlp_biases: whether dense feed-forwards have biases.
        num_kv_heads: heads of keys and values, each shared by as many heads of queries
            (arXiv:2305.13245); 0 has one for each.
        attention_biases: whether the four projections have biases.
        attention_block: sequences of so many tokens or more are attended block by
            block, so that no L × L array is ever whole; 0 never does.
        positions: "rotary" (arXiv:2104.09864); "relative", T5's bias by bucket of
            distance (arXiv:1910.10683), one table for all layers; "relative_per_layer",
            one for each; "learned", a vector per position, added to the embedding
            (GPT-3); "none".
        relative_buckets: of which a causal model has so many for the past.
        relative_max_distance: beyond it all distances share the last bucket.
        max_positions: rows of the learned table; at least L.
        norm: "rms" (arXiv:1910.07467) or "layer" (arXiv:1607.06450), which has a bias.
        expert_activation: of the experts; "same" takes `activation`.
        expert_biases: whether experts have biases.
        first_dense_layers: layers at the bottom that are dense (DeepSeek-V3: 3).
        moe_every: above the first dense layers, every n-th layer is sparse; 0 makes
            every layer dense.
        moe_position: which layer of such a period: its "last", or its "first".
        num_experts: E.
        expert_mlp_dim: F of one expert.
        shared_expert_mlp_dim: F of the experts that every token visits, side by side
            as one (DeepSeekMoE, arXiv:2401.06066, section 3.2); 0 has none.
        transport: how tokens travel: one of the files in `moe/dispatch`, or "auto".
        dropout: probability of zeroing an activation on the residual path.
        expert_dropout: the same inside the experts, for fine-tuning (Switch, section
            2.4: 0.4).
        init_scale: variance of the initial weights, times their fan-in (Switch,
            section 2.4: 0.1). As in Flaxformer's recipe, of all products, of the bias
            by distance and of an output projection of its own, but not of embeddings,
            which start out with unit variance, nor of routers, which have 0.02².
        rope_base: base of the rotary position angles (arXiv:2104.09864).
        tie_embeddings: the output projection is the embedding.
        vocab_chunks: pieces of the vocabulary that logits are computed in, to save
            memory.
        dtype: type of activations, and of parameters where they meet them.
        param_dtype: of the parameters that are kept; see `OptimizerSettings.rounding`.
        reduce_dtype: in which gradients of fully sharded parameters are summed over
            devices.
        remat: what the backward pass keeps: "none" recomputes nothing, "minimal"
            keeps matrix products and everything that travelled, "full" keeps only
            the layers' inputs and so repeats the exchanges.
        sparse_remat: the same of sparse layers, where it differs.
        scan_layers: compile one period and loop over it; else compile each, which
            takes longer and spares copies of stacked weights.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    activation: Literal["relu", "gelu", "geglu", "swiglu"] = "gelu"
    mlp_biases: bool = False
    num_kv_heads: int = 0
    attention_biases: bool = False
    attention_block: int = 1024
    positions: Literal[
        "rotary", "relative", "relative_per_layer", "learned", "none"
    ] = "rotary"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    max_positions: int = 0
    norm: Literal["rms", "layer"] = "rms"
    expert_activation: Literal["same", "relu", "gelu", "geglu", "swiglu"] = "same"
    expert_biases: bool = False
    first_dense_layers: int = 0
    moe_every: int = 2
    moe_position: Literal["last", "first"] = "last"
    num_experts: int = 8
    expert_mlp_dim: int = 1024
    shared_expert_mlp_dim: int = 0
    transport: Literal["auto", "all_to_all", "einsum", "ring", "ragged"] = "auto"
    dropout: float = 0.0
    expert_dropout: float = 0.0
    init_scale: float = 1.0
    rope_base: float = 10_000.0
    tie_embeddings: bool = False
    vocab_chunks: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "minimal", "full"] = "minimal"
    sparse_remat: Literal["same", "none", "minimal", "full"] = "same"
    scan_layers: bool = True

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def activation_of_experts(self) -> str:
        """The non-linearity inside the experts."""
        same = self.expert_activation == "same"
        return self.activation if same else self.expert_activation

    @property
    def num_first_layers(self) -> int:
        """Dense layers below the periods; none in a dense model, all alike."""
        return self.first_dense_layers if self.moe_every else 0

    @property
    def sparse_in_period(self) -> int:
        """Which layer of a period is sparse; -1 in a dense model."""
        first = self.moe_position == "first" and self.moe_every > 0
        return 0 if first else self.moe_every - 1

    @property
    def num_sparse_layers(self) -> int:
        """Layers with experts."""
        return self.num_periods if self.moe_every else 0

    @property
    def num_periods(self) -> int:
        """Periods of `moe_every` layers above the first dense ones."""
        return (self.num_layers - self.num_first_layers) // max(self.moe_every, 1)


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
    """

    balance_weight: float = 1e-2
    balance_scope: Literal["group", "sequence", "global"] = "group"
    balance_counts: Literal["first", "all"] = "first"
    over_layers: Literal["sum", "mean"] = "sum"
    importance_weight: float = 0.0
    load_weight: float = 0.0
    router_z_weight: float = 1e-3
    z_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning-rate schedule.

    Attributes:
        name: "adamw" (arXiv:1711.05101) or "adafactor" (arXiv:1804.04235).
        learning_rate: its peak.
        schedule: of the updates made, which skipped steps are not; after the warm-up
            "rsqrt" decays as 1/√step, "cosine" falls to `final_fraction` at the last
            step, "constant" stays.
        warmup_steps: linear rise, from peak / warmup_steps in the first.
        final_fraction: end of the cosine, as a fraction of the peak.
        b1: decay of the first moment; adafactor keeps one only if it is above 0.
        b2: decay of the second moment (adamw).
        eps: added to the root of the second moment (adamw).
        weight_decay: on matrices only, times the learning rate.
        clip_norm: bound of the global gradient norm; 0 does not clip.
        moment_dtype: in which moments are kept between steps.
        rounding: how an update reaches bfloat16 parameters: "nearest";
            "stochastic", so that updates below their precision count on average;
            "master", which keeps a float32 copy in the optimizer's state.
        offload: keep the optimizer's state in the host's memory.
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
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    rounding: Literal["nearest", "stochastic", "master"] = "nearest"
    offload: bool = False


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

    S·K·factor / E, rounded as the settings say, at least `min_capacity` and at most S.
    A float product can round up past the exact value, so the factor is taken as the
    decimal that the user wrote. A token chooses an expert at most once, so S slots can
    never overflow: that is what a factor of 0 asks for. Experts that choose always
    need a limit, so outside training they then keep that of training.
    """
    factor = router.capacity_factor if train else router.eval_capacity_factor
    if factor == 0 and router.family == "expert_choice":
        factor = router.capacity_factor
    if factor == 0:
        return router.group_size
    choices = router.num_selected if router.capacity_counts_choices else 1
    if router.family == "prototypes":
        choices *= router.num_prototypes
    exact = router.group_size * choices * Fraction(str(factor)) / num_experts
    rounded = {
        "ceil": math.ceil(exact),
        "floor": math.floor(exact),
        "half_even": round(exact),
    }
    slots = max(rounded[router.capacity_rounding], router.min_capacity)
    slots = -(-slots // router.capacity_multiple) * router.capacity_multiple
    return min(slots, router.group_size)


def never_drops(router: RouterSettings, num_experts: int, *, train: bool) -> bool:
    """Whether every choice finds a slot, however uneven they are."""
    return capacity(router, num_experts, train=train) == router.group_size
