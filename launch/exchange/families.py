"""The families of public models that `switchyard convert` knows, by `model_type`.

A family is a table of rules for its arrays, a function from its config.json to our
knobs, and one back. What it does not know is an error: of config.json by `must_be`, of
a run of ours because what is written is read again, and must be the same model.
"""

from launch.exchange.bert import BERT
from launch.exchange.family import (
    Config,
    ExchangeError,
    Family,
    Knobs,
    refuse_excess,
)
from launch.exchange.gpt2 import GPT2
from launch.exchange.gpt_oss import GPT_OSS
from launch.exchange.sigmoid_families import DEEPSEEK_V3, GLM4_MOE, MINIMAX_M2
from launch.exchange.softmax_families import (
    ERNIE4_5_MOE,
    GRANITEMOE,
    MIXTRAL,
    OLMOE,
    QWEN3_MOE,
)
from launch.exchange.two_stacks import MT5, SWITCH_TRANSFORMERS, T5
from moe.settings import ModelSettings, RouterSettings

FAMILIES: dict[str, Family] = {
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen3_moe": QWEN3_MOE,
    "glm4_moe": GLM4_MOE,
    "minimax_m2": MINIMAX_M2,
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_oss": GPT_OSS,
    "t5": T5,
    "mt5": MT5,
    "switch_transformers": SWITCH_TRANSFORMERS,
    "granitemoe": GRANITEMOE,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "kimi_k2": DEEPSEEK_V3,  # by another name
    "gpt2": GPT2,
    "bert": BERT,
}


def family_of(config: Config, where: str) -> str:
    """Returns the family of a config.json.

    Raises:
        ExchangeError: it is of none that is known here.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ExchangeError(
            f"{where} is of the family {name!r}; known are {', '.join(FAMILIES)}"
        )
    return name


def knobs_of(config: Config, where: str) -> tuple[str, Knobs]:
    """Returns the family of a config.json, and its model in our knobs.

    Raises:
        ExchangeError: it is of a family, or says something, that is not known here.
    """
    name = family_of(config, where)
    family = FAMILIES[name]
    said = family.said(config)
    lines = [
        f"{key} = {said[key]!r}: only {value!r} is known of {name}"
        for key, value in family.must_be.items()
        if key in said and said[key] != value
    ]
    if lines:
        raise ExchangeError("\n  ".join([f"{where} says", *lines]))
    try:
        knobs = family.knobs(said)
        refuse_excess(knobs)
        return name, knobs
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise ExchangeError(
            f"{where} cannot be understood: {type(error).__name__}: {error}"
        ) from error


def config_of(name: str, model: ModelSettings, router: RouterSettings) -> Config:
    """Returns the config.json of a model, as one of a family."""
    family = FAMILIES[name]
    return {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
    } | family.config(model, router)
