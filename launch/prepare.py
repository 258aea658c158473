"""`switchyard prepare`, and opening the store that training reads."""

import argparse
import os
import sys
from pathlib import Path

from launch.config.reader import ResolvedConfig
from launch.config.settings import Settings
from launch.errors import EXIT_DONE, ConfigError, UsageError
from launch.terminal import training
from tasks import batches, vocabularies
from tasks.batches import Batches
from tasks.manifest import Manifest
from tasks.store import TokenStore, is_there, open_store


def main(config: ResolvedConfig, options: argparse.Namespace) -> int:
    """Prepares the token store of a configuration, or says what is in it."""
    _refuse_options(options)
    if options.train_vocabulary:
        return _train_vocabulary(config, options)
    settings = config.settings
    store_dir = settings.data.store_dir
    if options.inspect:
        from launch.data.inspection import show

        show(open_checked(config), settings, options.examples)
        return EXIT_DONE
    if is_there(store_dir) and not options.force:
        store = open_store(store_dir, settings.data, settings.filters)
        print(f"{store_dir} is there already; --force prepares it again")
    else:
        _prepare(config, options)
        store = open_store(store_dir, settings.data, settings.filters)
        print(f"prepared {store_dir}")
    print(describe(store.manifest))
    return EXIT_DONE


def ensure_store(config: ResolvedConfig, options: argparse.Namespace) -> TokenStore:
    """Opens the store of a run, and prepares it first if it is missing.

    Raises:
        StoreError: it cannot be prepared, is damaged, or was made with other settings.
        ConfigError: its vocabulary is larger than the model's embedding.
    """
    if not is_there(config.settings.data.store_dir):
        _prepare(config, options)
    return open_checked(config)


def open_checked(config: ResolvedConfig) -> TokenStore:
    """Opens the store of a run.

    Raises:
        StoreError: it is missing, damaged, or was made with other settings.
        ConfigError: its vocabulary is larger than the model's embedding.
    """
    settings = config.settings
    data = settings.data
    store = open_store(data.store_dir, data, settings.filters)
    _check_embedding(config, store.vocabulary.size, data.store_dir)
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
        seed=train.seed,
    )


def allowed_modules(
    config: ResolvedConfig, options: argparse.Namespace
) -> tuple[str, ...]:
    """Returns the modules whose code may be run."""
    allowed = getattr(options, "allow_module", False)
    return (config.settings.data.mixture_or_task_module,) if allowed else ()


def _prepare(config: ResolvedConfig, options: argparse.Namespace) -> None:
    """Makes the store and the pack indices that the configuration reads."""
    # Imports TensorFlow, which takes seconds and is only needed here.
    from tasks.preparation import engines
    from tasks.prepare import prepare

    settings = config.settings
    engine: engines.Engine = engines.in_this_process
    number = getattr(options, "num_workers", 1)
    if runner := getattr(options, "runner", None):
        engine = engines.Beam(runner, tuple(options.runner_option))
    elif number != 1:
        engine = engines.Processes(number or os.cpu_count() or 1)
    _refuse_small_embedding(config)
    try:
        with training.preparing(quiet=options.quiet) as report:
            prepare(
                settings.data,
                report,
                filters=settings.filters,
                allowed_modules=allowed_modules(config, options),
                engine=engine,
                force=getattr(options, "force", False),
            )
    except KeyboardInterrupt:
        print("what is done is kept: the same command goes on", file=sys.stderr)
        raise
    _make_indices(open_store(settings.data.store_dir, settings.data), settings)


def _make_indices(store: TokenStore, settings: Settings) -> None:
    """Makes the pack indices: another machine may not be able to write them."""
    for task in training_batches(store, settings).tasks:
        _ = task.index
    for name in store.tasks:
        held = batches.heldout(
            store,
            name,
            settings.data,
            batch_size=settings.train.batch_size,
            seed=settings.train.seed,
        )
        _ = held.task.index


def _refuse_small_embedding(config: ResolvedConfig) -> None:
    """Looks into a vocabulary that is a file before hours are spent on its tokens.

    Of the others the settings say the size.
    """
    data = config.settings.data
    if data.vocabulary not in ("bytes", "sentencepiece", "task"):
        size = vocabularies.from_file(
            data.vocabulary, data.extra_ids, data.eos_token
        ).size
        _check_embedding(config, size, data.vocabulary)


def _check_embedding(config: ResolvedConfig, size: int, where: str) -> None:
    if size > config.settings.model.vocab_size:
        raise ConfigError(
            config.where,
            [
                f"VOCAB_SIZE = {config.settings.model.vocab_size} is smaller than the "
                f"{size} ids of the vocabulary in {where}: set VOCAB_SIZE to "
                f"{-(-size // 128) * 128}"
            ],
        )


def _refuse_options(options: argparse.Namespace) -> None:
    """Options that mean nothing, or nothing together."""
    if options.num_workers < 0:
        raise UsageError(
            f"--num_workers={options.num_workers}: cannot be negative; 0 takes one for "
            "each core"
        )
    if options.runner and options.num_workers != 1:
        raise UsageError(
            "--runner decides how many workers there are: leave --num_workers out"
        )
    if options.runner_option and not options.runner:
        raise UsageError("--runner_option is for --runner, which is missing")


def _train_vocabulary(config: ResolvedConfig, options: argparse.Namespace) -> int:
    """Trains a SentencePiece model on the train split, and writes it to a file."""
    from tasks.prepare import train_vocabulary_of

    path, data = Path(options.train_vocabulary), config.settings.data
    if path.suffix != ".model":
        raise UsageError(
            f"--train_vocabulary={path}: a SentencePiece model ends in .model, such as "
            "--train_vocabulary=mine.model"
        )
    if path.exists() and not options.force:
        raise UsageError(
            f"{path} is there already, and stores may have been made with it: name a "
            "new file, or add --force"
        )
    with training.preparing(quiet=options.quiet) as report:
        vocabulary, fit = train_vocabulary_of(
            data, report, allowed_modules=allowed_modules(config, options)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(vocabulary.model)
    print(
        f"{path}: {vocabulary.size:,} pieces ({data.vocabulary_model}); on its sample "
        f"of {fit.sample_bytes:,} bytes {fit.bytes_per_token:.2f} bytes per token, "
        f"{100 * fit.byte_share:.2f} % of the tokens are bytes of rare characters\n"
        f"use it with VOCABULARY = {str(path)!r}"
    )
    return EXIT_DONE


def describe(manifest: Manifest) -> str:
    """Counts of a store, a line for each split of each Task, and what to know of it."""
    width = max(map(len, manifest.tasks))
    lines = []
    for name, task in manifest.tasks.items():
        for split_name, split in task.splits.items():
            lines.append(
                f"  {name:{width}} {split_name:12} {split.documents:>9,} documents  "
                f"{split.tokens['targets']:>13,} tokens  "
                f"{split.bytes_per_token:.2f} bytes per token"
            )
            notes = []
            if inputs := split.tokens.get("inputs"):
                notes.append(f"inputs: {inputs:,} tokens")
            if split.removed:
                told = [f"{n:,} {why}" for why, n in split.removed.items()]
                notes.append(f"left out: {', '.join(told).replace('_', ' ')}")
            if split.replaced_documents:
                notes.append(f"not UTF-8, and mended: {split.replaced_documents:,}")
            lines += [f"  {'':{width}} {note}" for note in notes]
    return "\n".join([*lines, *_warnings(manifest)])


def _warnings(manifest: Manifest) -> list[str]:
    """What a reader of the counts should know."""
    lines = []
    if manifest.lossy_fraction:
        lines.append(
            f"  VOCABULARY does not give back {100 * manifest.lossy_fraction:.3g} % of "
            "sampled documents: bits per byte will count text that no token holds"
        )
    if quality := manifest.quality:
        lines.append(
            f"  quality: AUC {quality['auc']:.3f} of good text against raw, held out"
        )
        split = manifest.train_split
        stored = [task.splits[split] for task in manifest.tasks.values()]
        documents = sum(s.documents + sum(s.removed.values()) for s in stored)
        sample = manifest.filters["quality_sample"]
        if isinstance(sample, int) and 2 * sample > documents:
            lines.append(
                f"  QUALITY_SAMPLE = {sample:,} is more than half of the {documents:,} "
                "documents: those that the classifier learnt from score too low"
            )
    return lines
