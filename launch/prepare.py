"""`switchyard prepare`, and opening the store that training reads."""

import argparse
from pathlib import Path

from launch import progress
from launch.errors import EXIT_DONE, ConfigError
from launch.gin_files import ResolvedConfig
from tasks.manifest import Manifest
from tasks.store import TokenStore, open_store


def main(config: ResolvedConfig, options: argparse.Namespace) -> int:
    """Prepares the token store of a configuration."""
    store_dir = Path(config.settings.data.store_dir)
    if store_dir.exists() and not options.force:
        store = open_store(store_dir, config.settings.data)
        print(f"{store_dir} is there already; --force prepares it again")
        print(describe(store.manifest))
        return EXIT_DONE
    manifest = _prepare(config, options)
    print(f"prepared {store_dir}")
    print(describe(manifest))
    return EXIT_DONE


def ensure_store(config: ResolvedConfig, options: argparse.Namespace) -> TokenStore:
    """Opens the store of a run, and prepares it first if it is missing.

    Raises:
        StoreError: it cannot be prepared, is damaged, or was made with other settings.
        ConfigError: its vocabulary is larger than the model's embedding.
    """
    if not Path(config.settings.data.store_dir).exists():
        _prepare(config, options)
    return open_checked(config)


def open_checked(config: ResolvedConfig) -> TokenStore:
    """Opens the store of a run.

    Raises:
        StoreError: it is missing, damaged, or was made with other settings.
        ConfigError: its vocabulary is larger than the model's embedding.
    """
    data, model = config.settings.data, config.settings.model
    store = open_store(data.store_dir, data)
    if store.vocabulary.size > model.vocab_size:
        raise ConfigError(
            config.where,
            [
                f"VOCAB_SIZE = {model.vocab_size} is smaller than the "
                f"{store.vocabulary.size} ids of the vocabulary in {data.store_dir}: "
                f"set VOCAB_SIZE to {-(-store.vocabulary.size // 128) * 128}"
            ],
        )
    return store


def _prepare(config: ResolvedConfig, options: argparse.Namespace) -> Manifest:
    # Imports TensorFlow, which takes seconds and is only needed here.
    from tasks.prepare import prepare

    data = config.settings.data
    allowed = (data.mixture_or_task_module,) if options.allow_module else ()
    with progress.preparing(quiet=options.quiet) as report:
        return prepare(data, report, allowed_modules=allowed)


def describe(manifest: Manifest) -> str:
    """Counts of a store, one line per split."""
    lines = [
        f"  {name:12} {split.documents:>9,} documents  {split.tokens:>13,} tokens  "
        f"{split.bytes_per_token:.2f} bytes per token"
        for name, split in manifest.splits.items()
    ]
    return "\n".join(lines)
