"""How tokens choose experts.

Read before jax is imported: standard library only. `configs/base.gin` fills these
records; nothing else does. Units stand last in a name; papers stand beside the knob.
"""

import dataclasses
from typing import Literal

from moe.settings.own import NO_KNOB, NO_OPTIONS, Named, Options, Router


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """How tokens choose experts, or experts tokens.

    Attributes:
        family: "token_choice" (Switch, GShard, GLaM, Mixtral, DeepSeek), "prototypes"
            (M6-T), "expert_choice", "hashed" or "sinkhorn"; one file each in
            `moe/routing`. Or "module:name" of a `Router` of somebody's own.
        options: further arguments of that one's function.
        own: what that name stands for, once it is imported.
        num_selected: K, experts per token: 1 is Switch (arXiv:2101.03961), 2 GLaM
            (arXiv:2112.06905). Per prototype; on average, in expert choice.
        logit_bias: whether logits have a bias that is learnt (gpt-oss,
            arXiv:2508.10925).
        scores: "softmax" over the experts; of each logit by itself "sigmoid"
            (DeepSeek-V3, arXiv:2412.19437, eq. 15) or "sqrt_softplus", √ln(1 + eˣ)
            (DeepSeek-V4).
        renormalize: divide a token's gates by their sum: "no" (Switch, V-MoE, T5X);
            "before_drop", over its choices (GLaM; a softmax over the selected logits,
            as in Mixtral, is the same); "after_drop", over those that got a slot.
        gate_scale: multiplies every gate (DeepSeek-V3: 2.5).
        gate_place: what a gate multiplies: the expert's "output", or its "input"
            (Llama 4).
        second_policy: "all" keeps every choice; "random" keeps the second with
            probability 2·g2 (GShard, arXiv:2006.16668, Algorithm 1). Training only.
        num_prototypes: Z, groups of experts each of which a token visits.
        num_expert_groups: groups of neighbouring experts, such as those of one node.
        num_selected_groups: groups that one token's choices may lie in.
        group_score: score of a group of experts: its best ("max", DeepSeek-V2) or the
            sum of its two best ("top2_sum", DeepSeek-V3).
        max_experts_per_token: cap of expert choice; 0 sets none.
        sinkhorn_iterations: row and column scalings of the Sinkhorn router.
        hash_seed: seed of the hash router's table.
        hash_gates: its gates: "even", 1/K, or the "scores" of a router's logits.
        jitter: multiply the router's input by U(1 - jitter, 1 + jitter), in training.
        logit_noise: standard deviation of noise on the logits, times 1/E, in training
            (V-MoE, arXiv:2106.05974: 1).
        selection_bias: give each expert a bias on its score, for selection only, that
            evens out loads without a loss (arXiv:2408.15664).
        bias_update: how it follows: by a "sign", one step up or down, or to the
            "quantile" of what tokens would have needed (Kimi K3).
        bias_update_rate: its step after each batch: 1e-3 there; 0 freezes it.
        logit_dtype: dtype of the product that makes logits; probabilities and losses
            are float32.
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
    """

    family: (
        Literal["token_choice", "prototypes", "expert_choice", "hashed", "sinkhorn"]
        | Named
    ) = "token_choice"
    options: Options = NO_OPTIONS
    own: Router | None = dataclasses.field(default=None, metadata=NO_KNOB)
    num_selected: int = 1
    logit_bias: bool = False
    scores: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    renormalize: Literal["no", "before_drop", "after_drop"] = "no"
    gate_scale: float = 1.0
    gate_place: Literal["output", "input"] = "output"
    second_policy: Literal["all", "random"] = "all"
    num_prototypes: int = 1
    num_expert_groups: int = 1
    num_selected_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    max_experts_per_token: int = 0
    sinkhorn_iterations: int = 8
    hash_seed: int = 0
    hash_gates: Literal["even", "scores"] = "even"
    jitter: float = 0.0
    logit_noise: float = 0.0
    selection_bias: bool = False
    bias_update: Literal["sign", "quantile"] = "sign"
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

    @property
    def group_length(self) -> int:
        """Tokens that a group takes of each of its rows."""
        return self.group_size // max(self.group_rows, 1)

    @property
    def is_own(self) -> bool:
        """Whether it is somebody's own, named "module:name"."""
        return ":" in self.family

    @property
    def reads_logits(self) -> bool:
        """Whether there are logits, and weights that make them."""
        if self.family == "hashed":
            return self.hash_gates == "scores"
        return self.own is None or self.own.reads_logits

    def num_choices(self, num_experts: int) -> int:
        """Returns J, choices that a token may hold."""
        assert not self.is_own or self.own is not None, f"{self.family}: not imported"
        if self.own is not None and self.own.num_choices is not None:
            return self.own.num_choices(self, num_experts)
        if self.family == "expert_choice":
            return min(self.max_experts_per_token or num_experts, num_experts)
        if self.family == "prototypes":
            return self.num_prototypes * self.num_selected
        return self.num_selected
