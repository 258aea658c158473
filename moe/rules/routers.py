"""Rules of how tokens choose: a router's own settings, and those of others."""

from moe.routing.capacity import capacity
from moe.rules.fractions import fraction_problems
from moe.settings import LossSettings, ModelSettings, RouterSettings

_OWN = "module:name"


def number_problems(model: ModelSettings, router: RouterSettings) -> list[str]:
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
    found += fraction_problems({"JITTER_NOISE": router.jitter})
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


def family_problems(
    model: ModelSettings, router: RouterSettings, loss: LossSettings
) -> list[str]:
    """Settings that the chosen router cannot have, or would ignore."""
    K, family = router.num_selected, router.family
    found = _foreign_settings(router, model.first_hash_layers)
    if family == "hashed" and model.first_hash_layers:
        found.append(
            f"FIRST_HASH_LAYERS = {model.first_hash_layers} means nothing to ROUTER = "
            "'hashed', of which all layers are such: set it to 0"
        )
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
    if router.selection_bias and router.bias_update == "quantile":
        found += _quantile_problems(model, router)
    found += _load_problems(router, loss)
    return found


# What a table has a use for if its gates are scores.
_WEIGHING = (
    *("scores", "renormalize", "logit_bias", "gate_place", "jitter", "logit_dtype"),
)


def _foreign_settings(router: RouterSettings, num_hash_layers: int) -> list[str]:
    """Settings of other routers than the chosen one, and than that of hash layers."""
    default = RouterSettings()
    found = []
    belongs_to = {
        "NUM_PROTOTYPES": ("num_prototypes", ("prototypes",)),
        "EXPERT_CHOICE_CAP": ("max_experts_per_token", ("expert_choice",)),
        "SINKHORN_ITERATIONS": ("sinkhorn_iterations", ("sinkhorn",)),
        "HASH_SEED": ("hash_seed", ("hashed",)),
        "HASH_GATES": ("hash_gates", ("hashed",)),
        "ROUTER_SCORES": ("scores", ("token_choice",)),
        "NUM_EXPERT_GROUPS": ("num_expert_groups", ("token_choice",)),
        "NUM_SELECTED_GROUPS": ("num_selected_groups", ("token_choice",)),
        "EXPERT_GROUP_SCORE": ("group_score", ("token_choice",)),
        "SECOND_EXPERT_POLICY": ("second_policy", ("token_choice",)),
        "OVERFLOW": ("overflow", ("token_choice",)),
        "LOGIT_NOISE": ("logit_noise", ("token_choice",)),
        "ROUTER_BIAS": ("selection_bias", ("token_choice",)),
        "ROUTER_LOGIT_BIAS": (
            "logit_bias",
            ("token_choice", "prototypes", "expert_choice", "sinkhorn", _OWN),
        ),
        "GATE_PLACE": (
            "gate_place",
            ("token_choice", "prototypes", "expert_choice", "sinkhorn", _OWN),
        ),
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
        if "hashed" in families and num_hash_layers:
            continue
        if family == "hashed" and router.reads_logits and field in _WEIGHING:
            continue
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
                ("ROUTER_LOGIT_BIAS", router.logit_bias, False),
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


def _quantile_problems(model: ModelSettings, router: RouterSettings) -> list[str]:
    """What biases that are quantiles cannot be of, and the step that they have not."""
    asked, found = "ROUTER_BIAS_UPDATE = 'quantile'", []
    if router.scores == "sqrt_softplus":
        found.append(
            f"{asked} counts scores in [0, 1], which ROUTER_SCORES = 'sqrt_softplus' "
            "exceeds: set it to 'sigmoid' or 'softmax', or ROUTER_BIAS_UPDATE to 'sign'"
        )
    if router.num_selected_groups < router.num_expert_groups:
        found.append(
            f"{asked} has all experts compete, but NUM_SELECTED_GROUPS = "
            f"{router.num_selected_groups} of {router.num_expert_groups} bars some: "
            "set ROUTER_BIAS_UPDATE to 'sign'"
        )
    if router.num_selected >= model.num_experts:
        found.append(
            f"{asked} needs an expert that is not chosen: NUM_SELECTED_EXPERTS = "
            f"{router.num_selected} are all of NUM_EXPERTS = {model.num_experts}"
        )
    unused = RouterSettings().bias_update_rate
    if router.bias_update_rate != unused:
        found.append(
            f"ROUTER_BIAS_RATE = {router.bias_update_rate} means nothing to {asked}: "
            f"leave it at {unused}"
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
