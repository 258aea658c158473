"""A folder in the layout of Hugging Face, before any of its weights is read."""

from pathlib import Path

from launch.checkpoints.places import VOCABULARY
from launch.exchange.families import FAMILIES, knobs_of
from launch.exchange.family import Config, ExchangeError, Knobs
from launch.exchange.header import parsed_json

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model")
# What goes with a tokenizer, and is kept for whoever gets the model back.
BESIDE = (
    CONFIG,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_ROW = 1024  # tokens, in configs/data/here.gin


def read_config(source: Path) -> Config:
    """Reads the config.json of a folder."""
    file = source / CONFIG
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ExchangeError(f"cannot read {file}: {error.strerror}") from error
    return parsed_json(content, str(file))


def knobs_for(source: Path, to: Path) -> tuple[str, Knobs]:
    """Returns what a run that is made of a public model begins with.

    Args:
        source: folder of the model.
        to: that of the run.
    Returns:
        A gin file, and the knobs that the run must have.
    """
    name, knobs = knobs_of(read_config(source), str(source / CONFIG))
    tokenizer = to / VOCABULARY / name_kept(tokenizer_of(source))
    more: Knobs = {"MODEL_DIR": str(to), "VOCABULARY": str(tokenizer)}
    if most := knobs.get("MAX_POSITIONS"):  # rows of the family's file may be longer
        more["TASK_FEATURE_LENGTHS"] = {"targets": min(most, _ROW)}
    return FAMILIES[name].data, knobs | more


def tokenizer_of(source: Path) -> str:
    """Returns the name of a folder's tokenizer."""
    for name in TOKENIZERS:
        if (source / name).is_file():
            return name
    raise ExchangeError(f"{source} has no tokenizer: {' or '.join(TOKENIZERS)}")


def name_kept(tokenizer: str) -> str:
    """The name by which a run keeps it."""
    return tokenizer if tokenizer.endswith(".json") else "vocabulary.model"
