"""Held-out scores: each token once, the same on every mesh."""

import argparse
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.assemble import Run
from launch.errors import EXIT_DONE
from launch.feed import Feed
from launch.gin_files import ResolvedConfig
from launch.terminal import waiting
from launch.trained import restored
from moe.training import losses
from moe.training.losses import Sums
from tasks.batches import HeldoutBatches
from tasks.store import TokenStore


def main(config: ResolvedConfig, options: argparse.Namespace) -> int:
    """Scores a checkpoint on the whole held-out split."""
    with restored(config, options) as trained:
        run, store = trained.run, trained.store
        with waiting("scoring the held-out split", quiet=options.quiet):
            record = heldout(run, store, trained.params, run.compile_eval_step(), 0)
    for name in ("loss/nats_per_token", "loss/bits_per_byte", "accuracy/fraction"):
        print(f"{name:24} {record[name]:.4f}")
    for name in ("router/dropped_fraction", "tokens"):
        if name in record:
            print(f"{name:24} {record[name]:,}")
    for name, value in baselines(store).items():
        print(f"{name + ' baseline':24} {value:.4f} bits per byte")
    return EXIT_DONE


def heldout(
    run: Run,
    store: TokenStore,
    params: Any,
    eval_step: Callable[[Any, Any], Sums],
    num_batches: int,
) -> dict[str, Any]:
    """Scores held-out batches and returns their metrics.

    Args:
        run: the assembled run.
        store: the data.
        params: on the run's mesh.
        eval_step: compiled.
        num_batches: 0 scores the whole split; bits per byte are then exact, otherwise
            they use the split's average of bytes per token.
    """
    data, train = run.settings.data, run.settings.train
    batches = HeldoutBatches(
        store, data.heldout_split, length=data.length, batch_size=train.batch_size
    )
    in_all = batches.num_eval_batches
    feed = Feed(
        batches.read,
        start=0,
        stop=min(num_batches, in_all) or in_all,
        shape=(train.batch_size, data.length),
        sharding=run.batch_sharding,
    )
    merged: Sums | None = None
    with feed:
        for batch in feed:
            sums = jax.device_get(eval_step(params, batch))
            # In float64, so that the order and number of batches do not show.
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
            merged = sums if merged is None else jax.tree.map(np.add, merged, sums)
    assert merged is not None  # a store never holds an empty split
    _, metrics = losses.total(
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), merged), run.settings.loss
    )
    metrics = {name: np.asarray(value).tolist() for name, value in metrics.items()}
    if merged.router is not None:
        counts = losses.choices_per_layer(merged.router)
        metrics |= {name: int(count_P.sum()) for name, count_P in counts.items()}
    nats = float(merged.cross_entropy / merged.weight)
    split = store.manifest.splits[data.heldout_split]
    return metrics | {
        "loss/nats_per_token": nats,
        "loss/bits_per_byte": nats / math.log(2) / split.bytes_per_token,
        "tokens": int(merged.weight),
    }


def baselines(store: TokenStore) -> dict[str, float]:
    """Bits per byte of the same held-out text by means that learn no network."""
    known = store.manifest.baselines
    return {name: known[f"{name}_bits_per_byte"] for name in ("unigram", "gzip", "xz")}
