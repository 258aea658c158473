"""gpt-oss (arXiv:2508.10925): clamped experts with biases, sinks, windows by turns."""

from launch.exchange import tables
from launch.exchange.family import Config, Knobs, Said
from launch.exchange.like_llama import like_llama
from moe.settings import ModelSettings, RouterSettings

_KINDS = {"sliding_attention", "full_attention"}
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _knobs(c: Config) -> Knobs:
    return {
        "NUM_EXPERTS": c["num_local_experts"],
        "EXPERT_MLP_DIM": c["intermediate_size"],
        "RENORMALIZE_GATES": "before_drop",
        "ACTIVATION": "swiglu_clamped",
        "EXPERT_BIASES": True,
        "ROUTER_LOGIT_BIAS": True,
        "ATTENTION_BIASES": c["attention_bias"],
        "ATTENTION_OUTPUT_BIAS": c["attention_bias"],
        "ATTENTION_SINKS": True,
        "ATTENTION_WINDOWS": _windows(c),
    }


def _windows(c: Config) -> tuple[int, ...]:
    """Returns the shortest period of windows that all layers follow."""
    number = c["num_hidden_layers"]
    kinds = c.get("layer_types") or [
        "full_attention" if n % 2 else "sliding_attention" for n in range(number)
    ]
    if len(kinds) != number or not set(kinds) <= _KINDS:
        raise ValueError(f"layer_types of {number} layers are {kinds}")
    each = [c["sliding_window"] if kind.startswith("s") else 0 for kind in kinds]
    if not any(each):
        return ()
    for period in range(1, number + 1):
        if all(each[n] == each[n % period] for n in range(number)):
            return tuple(each[:period])
    raise AssertionError("all layers are a period")


def _config(model: ModelSettings, router: RouterSettings) -> Said:
    windows = model.attention_windows or (0,)
    of_layers = [windows[n % len(windows)] for n in range(model.num_layers)]
    return {
        "intermediate_size": model.expert_mlp_dim,
        "num_local_experts": model.num_experts,
        "attention_bias": model.attention_biases,
        "sliding_window": max(windows),
        "layer_types": [
            "sliding_attention" if window else "full_attention" for window in of_layers
        ],
        "swiglu_limit": 7.0,
    }


GPT_OSS = like_llama(
    architecture="GptOssForCausalLM",
    defaults={
        "num_hidden_layers": 36,
        "num_local_experts": 128,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": _YARN,
        "num_experts_per_tok": 4,
        "attention_bias": True,
    },
    must_be={"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    knobs=_knobs,
    config=_config,
    memory=tables.GPT_OSS,
)
