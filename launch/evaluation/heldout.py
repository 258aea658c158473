"""Held-out scores: each token once, the same on every mesh."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from launch.run.assemble import Run
from launch.run.feed import Feed, Read
from moe.training import ledger, losses
from moe.training.losses import Sums
from tasks import batches
from tasks.batches import HeldoutBatches
from tasks.manifest import SplitManifest
from tasks.settings import DataSettings
from tasks.store import TokenStore

Record = dict[str, Any]
EvalStep = Callable[[Any, Any], tuple[Sums, jax.Array]]

_LANGUAGES = "languages"  # beside the features of a batch, while it is on its way


@dataclasses.dataclass(frozen=True)
class Total:
    """What was scored of some text; adding two merges them.

    Attributes:
        nats: summed cross-entropy.
        tokens: that were predicted.
        text_bytes: bytes of UTF-8 that they stand for.
    """

    nats: float = 0.0
    tokens: int = 0
    text_bytes: float = 0.0

    def __add__(self, other: "Total") -> "Total":
        """Merges two totals."""
        return Total(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
        )


def heldout(
    run: Run,
    store: TokenStore,
    params: Any,
    eval_step: EvalStep,
    num_batches: int,
    check: Callable[[], None] = lambda: None,
) -> Record:
    """Scores held-out batches of every Task and returns their metrics.

    Nats are added up in float64, so that the order and number of batches do not show.

    Args:
        run: the assembled run.
        store: the data.
        params: on the run's mesh.
        eval_step: compiled.
        num_batches: batches of each Task; 0 scores the whole split. Bits per byte are
            then exact, unless pairs were cut to their lengths; otherwise they use the
            split's average of bytes per token.
        check: called before every batch; what it raises ends the scoring.
    Returns:
        Metrics of all Tasks together, each token with the same weight, and loss of each
        Task and each language. Bits per byte only where all text is predicted as it
        is. Under "eval/scored_fraction" the part of the split's rows that was scored.
    """
    data, train = run.settings.data, run.settings.train
    scored_rows = all_rows = 0
    totals: dict[str, Total] = {}
    merged: Sums | None = None
    for task in store.tasks:
        split = store.split(task, data.heldout_split)
        held = batches.heldout(
            store, task, data, batch_size=train.batch_size, seed=train.seed
        )
        stop = min(num_batches, held.num_eval_batches) or held.num_eval_batches
        scored_rows += min(stop * train.batch_size, held.num_rows)
        all_rows += held.num_rows
        tally, languages = _Tally(split.manifest), split.languages()
        for sums, nats_BL, language_BL in _scored(
            run, held, languages, params, eval_step, stop, check
        ):
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
            merged = sums if merged is None else jax.tree.map(np.add, merged, sums)
            tally.add(nats_BL, int(sums.weight), language_BL)
        totals |= tally.totals(task)
    assert merged is not None  # a store never holds an empty split
    order = run.settings.layers.sparse_order
    # A fixed number is for one batch, and this is any number of them.
    means = dataclasses.replace(run.settings.loss, normalizing_factor=0.0)
    _, metrics = losses.total(
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), merged), means, order
    )
    record = {name: np.asarray(value).tolist() for name, value in metrics.items()}
    if merged.router:
        counts = ledger.choices_per_layer(merged.router, order)
        record |= {name: int(count_P.sum()) for name, count_P in counts.items()}
    together = sum((totals[task] for task in store.tasks), Total())
    for name, total in {"": together, **totals}.items():
        record |= _losses(total, f"/{name}" if name else "", data)
    record["eval/scored_fraction"] = scored_rows / all_rows
    return record | {"tokens": together.tokens}


def _scored(
    run: Run,
    held: HeldoutBatches,
    language_D: np.ndarray | None,
    params: Any,
    eval_step: EvalStep,
    num_batches: int,
    check: Callable[[], None],
) -> Iterator[tuple[Sums, np.ndarray, np.ndarray | None]]:
    """Yields sums, nats and, where they are known, languages of each batch."""
    feed = Feed(
        held.read if language_D is None else _with_languages(held, language_D),
        start=0,
        stop=num_batches,
        shape=(held.batch_size, run.settings.data.length),
        sharding=run.batch_sharding,
    )
    with feed:
        for batch in feed:
            check()
            language_BL = batch.pop(_LANGUAGES, None)
            sums, nats_BL = jax.device_get(eval_step(params, batch))
            if language_BL is not None:
                language_BL = multihost_utils.process_allgather(language_BL, tiled=True)
            yield sums, nats_BL, language_BL


def _with_languages(held: HeldoutBatches, language_D: np.ndarray) -> Read:
    """Reads with its rows the language of each target; -1 where nothing is predicted.

    So that each host reads of the store what its own devices score, and no more.
    """
    language_D = language_D.astype(np.int32)

    def read(index: int, start: int, stop: int) -> dict[str, np.ndarray]:
        document_BL = held.documents(index, start, stop)
        language_BL = np.where(document_BL >= 0, language_D[document_BL], -1)
        return held.read(index, start, stop) | {_LANGUAGES: language_BL}

    return read


class _Tally:
    """Adds up the nats of a Task, and of each of its languages."""

    def __init__(self, split: SplitManifest) -> None:
        self._split = split
        number = len(split.languages)
        self._nats, self._tokens = 0.0, 0
        self._nats_of = np.zeros(number)
        self._tokens_of = np.zeros(number, np.int64)

    def add(
        self, nats_BL: np.ndarray, tokens: int, language_BL: np.ndarray | None
    ) -> None:
        """Adds a batch; only what is predicted has a language."""
        self._nats += nats_BL.sum(dtype=np.float64)
        self._tokens += tokens
        if language_BL is None:
            return
        predicted_BL = language_BL >= 0
        languages = language_BL[predicted_BL]
        number, nats = len(self._nats_of), nats_BL[predicted_BL].astype(np.float64)
        self._nats_of += np.bincount(languages, nats, minlength=number)
        self._tokens_of += np.bincount(languages, minlength=number)

    def totals(self, task: str) -> dict[str, Total]:
        """By the name of the Task, and by TASK/LANGUAGE."""
        per_token = self._split.bytes_per_token if self._tokens else 0.0
        found = {task: Total(self._nats, self._tokens, self._tokens * per_token)}
        for (name, language), nats, tokens in zip(
            self._split.languages.items(),
            self._nats_of.tolist(),
            self._tokens_of.tolist(),
            strict=True,
        ):
            if tokens:
                per_token = language.text_bytes / language.tokens
                total = Total(nats, tokens, tokens * per_token)
                found[f"{task}/{name or 'unknown'}"] = total
        return found


def _losses(total: Total, suffix: str, data: DataSettings) -> dict[str, float]:
    if not total.tokens:
        return {}
    found = {f"loss/nats_per_token{suffix}": total.nats / total.tokens}
    if predicts_text(data):
        bits = total.nats / math.log(2)
        found[f"loss/bits_per_byte{suffix}"] = bits / total.text_bytes
    return found


def predicts_text(data: DataSettings) -> bool:
    """Whether every stored target is predicted, and so bits per byte mean something.

    Denoising predicts what was masked, between sentinels, and a prefix LM what follows
    its prefix.
    """
    return data.asks is not None and data.asks.predicts_all


def table(record: Record, store: TokenStore, data: DataSettings) -> list[str]:
    """Lines of held-out metrics: of all, then of each Task and language if several."""
    lines = [
        f"{name:24} {record[name]:.4f}"
        for name in ("loss/nats_per_token", "loss/bits_per_byte", "accuracy/fraction")
        if name in record
    ]
    lines += [
        f"{name:24} {record[name]:,}"
        for name in (
            "router/dropped_fraction",
            "router/tokens_without_expert_fraction",
            "tokens",
        )
        if name in record
    ]
    if predicts_text(data):
        lines += [
            f"{name + ' baseline':24} {value:.4f} bits per byte"
            for name, value in baselines(store).items()
        ]
    return [*lines, *by_task(record)]


def by_task(record: Record) -> list[str]:
    """Lines of held-out losses of each Task and language; none if there is one."""
    prefix = "loss/nats_per_token/"
    names = [name.removeprefix(prefix) for name in record if name.startswith(prefix)]
    if len(names) < 2:
        return []
    width = max(len("held out"), *map(len, names))
    lines = ["", f"{'held out':{width}}  nats/token  bits/byte"]
    for name in names:
        nats = record[prefix + name]
        bits = record.get(f"loss/bits_per_byte/{name}")
        shown = "–" if bits is None else f"{bits:.4f}"
        lines.append(f"{name:{width}}  {nats:>10.4f}  {shown:>9}")
    return lines


def baselines(store: TokenStore) -> dict[str, float]:
    """Bits per byte of the same held-out text by means that learn no network.

    Of several Tasks the mean over their bytes.
    """
    manifest = store.manifest
    found = {}
    for name in ("unigram", "gzip", "xz"):
        bits = text_bytes = 0.0
        for task in manifest.tasks.values():
            size = task.splits[manifest.heldout_split].text_bytes
            bits += size * task.baselines[f"{name}_bits_per_byte"]
            text_bytes += size
        found[name] = bits / text_bytes
    return found
