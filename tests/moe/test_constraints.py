"""The rules that settings must obey: each one broken, and what is then said."""

import dataclasses
from typing import Any

import pytest

from moe.constraints import problems
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    RouterSettings,
    TrainSettings,
)

pytestmark = pytest.mark.fast

L = 64
LATENT = {"attention": "latent", "kv_latent_dim": 8, "rope_head_dim": 2}
SETTINGS = {
    "model": ModelSettings(
        vocab_size=32, num_layers=4, model_dim=8, num_heads=2, head_dim=4, mlp_dim=16
    ),
    "router": RouterSettings(group_size=L),
    "execution": ExecutionSettings(),
    "loss": LossSettings(),
    "train": TrainSettings(batch_size=8),
}

SCALED = {"rope_scaling": "by_parts", "rope_factor": 2.0, "rope_original_length": 32}


def faults(**changes: Any) -> list[str]:
    """Problems of the settings above with some of their fields changed.

    No field name is in two of the records.
    """
    records = {
        name: dataclasses.replace(
            record,
            **{
                field.name: changes.pop(field.name)
                for field in dataclasses.fields(record)
                if field.name in changes
            },
        )
        for name, record in SETTINGS.items()
    }
    assert not changes, "no record has this field"
    return problems(**records, length=L)


def prototypes(**changes: Any) -> dict[str, Any]:
    return {"family": "prototypes", "num_prototypes": 4} | changes


def expert_choice(**changes: Any) -> dict[str, Any]:
    return {"family": "expert_choice", "allow_future_leak": True} | changes


def sinkhorn(**changes: Any) -> dict[str, Any]:
    return {"family": "sinkhorn", "allow_future_leak": True} | changes


QUANTILE = {"selection_bias": True, "bias_update": "quantile"}


def spill(**changes: Any) -> dict[str, Any]:
    return {"overflow": "spill", "allow_future_leak": True} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        prototypes(num_selected=2, renormalize="before_drop", jitter=0.1),
        expert_choice(max_experts_per_token=2, jitter=0.1),
        {"family": "hashed", "hash_seed": 3, "slot_order": "choice_major"},
        {"family": "hashed", "hash_gates": "scores", "scores": "sqrt_softplus"}
        | {"num_selected": 2, "renormalize": "before_drop", "logit_bias": True},
        {"first_hash_layers": 1, "hash_seed": 3, "hash_gates": "scores"}
        | {"selection_bias": True, "scores": "sqrt_softplus"},
        sinkhorn(sinkhorn_iterations=4, renormalize="before_drop", num_selected=2),
        spill(slot_order="batch_priority", num_selected=4),
        {
            "num_selected": 4,
            "scores": "sigmoid",
            "renormalize": "after_drop",
            "gate_scale": 2.5,
            "num_expert_groups": 4,
            "num_selected_groups": 2,
            "group_score": "top2_sum",
            "selection_bias": True,
        },
        {"logit_noise": 1.0, "load_weight": 0.005, "importance_weight": 0.005},
        {"num_selected": 2, "second_policy": "random"},
        {"selection_bias": True, "bias_update": "quantile", "scores": "sigmoid"},
        {"num_layers": 7, "first_dense_layers": 3},
        {"expert_dropout": 0.4, "transport": "all_to_all"},
        {"expert_dropout": 0.4},
    ],
)
def test_settings_that_obey_the_rules(changes):
    assert faults(**changes) == []


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"vocab_size": 0}, "VOCAB_SIZE = 0: must be at least 1"),
        ({"num_layers": 0}, "NUM_LAYERS = 0: must be at least 1"),
        ({"model_dim": 0}, "EMBED_DIM = 0: must be at least 1"),
        ({"num_heads": 0}, "NUM_HEADS = 0: must be at least 1"),
        ({"head_dim": 0}, "HEAD_DIM = 0: must be at least 1"),
        ({"head_dim": 3}, "HEAD_DIM = 3: rotary positions turn pairs"),
        ({"mlp_dim": 0}, "MLP_DIM = 0: must be at least 1"),
        ({"batch_size": 0}, "BATCH_SIZE = 0: must be at least 1"),
        ({"microbatches": 0}, "MICROBATCHES = 0: must be at least 1"),
        ({"train_steps": 0}, "TRAIN_STEPS = 0: must be at least 1"),
        ({"dropout": 1.0}, "DROPOUT_RATE = 1.0: must be in [0, 1)"),
        ({"dropout": -0.1}, "DROPOUT_RATE = -0.1: must be in [0, 1)"),
        ({"init_scale": 0.0}, "INIT_SCALE = 0.0: must be above 0"),
        ({"residual_scale": 0.0}, "RESIDUAL_SCALE = 0.0: must be above 0"),
        ({"logit_scale": -1.0}, "LOGIT_SCALE = -1.0: must be above 0"),
        ({"embed_scale": -1.0}, "EMBED_SCALE = -1.0: cannot be negative"),
        ({"moe_every": -1}, "MOE_EVERY = -1: 0 means dense"),
        (
            {"output_transform": True, "activation": "geglu"},
            "OUTPUT_TRANSFORM = True has no gate for ACTIVATION = 'geglu'",
        ),
        # Layers.
        ({"first_dense_layers": -2}, "FIRST_DENSE_LAYERS = -2: cannot be negative"),
        (
            {"first_dense_layers": 3},
            "FIRST_DENSE_LAYERS = 3 leaves 1 of NUM_LAYERS = 4 for a period of "
            "MOE_EVERY = 2",
        ),
        (
            {"num_layers": 5},
            "NUM_LAYERS = 5 is not a multiple of MOE_EVERY = 2: layers repeat",
        ),
        (
            {"first_dense_layers": 1},
            "NUM_LAYERS = 4 less FIRST_DENSE_LAYERS = 1 is not a multiple of "
            "MOE_EVERY = 2",
        ),
        (
            {"first_hash_layers": 3},
            "FIRST_HASH_LAYERS = 3: must be between 0 and the 2 sparse layers of a",
        ),
        ({"first_hash_layers": -1}, "FIRST_HASH_LAYERS = -1: must be between 0 and"),
        (
            {"first_hash_layers": 1, "family": "hashed"},
            "FIRST_HASH_LAYERS = 1 means nothing to ROUTER = 'hashed'",
        ),
        ({"num_experts": 0}, "NUM_EXPERTS = 0: must be at least 1"),
        ({"expert_mlp_dim": 0}, "EXPERT_MLP_DIM = 0: must be at least 1"),
        ({"shared_expert_mlp_dim": -1}, "SHARED_EXPERT_MLP_DIM = -1: 0 means none"),
        ({"shared_expert_gate": True}, "SHARED_EXPERT_GATE = True means nothing to"),
        ({"expert_dropout": 1.0}, "EXPERT_DROPOUT_RATE = 1.0: must be in [0, 1)"),
        (
            {"expert_dropout": 0.4, "transport": "ring"},
            "EXPERT_DROPOUT_RATE = 0.4 is drawn per capacity slot: TRANSPORT = 'ring'",
        ),
        (
            {"expert_dropout": 0.4, "transport": "ragged"},
            "EXPERT_DROPOUT_RATE = 0.4 is drawn per capacity slot: TRANSPORT = "
            "'ragged'",
        ),
        # Numbers.
        (prototypes(num_prototypes=0), "NUM_PROTOTYPES = 0: must be at least 1"),
        ({"num_expert_groups": 0}, "NUM_EXPERT_GROUPS = 0: must be at least 1"),
        ({"num_selected_groups": 0}, "NUM_SELECTED_GROUPS = 0: must be at least 1"),
        (sinkhorn(sinkhorn_iterations=0), "SINKHORN_ITERATIONS = 0: must be at least"),
        ({"capacity_multiple": 0}, "CAPACITY_MULTIPLE = 0: must be at least 1"),
        ({"group_rows": 0}, "GROUP_ROWS = 0: must be at least 1"),
        (
            {"group_rows": 3},
            "GROUP_SIZE = 64, cut over GROUP_ROWS = 3 rows, does not divide a sequence "
            "of 64 tokens: nearest are 48 and 96",
        ),
        (
            {"group_rows": 2, "group_size": 96},
            "GROUP_SIZE = 96, cut over GROUP_ROWS = 2 rows, does not divide a sequence "
            "of 64 tokens: nearest are 64 and 128",
        ),
        ({"attention_windows": (4, -1)}, "ATTENTION_WINDOWS = (4, -1): a window has"),
        # Tokens after the next.
        ({"ahead_weight": 0.1}, "AHEAD_LOSS_FACTOR = 0.1 means nothing to PREDICT_"),
        ({"predict_ahead": -1}, "PREDICT_AHEAD = -1: must be from 1 to 63"),
        ({"predict_ahead": 64}, "PREDICT_AHEAD = 64: must be from 1 to 63"),
        ({"predict_ahead": 1, "norm_place": "after"}, "PREDICT_AHEAD = 1 joins what"),
        ({"predict_ahead": 1, "shape": "encoder"}, "PREDICT_AHEAD = 1 is for ARCH"),
        # Latent attention.
        (
            LATENT | {"kv_latent_dim": 0},
            "KV_LATENT_DIM = 0: ATTENTION = 'latent'",
        ),
        (LATENT | {"rope_head_dim": 3}, "ROPE_HEAD_DIM = 3: rotary positions turn"),
        (LATENT | {"query_latent_dim": -1}, "QUERY_LATENT_DIM = -1: cannot be"),
        (LATENT | {"latent_norm_epsilon": 0.0}, "LATENT_NORM_EPSILON = 0.0: must be"),
        (LATENT | {"positions": "relative"}, "POSITIONS = 'relative': ATTENTION ="),
        (LATENT | {"num_kv_heads": 2}, "NUM_KV_HEADS = 2 means nothing to ATTENTION"),
        (
            {"value_head_dim": 8},
            "VALUE_HEAD_DIM = 8 means nothing to ATTENTION = 'heads'",
        ),
        ({"row_budget": 0.5}, "ROW_BUDGET = 0.5: must be at least 1"),
        (
            expert_choice(max_experts_per_token=1, capacity_factor=2.0),
            "EXPERT_CHOICE_CAP = 1 lets 64 tokens take 64 slots, and NUM_EXPERTS = 8 "
            "experts have 128",
        ),
        (
            {"family": "prototypes", "num_prototypes": 2, "num_selected": 2}
            | {"renormalize": "after_drop"},
            "RENORMALIZE_GATES = 'after_drop' would divide over all prototypes",
        ),
        (
            expert_choice(max_experts_per_token=-1),
            "EXPERT_CHOICE_CAP = -1: cannot be negative",
        ),
        ({"logit_noise": -1.0}, "LOGIT_NOISE = -1.0: cannot be negative"),
        (
            {"capacity_factor": -1.0},
            "TRAIN_CAPACITY_FACTOR = -1.0: cannot be negative",
        ),
        (
            {"eval_capacity_factor": -1.0},
            "EVAL_CAPACITY_FACTOR = -1.0: cannot be negative",
        ),
        ({"min_capacity": -1}, "MIN_EXPERT_CAPACITY = -1: cannot be negative"),
        (
            {"selection_bias": True, "bias_update_rate": -1.0},
            "ROUTER_BIAS_RATE = -1.0: cannot be negative",
        ),
        (
            {"bias_update_rate": 0.01},
            "ROUTER_BIAS_RATE = 0.01 means nothing to ROUTER_BIAS = False: leave it at "
            "0.001, or set ROUTER_BIAS",
        ),
        (
            {"bias_update": "quantile"},
            "ROUTER_BIAS_UPDATE = 'quantile' means nothing to ROUTER_BIAS = False",
        ),
        (
            QUANTILE | {"bias_update_rate": 0.0},
            "ROUTER_BIAS_RATE = 0.0 means nothing to ROUTER_BIAS_UPDATE = 'quantile': "
            "leave it at 0.001",
        ),
        (
            QUANTILE | {"scores": "sqrt_softplus"},
            "ROUTER_BIAS_UPDATE = 'quantile' counts scores in [0, 1]",
        ),
        (
            QUANTILE | {"num_expert_groups": 4, "num_selected_groups": 2},
            "ROUTER_BIAS_UPDATE = 'quantile' has all experts compete",
        ),
        (
            QUANTILE | {"num_selected": 8},
            "ROUTER_BIAS_UPDATE = 'quantile' needs an expert that is not chosen",
        ),
        ({"jitter": 1.0}, "JITTER_NOISE = 1.0: must be in [0, 1)"),
        ({"gate_scale": 0.0}, "GATE_SCALE = 0.0: must be above 0"),
        (
            {"num_selected": 0},
            "NUM_SELECTED_EXPERTS = 0: must be between 1 and NUM_EXPERTS = 8",
        ),
        (
            {"num_selected": 9},
            "NUM_SELECTED_EXPERTS = 9: must be between 1 and NUM_EXPERTS = 8",
        ),
        (
            prototypes(num_selected=3),
            "NUM_SELECTED_EXPERTS = 3: must be between 1 and the 2 experts of a "
            "prototype",
        ),
        # What a router cannot have.
        (
            prototypes(num_prototypes=3),
            "NUM_EXPERTS = 8 does not divide into NUM_PROTOTYPES = 3 groups",
        ),
        (
            {"second_policy": "random"},
            "SECOND_EXPERT_POLICY = 'random' is defined for NUM_SELECTED_EXPERTS = 2, "
            "not 1",
        ),
        (
            {"renormalize": "before_drop"},
            "RENORMALIZE_GATES = 'before_drop' with NUM_SELECTED_EXPERTS = 1 makes "
            "each gate 1",
        ),
        (
            {"renormalize": "before_drop", "scores": "sigmoid"},
            "RENORMALIZE_GATES = 'before_drop' with NUM_SELECTED_EXPERTS = 1 makes "
            "each gate 1",
        ),
        (
            {"renormalize": "after_drop"},
            "RENORMALIZE_GATES = 'after_drop' with NUM_SELECTED_EXPERTS = 1 makes "
            "each gate 1",
        ),
        (
            spill(num_selected=5),
            "OVERFLOW = 'spill' needs another expert for each of NUM_SELECTED_EXPERTS "
            "= 5 choices: NUM_EXPERTS = 8 are fewer than 10",
        ),
        (
            {"num_expert_groups": 3, "num_selected_groups": 3},
            "NUM_EXPERTS = 8 does not divide into NUM_EXPERT_GROUPS = 3",
        ),
        (
            {"num_expert_groups": 2, "num_selected_groups": 3},
            "NUM_SELECTED_GROUPS = 3 is more than NUM_EXPERT_GROUPS = 2",
        ),
        (
            {"num_expert_groups": 4, "num_selected": 3},
            "NUM_SELECTED_GROUPS = 1 groups hold 2 experts, fewer than the 3 that "
            "NUM_SELECTED_EXPERTS = 3 asks for",
        ),
        (
            spill(num_expert_groups=4, num_selected=2),
            "NUM_SELECTED_GROUPS = 1 groups hold 2 experts, fewer than the 4 that "
            "NUM_SELECTED_EXPERTS = 2 asks for",
        ),
        (
            {"num_expert_groups": 8, "group_score": "top2_sum"},
            "EXPERT_GROUP_SCORE = 'top2_sum' needs groups of at least 2 experts, not 1",
        ),
        (
            {"load_weight": 0.005},
            "LOAD_LOSS_FACTOR = 0.005 needs noise to take chances with",
        ),
        # Groups and slots.
        (
            {"group_size": 48},
            "GROUP_SIZE = 48 does not divide a sequence of 64 tokens: nearest are 32 "
            "and 64",
        ),
        ({"group_size": 0}, "GROUP_SIZE = 0 does not divide a sequence of 64 tokens"),
        (
            expert_choice(capacity_factor=0.0),
            "TRAIN_CAPACITY_FACTOR = 0 with ROUTER = 'expert_choice'",
        ),
        (
            {"capacity_factor": 0.1, "min_capacity": 0, "capacity_rounding": "floor"},
            "TRAIN_CAPACITY_FACTOR leaves every expert without a slot: 64 tokens per "
            "group over NUM_EXPERTS = 8 round to 0",
        ),
        (
            {
                "eval_capacity_factor": 0.05,
                "min_capacity": 0,
                "capacity_rounding": "half_even",
            },
            "EVAL_CAPACITY_FACTOR leaves every expert without a slot: 64 tokens per "
            "group",
        ),
    ],
)
def test_a_broken_rule_is_told_with_its_value(changes, beginning):
    (fault,) = faults(**changes)  # one mistake is one line
    assert fault.startswith(beginning)
    assert "\n" not in fault


# What each router has a use for, beside the default of the knob.
FAMILIES = ("token_choice", "prototypes", "expert_choice", "hashed", "sinkhorn")
BELONGS_TO = {
    "NUM_PROTOTYPES": ("num_prototypes", 2, {"prototypes"}),
    "EXPERT_CHOICE_CAP": ("max_experts_per_token", 2, {"expert_choice"}),
    "SINKHORN_ITERATIONS": ("sinkhorn_iterations", 4, {"sinkhorn"}),
    "HASH_SEED": ("hash_seed", 3, {"hashed"}),
    "HASH_GATES": ("hash_gates", "scores", {"hashed"}),
    "ROUTER_SCORES": ("scores", "sigmoid", {"token_choice"}),
    "NUM_EXPERT_GROUPS": ("num_expert_groups", 2, {"token_choice"}),
    "NUM_SELECTED_GROUPS": ("num_selected_groups", 2, {"token_choice"}),
    "EXPERT_GROUP_SCORE": ("group_score", "top2_sum", {"token_choice"}),
    "SECOND_EXPERT_POLICY": ("second_policy", "random", {"token_choice"}),
    "OVERFLOW": ("overflow", "spill", {"token_choice"}),
    "LOGIT_NOISE": ("logit_noise", 1.0, {"token_choice"}),
    "ROUTER_BIAS": ("selection_bias", True, {"token_choice"}),
    "GATE_PLACE": ("gate_place", "input", set(FAMILIES) - {"hashed"}),
    "ROUTER_LOGIT_BIAS": ("logit_bias", True, set(FAMILIES) - {"hashed"}),
    "JITTER_NOISE": ("jitter", 0.1, set(FAMILIES) - {"hashed"}),
    "RENORMALIZE_GATES": (
        "renormalize",
        "before_drop",
        {"token_choice", "prototypes", "sinkhorn"},
    ),
    "SLOT_ORDER": ("slot_order", "choice_major", set(FAMILIES) - {"expert_choice"}),
    "ROUTER_DTYPE": ("logit_dtype", "bfloat16", set(FAMILIES) - {"hashed"}),
}


@pytest.mark.parametrize("macro", BELONGS_TO)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_setting_of_another_router_is_refused_not_ignored(family, macro):
    field, value, families = BELONGS_TO[macro]
    found = faults(
        **{"family": family, "num_selected": 2, "allow_future_leak": True, field: value}
    )
    refused = [fault for fault in found if "means nothing to ROUTER" in fault]
    if family in families:
        assert refused == []
    else:
        (fault,) = refused
        default = getattr(RouterSettings(), field)
        assert fault.startswith(f"{macro} = {value!r} means nothing to ROUTER = ")
        assert fault.endswith(f"set it to {default!r}")
        assert all(repr(name) in fault for name in (family, *families))


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"family": "expert_choice"}, "ROUTER = 'expert_choice': an expert takes the "),
        ({"family": "sinkhorn"}, "ROUTER = 'sinkhorn': in training an assignment is "),
        (
            {"slot_order": "batch_priority"},
            "SLOT_ORDER = 'batch_priority': slots go to the surest tokens first",
        ),
        ({"overflow": "spill"}, "OVERFLOW = 'spill': the second pass gives out slots "),
    ],
)
def test_what_lets_tokens_depend_on_later_ones_must_be_allowed(changes, beginning):
    (fault,) = faults(**changes)
    assert fault.startswith(beginning)
    assert fault.endswith("or set ALLOW_FUTURE_LEAK = True to go on all the same")
    assert faults(**changes, allow_future_leak=True) == []


def test_every_reason_to_see_the_future_is_told():
    found = faults(slot_order="batch_priority", overflow="spill")
    assert [fault.partition(":")[0] for fault in found] == [
        "SLOT_ORDER = 'batch_priority'",
        "OVERFLOW = 'spill'",
    ]


def test_all_faults_are_listed_at_once_with_their_values():
    found = faults(
        num_layers=5,
        head_dim=3,
        dropout=1.0,
        expert_mlp_dim=0,
        num_selected=9,
        second_policy="random",
        jitter=1.0,
        capacity_factor=-1.0,
        group_size=48,
        batch_size=0,
    )
    assert sorted(fault.partition(":")[0] for fault in found) == [
        "BATCH_SIZE = 0",
        "DROPOUT_RATE = 1.0",
        "EXPERT_MLP_DIM = 0",
        "GROUP_SIZE = 48 does not divide a sequence of 64 tokens",
        "HEAD_DIM = 3",
        "JITTER_NOISE = 1.0",
        "NUM_LAYERS = 5 is not a multiple of MOE_EVERY = 2",
        "NUM_SELECTED_EXPERTS = 9",
        "SECOND_EXPERT_POLICY = 'random' is defined for NUM_SELECTED_EXPERTS = 2, "
        "not 9",
        "TRAIN_CAPACITY_FACTOR = -1.0",
    ]


def test_a_group_size_that_does_not_divide_is_told_the_nearest_that_do():
    (fault,) = faults(group_size=48)
    assert fault.endswith("nearest are 32 and 64")


def test_a_dense_model_is_not_asked_about_its_routers():
    changes = {"num_selected": 0, "group_size": 7, "family": "sinkhorn"}
    assert faults(moe_every=0, num_layers=5, **changes) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_kv_heads": 3}, "NUM_KV_HEADS = 3 does not divide NUM_HEADS = 2"),
        ({"head_dim": 3}, "HEAD_DIM = 3: rotary positions turn pairs"),
        ({"attention_block": -1}, "ATTENTION_BLOCK = -1: 0 attends to all at once"),
        ({"vocab_chunks": 3}, "VOCAB_CHUNKS = 3 does not divide VOCAB_SIZE = 32"),
        (
            {"positions": "learned", "max_positions": 63},
            "MAX_POSITIONS = 63: POSITIONS = 'learned' needs one for each of the 64",
        ),
        (
            {"positions": "relative", "relative_buckets": 1},
            "RELATIVE_BUCKETS = 1 and RELATIVE_MAX_DISTANCE = 128: there must be 2",
        ),
        (
            {"positions": "none", "rope_base": 5e5},
            "ROPE_BASE = 500000.0 means nothing to POSITIONS = 'none'",
        ),
        (
            {"max_positions": 64},
            "MAX_POSITIONS = 64 means nothing to POSITIONS = 'rotary': leave it at 0",
        ),
        ({"position_layers": (1, 2)}, "POSITION_LAYERS = (1, 2): of each layer 1 or"),
        ({"position_layers": (0, 0)}, "POSITION_LAYERS = (0, 0): of each layer 1 or"),
        (
            {"position_layers": (1, 0), "positions": "none"},
            "POSITION_LAYERS = (1, 0) means nothing to POSITIONS = 'none'",
        ),
        (
            {"qk_norm": "unit", "positions": "none"},
            "QK_NORM = 'unit' means nothing to POSITIONS = 'none'",
        ),
        ({"attention_chunks": (4, -1)}, "ATTENTION_CHUNKS = (4, -1): a piece has 1"),
        (
            {"attention_growth": 0.1},
            "ATTENTION_GROWTH = 0.1 and ATTENTION_GROWTH_LENGTH",
        ),
        (
            {"attention_growth_length": 4},
            "ATTENTION_GROWTH_LENGTH = 4 means nothing to ATTENTION_GROWTH = 0.0",
        ),
        (
            {"attention_growth": 0.1, "attention_growth_length": 4},
            "ATTENTION_GROWTH = 0.1 means nothing to POSITION_LAYERS = ()",
        ),
        ({"attention_cap": -1.0}, "ATTENTION_CAP = -1.0: cannot be negative"),
        ({"attention_scale": -1.0}, "ATTENTION_SCALE = -1.0: cannot be negative"),
        ({"logit_cap": -1.0}, "LOGIT_CAP = -1.0: cannot be negative"),
        ({"rope_fraction": 0.25}, "ROPE_FRACTION = 0.25 of HEAD_DIM = 4 numbers"),
        ({"rope_fraction": 1.5}, "ROPE_FRACTION = 1.5 of HEAD_DIM = 4 numbers"),
        (
            {"rope_fraction": 0.5, "positions": "none"},
            "ROPE_FRACTION = 0.5 means nothing to POSITIONS = 'none'",
        ),
        (
            {"rope_factor": 4.0},
            "ROPE_FACTOR = 4.0 means nothing to ROPE_SCALING = 'none'",
        ),
        (
            {"rope_scaling": "linear"},
            "ROPE_FACTOR = 1.0: ROPE_SCALING = 'linear' reaches farther",
        ),
        (
            {"rope_scaling": "linear", "rope_factor": 2.0, "rope_original_length": 9},
            "ROPE_ORIGINAL_LENGTH = 9 means nothing to ROPE_SCALING = 'linear'",
        ),
        (
            {"rope_scaling": "yarn", "rope_factor": 2.0},
            "ROPE_ORIGINAL_LENGTH = 0: ROPE_SCALING = 'yarn' needs the tokens",
        ),
        (
            SCALED | {"rope_slow_turns": 32.0},
            "ROPE_SLOW_TURNS = 32.0 and ROPE_FAST_TURNS = 32.0: must be above 0",
        ),
        (
            SCALED | {"rope_scaling": "yarn", "rope_slow_turns": 33.0},
            "ROPE_SLOW_TURNS = 33.0 and ROPE_FAST_TURNS = 32.0: must be above 0",
        ),
        (SCALED | {"rope_base": 1.0}, "ROPE_BASE = 1.0: ROPE_SCALING = 'by_parts'"),
        (
            SCALED | {"rope_truncate": False},
            "ROPE_TRUNCATE = False means nothing to ROPE_SCALING = 'by_parts'",
        ),
        (
            SCALED | {"rope_scaling": "yarn", "rope_attention_factor": -1.0},
            "ROPE_ATTENTION_FACTOR = -1.0: cannot be negative",
        ),
        (
            {"rope_base_windowed": 1e4},
            "ROPE_BASE_WINDOWED = 10000.0 means nothing to ATTENTION_WINDOWS = ()",
        ),
        (
            {"rope_base_windowed": -1.0, "attention_windows": (4, 0)},
            "ROPE_BASE_WINDOWED = -1.0: must be above 0",
        ),
    ],
)
def test_attention_and_positions_that_cannot_be(changes, said):
    found = faults(**changes)
    assert any(said in line for line in found), found


def test_angles_that_reach_farther_break_no_rule():
    windowed = {"attention_windows": (4, 0), "rope_base_windowed": 1e4}
    assert faults(**SCALED, **windowed) == []
    yarn = {"rope_scaling": "yarn", "rope_truncate": False, "rope_fraction": 0.5}
    assert faults(**SCALED | yarn) == []


def test_heads_of_odd_width_need_not_turn():
    assert faults(head_dim=3, positions="learned", max_positions=L) == []


def test_a_layers_number_of_experts_is_called_by_where_it_was_set():
    each = {"experts_per_layer": (6, 8), "num_experts": 8, "moe_every": 2}
    assert faults(**each, num_expert_groups=4, num_selected_groups=2) == [
        "6 of EXPERTS_PER_LAYER = (6, 8) does not divide into NUM_EXPERT_GROUPS = 4"
    ]
