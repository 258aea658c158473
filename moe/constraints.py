"""The rules that the settings of model and learning must obey, whatever the mesh.

Read before jax is imported: standard library only. Every fault is one line: the values,
the rule, and the macro to change.
"""

import dataclasses
import re
from collections.abc import Sequence

from moe import architecture
from moe.dispatch.auto import PADDED
from moe.rules.ahead import ahead_problems
from moe.rules.attention import attention_problems
from moe.rules.fractions import fraction_problems
from moe.rules.images import image_problems
from moe.rules.layers import layer_problems
from moe.rules.positions import position_problems
from moe.rules.routers import family_problems, leaks, number_problems
from moe.rules.slots import capacity_problems
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
    found += attention_problems(model)
    found += position_problems(model, max(length, encoder_length))
    hashed = ""
    if architecture.has_experts(model) and model.first_hash_layers > 0:
        hashed = f"FIRST_HASH_LAYERS = {model.first_hash_layers}"
    if architecture.has_experts(model) and router.family == "hashed":
        hashed = "ROUTER = 'hashed'"
    found += image_problems(model, length, hashed)
    found += _shape_problems(model)
    found += ahead_problems(model, loss, length)
    if model.shape != "encoder_decoder" and encoder_router is not None:
        found += [
            f"ENCODER_{macro} = {getattr(encoder_router, field)!r} means nothing to "
            f"ARCHITECTURE = {model.shape!r}: leave it out"
            for macro, field in _ENCODERS_OWN.items()
            if getattr(encoder_router, field) != getattr(router, field)
        ]
    found += fraction_problems({"DROPOUT_RATE": model.dropout})
    above_0 = {
        "INIT_SCALE": model.init_scale,
        "RESIDUAL_SCALE": model.residual_scale,
        "LOGIT_SCALE": model.logit_scale,
    }
    found += [f"{m} = {x}: must be above 0" for m, x in above_0.items() if x <= 0]
    if model.embed_scale < 0:
        found.append(f"EMBED_SCALE = {model.embed_scale}: cannot be negative")
    found += _execution_problems(model, execution)
    found += layer_problems(model)
    if architecture.has_experts(model):
        found += _expert_problems(model, execution)
        chosen = {"decoder": (router, length), "encoder": (router, length)}
        if model.shape == "encoder_decoder" and encoder_router is not None:
            chosen["encoder"] = encoder_router, encoder_length
        routers = {name: chosen[name][0] for name in architecture.sides(model)}
        found += _update_problems(list(routers.values()))
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
_OWN_WORD = re.compile(rf"\b({'|'.join(_ENCODERS_OWN)})\b")


def _update_problems(routers: Sequence[RouterSettings]) -> list[str]:
    """How a bias follows the loads, where no router has one."""
    if any(router.selection_bias for router in routers):
        return []
    given, usual = routers[0], RouterSettings()
    return [
        f"{macro} = {value!r} means nothing to ROUTER_BIAS = False: leave it at "
        f"{default!r}, or set ROUTER_BIAS"
        for macro, value, default in (
            ("ROUTER_BIAS_UPDATE", given.bias_update, usual.bias_update),
            ("ROUTER_BIAS_RATE", given.bias_update_rate, usual.bias_update_rate),
        )
        if value != default
    ]


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
            *number_problems(layer, router),
            *family_problems(layer, router, loss),
            *capacity_problems(layer, router, length),
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
    if model.output_transform and "glu" in model.activation:
        found.append(
            f"OUTPUT_TRANSFORM = True has no gate for ACTIVATION = "
            f"{model.activation!r}: set one to another"
        )
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
    if model.shared_expert_gate and not model.shared_expert_mlp_dim:
        found.append(
            "SHARED_EXPERT_GATE = True means nothing to SHARED_EXPERT_MLP_DIM = 0: set "
            "one to another"
        )
    if model.expert_dropout > 0 and execution.transport not in ("auto", *PADDED):
        found.append(
            f"EXPERT_DROPOUT_RATE = {model.expert_dropout} is drawn per capacity slot: "
            f"TRANSPORT = {execution.transport!r} has none; use 'all_to_all' or 'auto'"
        )
    return found + fraction_problems({"EXPERT_DROPOUT_RATE": model.expert_dropout})
