import numpy as np
import pytest

from tasks.batches import Batches, heldout
from tasks.objectives import FEATURES
from tasks.store import open_store

LENGTH, BATCH = 32, 8


def batches(store, **changes) -> Batches:
    values = {"length": LENGTH, "batch_size": BATCH, "seed": 5, **changes}
    return Batches(store, "train", **values)


def same(left, right) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in FEATURES)


def row_texts(batch) -> list[bytes]:
    return [row.tobytes() for row in batch["decoder_target_tokens"]]


def epoch_rows(data: Batches, epoch: int) -> list[bytes]:
    """The rows numbered [epoch·rows, (epoch + 1)·rows), one at a time."""
    numbers = range(epoch * data.num_rows, (epoch + 1) * data.num_rows)
    return [
        row_texts(data.read(n // BATCH, n % BATCH, n % BATCH + 1))[0] for n in numbers
    ]


@pytest.mark.fast
def test_a_batch_is_the_same_whoever_reads_which_rows(quick_store):
    data = batches(quick_store)
    for index in (0, 3, data.num_rows // BATCH, 10_000):  # one spans two epochs
        whole = data.read(index, 0, BATCH)
        parts = [data.read(index, start, start + 2) for start in range(0, BATCH, 2)]
        joined = {name: np.concatenate([p[name] for p in parts]) for name in FEATURES}
        assert same(whole, joined)
        assert whole["decoder_target_tokens"].shape == (BATCH, LENGTH)


@pytest.mark.fast
def test_a_batch_is_the_same_after_opening_again_in_any_order(quick_store):
    first = [batches(quick_store).read(index, 0, BATCH) for index in range(4)]
    again = batches(open_store(quick_store.path))
    for index in (3, 1, 0, 2):
        assert same(first[index], again.read(index, 0, BATCH))
    assert not same(first[0], first[1])


@pytest.mark.fast
def test_every_epoch_visits_every_row_once_in_another_order(quick_store):
    data = batches(quick_store)
    assert data.num_rows % BATCH  # so that an epoch ends within a batch
    stored = epoch_rows(batches(quick_store, shuffle=False), 0)
    first, second = epoch_rows(data, 0), epoch_rows(data, 1)
    assert sorted(first) == sorted(second) == sorted(stored)
    assert first != second != stored != first
    assert epoch_rows(batches(quick_store, seed=6), 0) != first


@pytest.mark.fast
def test_rows_hold_every_token_once_and_whole_pieces(quick_store):
    data = batches(quick_store, shuffle=False)
    tokens, segments = [], 0
    for n in range(data.num_rows):
        row = data.read(n // BATCH, n % BATCH, n % BATCH + 1)
        real = row["decoder_segment_ids"][0] > 0
        assert real[: real.sum()].all()  # padding only at the end
        tokens += row["decoder_target_tokens"][0][real].tolist()
        segments += int(row["decoder_segment_ids"][0].max())
    split = quick_store.manifest.splits["train"]
    (stored,) = quick_store.read("train", [0], [split.tokens])
    assert tokens == stored.tolist()
    assert len(tokens) == data.tokens_per_epoch == split.tokens
    assert segments == len(data.pack.pieces) - 1 > data.num_rows


@pytest.mark.fast
def test_no_segment_holds_two_documents(quick_store):
    data = batches(quick_store)
    for index in range(data.num_rows // BATCH):
        batch = data.read(index, 0, BATCH)
        ends = batch["decoder_target_tokens"] == quick_store.vocabulary.eos_id
        segment = batch["decoder_segment_ids"]
        following = np.pad(segment[:, 1:], ((0, 0), (0, 1)))
        assert (ends & (segment > 0)).any()
        assert (following[ends] != segment[ends]).all()


@pytest.mark.fast
def test_one_pass_scores_every_heldout_row_once(quick_store):
    data = heldout(quick_store, "validation", length=LENGTH, batch_size=BATCH)
    assert data.num_rows % BATCH  # so that the last batch is filled up
    assert data.num_eval_batches == data.num_rows // BATCH + 1
    passes = [data.read(i, 0, BATCH) for i in range(data.num_eval_batches)]
    rows = np.concatenate([batch["decoder_target_tokens"] for batch in passes])
    weights = np.concatenate([batch["decoder_loss_weights"] for batch in passes])
    split = quick_store.manifest.splits["validation"]
    (stored,) = quick_store.read("validation", [0], [split.tokens])
    assert rows[weights > 0].tolist() == stored.tolist()
    assert weights.sum() == data.tokens_per_epoch == split.tokens
    last = passes[-1]
    for name in FEATURES:
        assert not last[name][data.num_rows % BATCH :].any()
    assert same(
        {name: last[name][2:5] for name in FEATURES},
        data.read(data.num_eval_batches - 1, 2, 5),
    )


@pytest.mark.fast
def test_rows_outside_a_batch_are_refused(quick_store):
    data = batches(quick_store)
    for index, start, stop in ((-1, 0, 1), (0, 0, BATCH + 1), (0, 3, 2), (0, -1, 2)):
        with pytest.raises(ValueError, match="a batch has rows 0 to 8"):
            data.read(index, start, stop)
    held = heldout(quick_store, "validation", length=LENGTH, batch_size=BATCH)
    with pytest.raises(ValueError, match="of a pass of"):
        held.read(held.num_eval_batches, 0, 1)


@pytest.mark.fast
def test_a_length_not_prepared_is_packed_and_kept(own_store):
    store = open_store(own_store)
    assert not (own_store / "train" / "pack-17").exists()
    first = batches(store, length=17).read(0, 0, BATCH)
    assert (own_store / "train" / "pack-17").is_dir()
    assert not list(own_store.glob("train/*incomplete*"))
    again = batches(open_store(own_store), length=17).read(0, 0, BATCH)
    assert same(first, again)
