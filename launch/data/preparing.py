"""Making the store that a run reads, and a vocabulary of its own."""

import os
import sys
from pathlib import Path

from launch.config.reader import ResolvedConfig
from launch.config.settings import Settings
from launch.data.opening import check_embedding, training_batches
from launch.errors import UsageError
from launch.terminal import preparing as display
from tasks import batches, vocabularies
from tasks.manifest import Manifest
from tasks.preparation import engines
from tasks.store import TokenStore, open_store


def engine(
    num_workers: int, runner: str | None, runner_options: tuple[str, ...]
) -> engines.Engine:
    """Returns what does the work: this process, several, or a runner of Beam."""
    if runner:
        return engines.Beam(runner, runner_options)
    if num_workers == 1:
        return engines.in_this_process
    return engines.Processes(num_workers or os.cpu_count() or 1)


def prepare(
    config: ResolvedConfig,
    engine: engines.Engine = engines.in_this_process,
    *,
    allowed_modules: tuple[str, ...],
    force: bool = False,
    quiet: bool = False,
) -> None:
    """Makes the store and the pack indices that the configuration reads."""
    from tasks.prepare import prepare  # imports TensorFlow, which takes seconds

    settings = config.settings
    _refuse_small_embedding(config)
    try:
        with display.preparing(quiet=quiet) as report:
            prepare(
                settings.data,
                report,
                filters=settings.filters,
                allowed_modules=allowed_modules,
                engine=engine,
                force=force,
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
        check_embedding(config, size, data.vocabulary)


def train_vocabulary(
    config: ResolvedConfig,
    file: str,
    *,
    allowed_modules: tuple[str, ...],
    force: bool,
    quiet: bool,
) -> None:
    """Trains a SentencePiece model on the train split, and writes it to a file.

    Raises:
        UsageError: the file is there already, or has another ending.
    """
    from tasks.prepare import train_vocabulary_of

    path, data = Path(file), config.settings.data
    if path.suffix != ".model":
        raise UsageError(
            f"--train_vocabulary={path}: a SentencePiece model ends in .model, such as "
            "--train_vocabulary=mine.model"
        )
    if path.exists() and not force:
        raise UsageError(
            f"{path} is there already, and stores may have been made with it: name a "
            "new file, or add --force"
        )
    with display.preparing(quiet=quiet) as report:
        vocabulary, fit = train_vocabulary_of(
            data, report, allowed_modules=allowed_modules
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(vocabulary.model)
    print(
        f"{path}: {vocabulary.size:,} pieces ({data.vocabulary_model}); on its sample "
        f"of {fit.sample_bytes:,} bytes {fit.bytes_per_token:.2f} bytes per token, "
        f"{100 * fit.byte_share:.2f} % of the tokens are bytes of rare characters\n"
        f"use it with VOCABULARY = {str(path)!r}"
    )


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
