"""Which knob fills which field: the field's own name in upper case, or what is here.

The names are those that most users know: T5X's where it has one.
"""

import dataclasses
import typing
from collections.abc import Container

from launch.config.settings import Settings

_PREFIXES = {"mixture": "MIXTURE_", "mesh": "MESH_", "sample": "SAMPLE_"}
_NAMES = {
    "loop.checkpoint_period_steps": "CHECKPOINT_PERIOD",
    "loop.keep_period_steps": "KEEP_PERIOD",
    "loop.eval_period_steps": "EVAL_PERIOD",
    "loop.task_metrics_period_steps": "TASK_METRICS_PERIOD",
    "loop.log_period_steps": "LOG_PERIOD",
    "loop.replay_period_steps": "REPLAY_PERIOD",
    "loop.step_timeout_seconds": "STEP_TIMEOUT",
    "loop.load_period_steps": "LOAD_PERIOD",
    "data.layout": "ARCHITECTURE",
    "data.vocabulary_size": "VOCABULARY_PIECES",
    "filters.near_similarity": "NEAR_DUPLICATE_SIMILARITY",
    "model.shape": "ARCHITECTURE",
    "model.model_dim": "EMBED_DIM",
    "model.dropout": "DROPOUT_RATE",
    "model.expert_dropout": "EXPERT_DROPOUT_RATE",
    "router.family": "ROUTER",
    "router.options": "ROUTER_OPTIONS",
    "router.num_selected": "NUM_SELECTED_EXPERTS",
    "router.logit_bias": "ROUTER_LOGIT_BIAS",
    "router.scores": "ROUTER_SCORES",
    "router.renormalize": "RENORMALIZE_GATES",
    "router.second_policy": "SECOND_EXPERT_POLICY",
    "router.group_score": "EXPERT_GROUP_SCORE",
    "router.max_experts_per_token": "EXPERT_CHOICE_CAP",
    "router.jitter": "JITTER_NOISE",
    "router.selection_bias": "ROUTER_BIAS",
    "router.bias_update": "ROUTER_BIAS_UPDATE",
    "router.bias_update_rate": "ROUTER_BIAS_RATE",
    "router.capacity_factor": "TRAIN_CAPACITY_FACTOR",
    "router.min_capacity": "MIN_EXPERT_CAPACITY",
    "router.logit_dtype": "ROUTER_DTYPE",
    "loss.balance_weight": "AUX_LOSS_FACTOR",
    "loss.balance_scope": "AUX_LOSS_SCOPE",
    "loss.balance_counts": "AUX_LOSS_COUNTS",
    "loss.over_layers": "AUX_LOSS_OVER_LAYERS",
    "loss.importance_weight": "IMPORTANCE_LOSS_FACTOR",
    "loss.load_weight": "LOAD_LOSS_FACTOR",
    "loss.router_z_weight": "ROUTER_Z_LOSS_FACTOR",
    "loss.z_weight": "Z_LOSS",
    "loss.ahead_weight": "AHEAD_LOSS_FACTOR",
    "loss.normalizing_factor": "LOSS_NORMALIZING_FACTOR",
    "optimizer.name": "OPTIMIZER",
    "optimizer.options": "OPTIMIZER_OPTIONS",
    "optimizer.final_fraction": "FINAL_LEARNING_RATE_FRACTION",
    "optimizer.b1": "BETA1",
    "optimizer.b2": "BETA2",
    "optimizer.eps": "EPSILON",
    "optimizer.offload": "OFFLOAD_OPTIMIZER",
    "platform.name": "PLATFORM",
    "platform.join_timeout_seconds": "JOIN_TIMEOUT",
    "platform.heartbeat_timeout_seconds": "HEARTBEAT_TIMEOUT",
    "sample.num_tokens": "SAMPLE_TOKENS",
    "sample.num_beams": "NUM_BEAMS",
    "sample.length_penalty": "LENGTH_PENALTY",
}

RENAMED = {"VOCABULARY_SIZE": "VOCABULARY_PIECES"}  # by what they were called
# What people coming from T5X look for (docs/from_t5x.md).
T5X = {
    "BASE_LEARNING_RATE": "LEARNING_RATE, the peak: base / sqrt(WARMUP_STEPS)",
    "EVAL_STEPS": "EVAL_BATCHES",
    "INITIAL_CHECKPOINT_PATH": "START_FROM, a run of Switchyard or a checkpoint of one",
    "NUM_DECODER_LAYERS": "NUM_LAYERS",
    "NUM_EMBEDDINGS": "VOCAB_SIZE",
    "RANDOM_SEED": "SEED",
    "SHUFFLE_TRAIN_EXAMPLES": "SHUFFLE",
    "USE_CACHED_TASKS": "not needed: a token store is always made",
}


def bound(knobs: Container[str]) -> dict[str, str]:
    """Returns the knob of every field, such as "model.model_dim": "EMBED_DIM".

    What a name stands for (`moe.settings.own.NO_KNOB`) has none.

    An encoder's router takes ENCODER_X where that is a knob, else X as the decoder's.

    Args:
        knobs: all there are.
    """
    found = {}
    for record, kind in typing.get_type_hints(Settings).items():
        alike = "router" if record == "encoder_router" else record
        for field in dataclasses.fields(kind):
            if not field.metadata.get("knob", True):
                continue
            name = f"{alike}.{field.name}"
            macro = _PREFIXES.get(record, "") + field.name.upper()
            macro = _NAMES.get(name, macro)
            if alike != record and f"ENCODER_{macro}" in knobs:
                macro = f"ENCODER_{macro}"
            found[f"{record}.{field.name}"] = macro
    return found
