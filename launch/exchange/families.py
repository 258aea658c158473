"""The families of public models that `switchyard convert` knows, by `model_type`.

A family is a table of rules for its arrays, a function from its config.json to our
knobs, and one back. What it does not know is an error: of config.json by `must_be`, of
a run of ours because what is written is read again, and must be the same model.
"""

from typing import Any

from launch.exchange.family import Config, Family, Knobs
from launch.exchange.gpt_oss import GPT_OSS
from launch.exchange.matching import ExchangeError
from launch.exchange.rotary import rope_knobs, rope_of, rope_parameters
from launch.exchange.sigmoid_families import DEEPSEEK_V3, GLM4_MOE, MINIMAX_M2
from launch.exchange.softmax_families import MIXTRAL, OLMOE, QWEN3_MOE
from moe.settings import ModelSettings, RouterSettings

FAMILIES: dict[str, Family] = {
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen3_moe": QWEN3_MOE,
    "glm4_moe": GLM4_MOE,
    "minimax_m2": MINIMAX_M2,
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_oss": GPT_OSS,
}
_MOST_AHEAD = 100
_LARGEST, _MOST_EXPERTS = 2**31, 1_000_000
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # all mean E
_AHEAD = ("num_nextn_predict_layers", "num_mtp_layers")  # by newer files, by older


def knobs_of(config: Config, where: str) -> tuple[str, Knobs]:
    """Returns the family of a config.json, and its model in our knobs.

    Raises:
        ExchangeError: it is of a family, or says something, that is not known here.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ExchangeError(
            f"{where} is of the family {name!r}; known are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    said: dict[str, Any] = {"tie_word_embeddings": False, "hidden_act": "silu"}
    said |= dict(family.defaults)
    said |= _renamed(config, family)
    said = {key: value for key, value in said.items() if value is not None}
    lines = [
        f"{key} = {said[key]!r}: only {value!r} is known of {name}"
        for key, value in ({"hidden_act": "silu"} | dict(family.must_be)).items()
        if key in said and said[key] != value
    ]
    if lines:
        raise ExchangeError("\n  ".join([f"{where} says", *lines]))
    try:
        common = _common(said)
        _refuse_excess(common)
        knobs = common | family.knobs(said)
        _refuse_excess(knobs)
        return name, knobs
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise ExchangeError(
            f"{where} cannot be understood: {type(error).__name__}: {error}"
        ) from error


def config_of(name: str, model: ModelSettings, router: RouterSettings) -> Config:
    """Returns the config.json of a model, as one of a family."""
    family = FAMILIES[name]
    kv_heads = model.num_kv_heads or model.num_heads
    return {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": model.vocab_size,
        "hidden_size": model.model_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon or 1e-6,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_base,
        "rope_parameters": rope_parameters(model),
        "num_experts_per_tok": router.num_selected,
    } | family.config(model, router)


def _refuse_excess(knobs: Knobs) -> None:
    """Refuses numbers that no model has, before anything is counted by them."""
    for macro, value in knobs.items():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, int | float) and not abs(one) < _LARGEST:
                raise ValueError(f"{macro} would be {one}")
    if knobs["NUM_LAYERS"] * knobs.get("NUM_EXPERTS", 1) > _MOST_EXPERTS:
        raise ValueError(f"it has more than {_MOST_EXPERTS:,} experts in all layers")


def _renamed(config: Config, family: Family) -> dict[str, Any]:
    """Returns what config.json says, the number of experts by the family's own word."""
    own = next(word for word in _EXPERTS if word in family.defaults)
    return {own if key in _EXPERTS else key: value for key, value in config.items()}


def _common(c: Config) -> Knobs:
    """Returns what all families have, and means the same in them."""
    heads = c["num_attention_heads"]
    return {
        "VOCAB_SIZE": c["vocab_size"],
        "NUM_LAYERS": c["num_hidden_layers"],
        "EMBED_DIM": c["hidden_size"],
        "NUM_HEADS": heads,
        "NUM_KV_HEADS": c.get("num_key_value_heads", heads),
        "HEAD_DIM": c.get("head_dim", c["hidden_size"] // heads),
        "MLP_DIM": c["intermediate_size"],
        "ACTIVATION": "swiglu",
        "NORM_EPSILON": float(c["rms_norm_eps"]),
        "EMBED_SCALE": 1.0,
        "TIE_EMBEDDINGS": c["tie_word_embeddings"],
        "MOE_EVERY": 1,
        "NUM_SELECTED_EXPERTS": c["num_experts_per_tok"],
        **rope_knobs(rope_of(c), c),
    }


def ignored_of(config: Config, *, tied: bool) -> str:
    """Returns a pattern of arrays that need not be read.

    Layers above the last predict tokens after the next, and are left out: a model
    that comes in does not learn to.
    """
    family = FAMILIES[config["model_type"]]
    said = {**family.defaults, **config}
    patterns = [family.ignored]
    if tied:
        patterns.append(r"lm_head\.weight")  # the embedding's other name
    above = max(_count(said.get(key)) for key in _AHEAD)
    if above:
        last = said["num_hidden_layers"]
        numbers = "|".join(str(n) for n in range(last, last + above))
        patterns.append(rf"model\.layers\.({numbers})\..*")
    return "|".join(f"(?:{one})" for one in patterns)


def _count(said: Any) -> int:
    return said if type(said) is int and 0 < said < _MOST_AHEAD else 0
