"""Opening the store that a run reads."""

from launch.config.reader import ResolvedConfig
from launch.config.settings import Settings
from launch.errors import ConfigError
from tasks import batches
from tasks.batches import Batches
from tasks.store import TokenStore, open_store


def open_checked(config: ResolvedConfig) -> TokenStore:
    """Opens the store of a run.

    Raises:
        StoreError: it is missing, damaged, or was made with other settings.
        ConfigError: its vocabulary is larger than the model's embedding.
    """
    settings = config.settings
    data = settings.data
    store = open_store(data.store_dir, data, settings.filters)
    check_embedding(config, store.vocabulary.size, data.store_dir)
    return store


def training_batches(store: TokenStore, settings: Settings) -> Batches:
    """Returns the batches that a run learns from.

    Raises:
        StoreError: the store does not suit the objective or the mixture.
    """
    train = settings.train
    return batches.training(
        store,
        settings.data,
        settings.mixture,
        batch_size=train.batch_size,
        ramp=train.batch_ramp,
        seed=train.seed,
    )


def check_embedding(config: ResolvedConfig, size: int, where: str) -> None:
    """Refuses a vocabulary that is larger than the model's embedding."""
    if size > config.settings.model.vocab_size:
        raise ConfigError(
            config.where,
            [
                f"VOCAB_SIZE = {config.settings.model.vocab_size} is smaller than the "
                f"{size} ids of the vocabulary in {where}: set VOCAB_SIZE to "
                f"{-(-size // 128) * 128}"
            ],
        )


def cut_words(batches: Batches) -> str:
    """Says what pairs lose that are longer than TASK_FEATURE_LENGTHS, if any do."""
    lost = [task.truncation for task in batches.tasks]
    examples = sum(of_task.examples for of_task in lost)
    if not examples:
        return ""
    tokens = sum(sum(of_task.tokens.values()) for of_task in lost)
    return (
        f"; {examples:,} pairs longer than TASK_FEATURE_LENGTHS lose {tokens:,} tokens"
    )
