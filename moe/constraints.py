"""The rules that the settings of model and learning must obey, whatever the mesh.

Read before jax is imported: standard library only. Every fault is one line: the values,
the rule, and the macro to change.
"""

import dataclasses
import re

from moe import architecture
from moe.dispatch.auto import PADDED
from moe.routing.capacity import capacity
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    RouterSettings,
    TrainSettings,
)


def problems(
    model: ModelSettings,
    router: RouterSettings,
    execution: ExecutionSettings,
    loss: LossSettings,
    train: TrainSettings,
    *,
    length: int,
    encoder_router: RouterSettings | None = None,
    encoder_length: int = 0,
) -> list[str]:
    """Lists the rules that the settings break.

    Args:
        model: sizes and choices.
        router: how tokens choose.
        execution: how it is computed.
        loss: weights of the losses.
        train: batch and length of the run.
        length: L, tokens of a sequence.
        encoder_router: how those of the encoder beside a decoder choose.
        encoder_length: tokens of a sequence there.
    """
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
    found = [f"{m} = {x}: must be at least 1" for m, x in positive.items() if x < 1]
    found += _attention_problems(model, max(length, encoder_length))
    found += _shape_problems(model)
    if model.shape != "encoder_decoder" and encoder_router is not None:
        found += [
            f"ENCODER_{macro} = {getattr(encoder_router, field)!r} means nothing to "
            f"ARCHITECTURE = {model.shape!r}: leave it out"
            for macro, field in _ENCODERS_OWN.items()
            if getattr(encoder_router, field) != getattr(router, field)
        ]
    found += _fraction_problems({"DROPOUT_RATE": model.dropout})
    if model.init_scale <= 0:
        found.append(f"INIT_SCALE = {model.init_scale}: must be above 0")
    found += _execution_problems(model, execution)
    found += architecture.problems(model)
    if architecture.has_experts(model):
        found += _expert_problems(model, execution)
        chosen = {"decoder": (router, length), "encoder": (router, length)}
        if model.shape == "encoder_decoder" and encoder_router is not None:
            chosen["encoder"] = encoder_router, encoder_length
        for name, side in architecture.sides(model).items():
            beside = name == "encoder" != model.shape
            for line in _sparse_problems(side, *chosen[name], loss):
                said = _OWN_WORD.sub(r"ENCODER_\1", line) if beside else line
                found += [said] if said not in found else []
    return found


# Macros that have another of their own for the encoder beside a decoder.
_ENCODERS_OWN = {
    "ROUTER": "family",
    "ROUTER_OPTIONS": "options",
    "ROUTER_SCORES": "scores",
    "ROUTER_BIAS": "selection_bias",
    "NUM_SELECTED_EXPERTS": "num_selected",
    "RENORMALIZE_GATES": "renormalize",
    "EXPERT_CHOICE_CAP": "max_experts_per_token",
    "SLOT_ORDER": "slot_order",
    "OVERFLOW": "overflow",
    "GROUP_SIZE": "group_size",
    "TRAIN_CAPACITY_FACTOR": "capacity_factor",
    "EVAL_CAPACITY_FACTOR": "eval_capacity_factor",
    "MIN_EXPERT_CAPACITY": "min_capacity",
}
_OWN = "module:name"
_OWN_WORD = re.compile(rf"\b({'|'.join(_ENCODERS_OWN)})\b")


def _sparse_problems(
    side: ModelSettings, router: RouterSettings, length: int, loss: LossSettings
) -> list[str]:
    """What is wrong with the sparse layers of one stack."""
    found = []
    if not architecture.has_experts(side):
        return []
    for number in sorted(side.experts_per_layer or {side.num_experts}, reverse=True):
        layer = dataclasses.replace(side, num_experts=number)
        of_layer = [
            *_number_problems(layer, router),
            *_family_problems(layer, router, loss),
            *_capacity_problems(layer, router, length),
        ]
        told = f"NUM_EXPERTS = {number}", architecture.told(side, number)
        found += [line.replace(*told) for line in of_layer]
    if side.shape != "encoder":
        found += [
            f"{leak}. A causal decoder would learn from the future: choose another, or "
            "set ALLOW_FUTURE_LEAK = True to go on all the same"
            for leak in leaks(router)
            if not router.allow_future_leak
        ]
    return found


def _shape_problems(model: ModelSettings) -> list[str]:
    """Settings of two stacks, where there is one; and of a norm after each sublayer."""
    found = []
    if model.shape != "encoder_decoder":
        unused = {
            "NUM_ENCODER_LAYERS": (model.num_encoder_layers, model.num_layers),
            "ENCODER_MOE_EVERY": (model.encoder_moe_every, model.moe_every),
        }
        found += [
            f"{macro} = {value} means nothing to ARCHITECTURE = {model.shape!r}: leave "
            "it out"
            for macro, (value, same) in unused.items()
            if value not in (0, -1, same)
        ]
    if model.num_encoder_layers < 0:
        found.append(
            f"NUM_ENCODER_LAYERS = {model.num_encoder_layers}: must be at least 1"
        )
    if model.norm_epsilon < 0:
        found.append(f"NORM_EPSILON = {model.norm_epsilon}: cannot be negative")
    if model.token_types < 0:
        found.append(f"TOKEN_TYPES = {model.token_types}: cannot be negative")
    if model.relative_buckets % 2 and model.shape != "decoder":
        found.append(
            f"RELATIVE_BUCKETS = {model.relative_buckets}: an encoder has half of them "
            "for each side; use an even number"
        )
    return found


def _execution_problems(
    model: ModelSettings, execution: ExecutionSettings
) -> list[str]:
    """Pieces that do not divide, and rooms that are too small."""
    found, chunks = [], execution.vocab_chunks
    if chunks < 1 or model.vocab_size % max(chunks, 1):
        found.append(
            f"VOCAB_CHUNKS = {chunks} does not divide VOCAB_SIZE = {model.vocab_size}"
        )
    if execution.attention_block < 0:
        found.append(
            f"ATTENTION_BLOCK = {execution.attention_block}: 0 attends to all at once"
        )
    if architecture.has_experts(model) and execution.row_budget < 1:
        found.append(f"ROW_BUDGET = {execution.row_budget}: must be at least 1")
    return found


def _attention_problems(model: ModelSettings, length: int) -> list[str]:
    """Heads, positions, and the settings of positions that the model has not."""
    found = []
    heads = model.num_kv_heads
    if heads < 0 or (heads and model.num_heads % heads):
        found.append(
            f"NUM_KV_HEADS = {heads} does not divide NUM_HEADS = {model.num_heads}"
        )
    if any(window < 0 for window in model.attention_windows):
        found.append(
            f"ATTENTION_WINDOWS = {model.attention_windows}: a window has 1 place or "
            "more; 0 sees all"
        )
    rotary = model.positions == "rotary"
    relative = model.positions in ("relative", "relative_per_layer")
    learned = model.positions == "learned"
    if rotary and model.head_dim % 2:
        found.append(
            f"HEAD_DIM = {model.head_dim}: rotary positions turn pairs, so it must be "
            "even"
        )
    if learned and model.max_positions < length:
        found.append(
            f"MAX_POSITIONS = {model.max_positions}: POSITIONS = 'learned' needs one "
            f"for each of the {length} tokens of a row"
        )
    buckets, farthest = model.relative_buckets, model.relative_max_distance
    if relative and (buckets < 2 or farthest <= buckets // 2):
        found.append(
            f"RELATIVE_BUCKETS = {buckets} and RELATIVE_MAX_DISTANCE = {farthest}: "
            "there must be 2 at least, and half of them less than the distance"
        )
    default = ModelSettings(1, 1, 1, 1, 1, 1)
    belongs_to = {
        "ROPE_BASE": ("rope_base", rotary),
        "RELATIVE_BUCKETS": ("relative_buckets", relative),
        "RELATIVE_MAX_DISTANCE": ("relative_max_distance", relative),
        "MAX_POSITIONS": ("max_positions", learned),
    }
    for macro, (field, used) in belongs_to.items():
        value, unused = getattr(model, field), getattr(default, field)
        if not used and value != unused:
            found.append(
                f"{macro} = {value} means nothing to POSITIONS = {model.positions!r}: "
                f"leave it at {unused}"
            )
    return found


def _fraction_problems(fractions: dict[str, float]) -> list[str]:
    return [
        f"{macro} = {x}: must be in [0, 1)"
        for macro, x in fractions.items()
        if not 0 <= x < 1
    ]


def _expert_problems(model: ModelSettings, execution: ExecutionSettings) -> list[str]:
    """How many experts, how wide, and how they drop activations."""
    found = []
    if model.num_experts < 1:
        found.append(f"NUM_EXPERTS = {model.num_experts}: must be at least 1")
    if model.expert_mlp_dim < 1:
        found.append(f"EXPERT_MLP_DIM = {model.expert_mlp_dim}: must be at least 1")
    if model.shared_expert_mlp_dim < 0:
        found.append(
            f"SHARED_EXPERT_MLP_DIM = {model.shared_expert_mlp_dim}: 0 means none"
        )
    if model.expert_dropout > 0 and execution.transport not in ("auto", *PADDED):
        found.append(
            f"EXPERT_DROPOUT_RATE = {model.expert_dropout} is drawn per capacity slot: "
            f"TRANSPORT = {execution.transport!r} has none; use 'all_to_all' or 'auto'"
        )
    return found + _fraction_problems({"EXPERT_DROPOUT_RATE": model.expert_dropout})


def _number_problems(model: ModelSettings, router: RouterSettings) -> list[str]:
    """Numbers that a router of any family must not have."""
    at_least_1 = {
        "NUM_PROTOTYPES": router.num_prototypes,
        "NUM_EXPERT_GROUPS": router.num_expert_groups,
        "NUM_SELECTED_GROUPS": router.num_selected_groups,
        "SINKHORN_ITERATIONS": router.sinkhorn_iterations,
        "GROUP_ROWS": router.group_rows,
        "CAPACITY_MULTIPLE": router.capacity_multiple,
    }
    at_least_0 = {
        "EXPERT_CHOICE_CAP": router.max_experts_per_token,
        "LOGIT_NOISE": router.logit_noise,
        "TRAIN_CAPACITY_FACTOR": router.capacity_factor,
        "EVAL_CAPACITY_FACTOR": router.eval_capacity_factor,
        "MIN_EXPERT_CAPACITY": router.min_capacity,
        "ROUTER_BIAS_RATE": router.bias_update_rate,
    }
    found = [f"{m} = {x}: must be at least 1" for m, x in at_least_1.items() if x < 1]
    found += [f"{m} = {x}: cannot be negative" for m, x in at_least_0.items() if x < 0]
    found += _fraction_problems({"JITTER_NOISE": router.jitter})
    if router.gate_scale <= 0:
        found.append(f"GATE_SCALE = {router.gate_scale}: must be above 0")
    experts = max(model.num_experts, 1)
    pool, of = experts, f"NUM_EXPERTS = {model.num_experts}"
    if router.family == "prototypes" and router.num_prototypes >= 1:
        pool = experts // router.num_prototypes
        of = f"the {pool} experts of a prototype"
    if not 1 <= router.num_selected <= max(pool, 1):
        found.append(
            f"NUM_SELECTED_EXPERTS = {router.num_selected}: must be between 1 and {of}"
        )
    return found


def _family_problems(
    model: ModelSettings, router: RouterSettings, loss: LossSettings
) -> list[str]:
    """Settings that the chosen router cannot have, or would ignore."""
    K, family = router.num_selected, router.family
    found = _foreign_settings(router)
    if router.second_policy == "random" and K != 2:
        found.append(
            "SECOND_EXPERT_POLICY = 'random' is defined for NUM_SELECTED_EXPERTS = 2, "
            f"not {K}"
        )
    if router.renormalize != "no" and K == 1:
        found.append(
            f"RENORMALIZE_GATES = {router.renormalize!r} with NUM_SELECTED_EXPERTS = 1 "
            "makes each gate 1, and the router would learn nothing from the loss: set "
            "it to 'no'"
        )
    if router.overflow == "spill" and model.num_experts < 2 * K:
        found.append(
            f"OVERFLOW = 'spill' needs another expert for each of NUM_SELECTED_EXPERTS "
            f"= {K} choices: NUM_EXPERTS = {model.num_experts} are fewer than {2 * K}"
        )
    if router.is_own:
        found += _own_problems(router)
    elif router.options:
        found.append(
            f"ROUTER_OPTIONS = {router.options} means nothing to ROUTER = {family!r}, "
            "only to one of your own: set it to {}"
        )
    by_family = {
        "prototypes": _prototype_problems,
        "expert_choice": _cap_problems,
        "token_choice": _expert_group_problems,
    }
    if family in by_family:
        found += by_family[family](model, router)
    found += _load_problems(router, loss)
    return found


def _foreign_settings(router: RouterSettings) -> list[str]:
    """Settings of other routers than the chosen one."""
    default = RouterSettings()
    found = []
    belongs_to = {
        "NUM_PROTOTYPES": ("num_prototypes", ("prototypes",)),
        "EXPERT_CHOICE_CAP": ("max_experts_per_token", ("expert_choice",)),
        "SINKHORN_ITERATIONS": ("sinkhorn_iterations", ("sinkhorn",)),
        "HASH_SEED": ("hash_seed", ("hashed",)),
        "ROUTER_SCORES": ("scores", ("token_choice",)),
        "NUM_EXPERT_GROUPS": ("num_expert_groups", ("token_choice",)),
        "NUM_SELECTED_GROUPS": ("num_selected_groups", ("token_choice",)),
        "EXPERT_GROUP_SCORE": ("group_score", ("token_choice",)),
        "SECOND_EXPERT_POLICY": ("second_policy", ("token_choice",)),
        "OVERFLOW": ("overflow", ("token_choice",)),
        "LOGIT_NOISE": ("logit_noise", ("token_choice",)),
        "ROUTER_BIAS": ("selection_bias", ("token_choice",)),
        "JITTER_NOISE": (
            "jitter",
            ("token_choice", "prototypes", "expert_choice", "sinkhorn", _OWN),
        ),
        "RENORMALIZE_GATES": (
            "renormalize",
            ("token_choice", "prototypes", "sinkhorn", _OWN),
        ),
        "ROUTER_DTYPE": (
            "logit_dtype",
            ("token_choice", "prototypes", "expert_choice", "sinkhorn", _OWN),
        ),
        "SLOT_ORDER": (
            "slot_order",
            ("token_choice", "prototypes", "hashed", "sinkhorn", _OWN),
        ),
    }
    family = _OWN if router.is_own else router.family
    for macro, (field, families) in belongs_to.items():
        value, default_value = getattr(router, field), getattr(default, field)
        if family not in families and value != default_value:
            found.append(
                f"{macro} = {value!r} means nothing to ROUTER = {router.family!r}, "
                f"only to {', '.join(map(repr, families))}: set it to {default_value!r}"
            )
    return found


def _own_problems(router: RouterSettings) -> list[str]:
    """What `assign` does not do for a router of somebody's own, and what is unread."""
    name, found = f"ROUTER = {router.family!r}", []
    if router.renormalize == "before_drop":
        found.append(
            f"RENORMALIZE_GATES = 'before_drop' is for {name} itself to do: set it to "
            "'no' or 'after_drop'"
        )
    if router.slot_order == "batch_priority":
        found.append(
            f"SLOT_ORDER = 'batch_priority' is for {name} itself to do, by the "
            "priorities of its Choices: set it to 'token_major' or 'choice_major'"
        )
    if not router.reads_logits:
        found += [
            f"{macro} = {value!r} means nothing to {name}, which reads no logits: set "
            f"it to {default!r}"
            for macro, value, default in (
                ("JITTER_NOISE", router.jitter, 0.0),
                ("ROUTER_DTYPE", router.logit_dtype, "float32"),
            )
            if value != default
        ]
    return found


def _load_problems(router: RouterSettings, loss: LossSettings) -> list[str]:
    """What V-MoE's load loss needs, and what it does not describe."""
    if not loss.load_weight:
        return []
    factor = f"LOAD_LOSS_FACTOR = {loss.load_weight}"
    found = []
    if not router.logit_noise:
        found.append(
            f"{factor} needs noise to take chances with: set LOGIT_NOISE = 1.0, as "
            "V-MoE does, or LOAD_LOSS_FACTOR = 0.0"
        )
    if router.selection_bias or router.num_selected_groups < router.num_expert_groups:
        found.append(
            f"{factor} takes chances among the K largest logits, but ROUTER_BIAS and "
            "NUM_SELECTED_GROUPS choose otherwise: set it to 0.0"
        )
    return found


def _prototype_problems(model: ModelSettings, router: RouterSettings) -> list[str]:
    """Experts that do not divide into prototypes, and gates across them."""
    found = []
    if model.num_experts % max(router.num_prototypes, 1):
        found.append(
            f"NUM_EXPERTS = {model.num_experts} does not divide into NUM_PROTOTYPES = "
            f"{router.num_prototypes} groups"
        )
    if router.renormalize == "after_drop":
        found.append(
            "RENORMALIZE_GATES = 'after_drop' would divide over all prototypes: with "
            "ROUTER = 'prototypes' use 'before_drop', within each, or 'no'"
        )
    return found


def _cap_problems(model: ModelSettings, router: RouterSettings) -> list[str]:
    """A cap on the experts of a token that leaves their slots nobody to take."""
    cap, E, S = router.max_experts_per_token, model.num_experts, router.group_size
    if cap < 1 or E < 1 or S < 1 or min(router.capacity_factor, cap) <= 0:
        return []
    slots = capacity(router, E, train=True)
    if slots * E <= cap * S:
        return []
    return [
        f"EXPERT_CHOICE_CAP = {cap} lets {S} tokens take {cap * S} slots, and "
        f"NUM_EXPERTS = {E} experts have {slots * E}: raise it, or lower "
        "TRAIN_CAPACITY_FACTOR"
    ]


def _expert_group_problems(model: ModelSettings, router: RouterSettings) -> list[str]:
    """Choices limited to some groups of experts (DeepSeek-V3, section 2.1.2)."""
    groups, selected = router.num_expert_groups, router.num_selected_groups
    if groups < 1 or selected < 1:
        return []
    found = []
    if model.num_experts % groups:
        found.append(
            f"NUM_EXPERTS = {model.num_experts} does not divide into NUM_EXPERT_GROUPS "
            f"= {groups}"
        )
    if selected > groups:
        found.append(
            f"NUM_SELECTED_GROUPS = {selected} is more than NUM_EXPERT_GROUPS = "
            f"{groups}"
        )
    reachable = model.num_experts // groups * selected
    wanted = router.num_selected * (2 if router.overflow == "spill" else 1)
    if reachable < wanted and selected <= groups and groups > 1:
        found.append(
            f"NUM_SELECTED_GROUPS = {selected} groups hold {reachable} experts, fewer "
            f"than the {wanted} that NUM_SELECTED_EXPERTS = {router.num_selected} asks "
            "for"
        )
    if router.group_score == "top2_sum" and model.num_experts // groups < 2:
        found.append(
            "EXPERT_GROUP_SCORE = 'top2_sum' needs groups of at least 2 experts, not "
            f"{model.num_experts // groups}"
        )
    return found


def _capacity_problems(
    model: ModelSettings, router: RouterSettings, length: int
) -> list[str]:
    """Groups that do not divide a sequence, and experts without a slot."""
    found = _group_problems(router, length)
    factors = (router.capacity_factor, router.eval_capacity_factor)
    sizes = (router.group_size, router.capacity_multiple, model.num_experts)
    if min(*factors, router.min_capacity) < 0 or min(sizes) < 1:
        return found  # problems of their own
    if router.family == "expert_choice" and router.capacity_factor == 0:
        found.append(
            "TRAIN_CAPACITY_FACTOR = 0 with ROUTER = 'expert_choice': experts that "
            "choose without a limit all take every token; 1.0 or 2.0 are usual"
        )
    for macro, train in (
        ("TRAIN_CAPACITY_FACTOR", True),
        ("EVAL_CAPACITY_FACTOR", False),
    ):
        if capacity(router, model.num_experts, train=train) < 1:
            found.append(
                f"{macro} leaves every expert without a slot: {router.group_size} "
                f"tokens per group over NUM_EXPERTS = {model.num_experts} round to 0; "
                "raise it, GROUP_SIZE or MIN_EXPERT_CAPACITY, or set CAPACITY_ROUNDING "
                "= 'ceil'"
            )
    return found


def _group_problems(router: RouterSettings, length: int) -> list[str]:
    """Groups take as many tokens of each of their rows, and cut rows evenly."""
    S, rows = router.group_size, router.group_rows
    if rows < 1:
        return []  # a problem of its own
    if S < 1 or S % rows or length % (S // rows):
        sizes = [d * rows for d in range(1, length + 1) if length % d == 0]
        below = [size for size in sizes if size < S][-1:]
        above = [size for size in sizes if size > S][:1]
        of_each = f", cut over GROUP_ROWS = {rows} rows," if rows > 1 else ""
        return [
            f"GROUP_SIZE = {S}{of_each} does not divide a sequence of {length} tokens: "
            f"nearest are {' and '.join(map(str, below + above))}"
        ]
    return []


def leaks(router: RouterSettings) -> list[str]:
    """Ways for a token to depend on later ones, in a model that predicts them."""
    reasons = []
    if router.family == "expert_choice":
        reasons.append(
            "ROUTER = 'expert_choice': an expert takes the best tokens of a whole "
            "group, so whether it takes one depends on later ones"
        )
    if router.family == "sinkhorn":
        reasons.append(
            "ROUTER = 'sinkhorn': in training an assignment is balanced over a whole "
            "group, so each choice depends on later tokens"
        )
    if router.own is not None and not router.own.causal:
        reasons.append(
            f"ROUTER = {router.family!r} says that it is not causal: what becomes of a "
            "token may depend on later ones"
        )
    if router.slot_order == "batch_priority":
        reasons.append(
            "SLOT_ORDER = 'batch_priority': slots go to the surest tokens first, so a "
            "later token can evict an earlier one"
        )
    if router.overflow == "spill":
        reasons.append(
            "OVERFLOW = 'spill': the second pass gives out slots after all first "
            "choices, so an earlier token's second chance depends on later tokens"
        )
    return reasons
