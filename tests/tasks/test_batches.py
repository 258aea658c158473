"""Batches from a store in memory: which rows, in which order, for whom."""

import collections

import numpy as np
import pytest
from memory_store import (
    MemorySplit,
    MemoryStore,
    on_disk,
    pair_store,
    settings,
    text_store,
)

from tasks.batches import Batches, heldout, training
from tasks.errors import StoreError
from tasks.layouts import FEATURES
from tasks.settings import MixtureSettings
from tasks.store import open_store
from tasks.vocabularies import ByteVocabulary

pytestmark = pytest.mark.fast

BATCH = 8
ALONE = MixtureSettings()
OBJECTIVES = ("causal_lm", "prefix_lm", "span_corruption", "ul2", "seq2seq")


def store_for(objective: str, **sizes: int) -> MemoryStore:
    return (pair_store if objective == "seq2seq" else text_store)(**sizes)


def batches(objective: str = "causal_lm", seed: int = 5, **changes) -> Batches:
    data = settings(objective, **changes)
    store = store_for(objective, only=60)
    return training(store, data, ALONE, batch_size=BATCH, seed=seed)


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) for name in left
    )


def epoch_rows(data: Batches, epoch: int) -> list[bytes]:
    """The rows numbered [epoch·rows, (epoch + 1)·rows), one at a time."""
    num_rows = data.rows("only")
    numbers = range(epoch * num_rows, (epoch + 1) * num_rows)
    return [
        data.read(n // BATCH, n % BATCH, n % BATCH + 1)[
            "decoder_target_tokens"
        ].tobytes()
        for n in numbers
    ]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_is_the_same_whoever_reads_which_rows(objective):
    attention = "causal" if objective == "causal_lm" else "bidirectional"
    data = batches(objective, prefix_attention=attention)
    again = batches(objective, prefix_attention=attention)
    for index in (10_000, 0, data.rows("only") // BATCH):  # one spans two epochs
        whole = data.read(index, 0, BATCH)
        parts = [again.read(index, start, start + 2) for start in (6, 0, 2, 4)]
        parts = [parts[i] for i in (1, 2, 3, 0)]
        joined = {
            name: np.concatenate([part[name] for part in parts])
            for name in data.features
        }
        assert same(whole, joined)
        shape = (BATCH, data.length)
        assert all(v.shape == shape and v.dtype == np.int32 for v in whole.values())
    assert ("decoder_causal_attention" in data.features) == (objective != "causal_lm")


@pytest.mark.parametrize("objective", ["causal_lm", "seq2seq"])
def test_each_text_is_read_from_a_start(objective, monkeypatch):
    monkeypatch.setattr(ByteVocabulary, "id_of", lambda self, token: {"<s>": 7}[token])
    usual = batches(objective).read(3, 0, BATCH)
    other = batches(objective, start_token="<s>").read(3, 0, BATCH)
    begins_BL = (usual["decoder_positions"] == 0) & (usual["decoder_segment_ids"] > 0)
    assert begins_BL.any()
    assert (usual["decoder_input_tokens"][begins_BL] == 0).all()
    usual["decoder_input_tokens"][begins_BL] = 7
    assert same(usual, other)


def test_every_epoch_visits_every_row_once_in_another_order():
    data = batches()
    assert data.rows("only") % BATCH  # so that an epoch ends within a batch
    stored = epoch_rows(batches(shuffle=False), 0)
    first, second = epoch_rows(data, 0), epoch_rows(data, 1)
    assert sorted(first) == sorted(second) == sorted(stored)
    assert first != second != stored != first
    assert epoch_rows(batches(seed=6), 0) != first


@pytest.mark.parametrize("packing", ["next_fit", "stream"])
def test_rows_of_text_hold_every_token_once_and_no_segment_two_documents(packing):
    data = batches(shuffle=False, packing=packing)
    part = data.tasks[0].part
    tokens, segments = [], 0
    for n in range(data.rows("only")):
        row = data.read(n // BATCH, n % BATCH, n % BATCH + 1)
        row = {name: value[0] for name, value in row.items()}
        real = row["decoder_segment_ids"] > 0
        assert real[: real.sum()].all()  # padding only at the end
        assert packing == "next_fit" or real.all() or n == data.rows("only") - 1
        tokens += row["decoder_target_tokens"][real].tolist()
        segments += int(row["decoder_segment_ids"].max())
        ends = np.flatnonzero(row["decoder_target_tokens"] == 1)
        following = np.append(row["decoder_segment_ids"], 0)[ends + 1]
        assert (following != row["decoder_segment_ids"][ends]).all()
    assert tokens == np.concatenate(part.documents["targets"]).tolist()
    assert len(tokens) == data.tokens_per_epoch == part.num_tokens("targets")
    cuts = {0, *np.cumsum([len(d) for d in part.documents["targets"]]).tolist()}
    if packing == "stream":  # every row and every document begins a segment
        assert segments == len(cuts | set(range(0, len(tokens), 32))) - 1


def test_rows_of_pairs_hold_every_pair_once_with_loss_on_its_targets():
    data = batches("seq2seq", shuffle=False)
    part, lengths = data.tasks[0].part, data.tasks[0].data.task_feature_lengths
    found, lost = [], collections.Counter()
    for n in range(data.rows("only")):
        row = data.read(n // BATCH, n % BATCH, n % BATCH + 1)
        row = {name: value[0] for name, value in row.items()}
        for segment in range(1, row["decoder_segment_ids"].max() + 1):
            here = row["decoder_segment_ids"] == segment
            predicted = row["decoder_loss_weights"][here] == 1
            tokens = row["decoder_target_tokens"][here]
            found.append((tokens[~predicted].tolist(), tokens[predicted].tolist()))
    stored = []
    for pair in zip(part.documents["inputs"], part.documents["targets"], strict=True):
        kept = [pair[0][: lengths["inputs"]], pair[1][: lengths["targets"]]]
        stored.append(tuple(k.tolist() for k in kept))
        lost["inputs"] += len(pair[0]) - len(kept[0])
        lost["targets"] += len(pair[1]) - len(kept[1])
        lost["pairs"] += (len(kept[0]), len(kept[1])) != (len(pair[0]), len(pair[1]))
    assert found == stored
    truncation = data.tasks[0].truncation
    assert lost["inputs"] > 0 < lost["targets"]
    assert truncation.examples == lost["pairs"]
    assert truncation.tokens == {f: lost[f] for f in ("inputs", "targets")}


@pytest.mark.parametrize("objective", ["span_corruption", "ul2", "prefix_lm"])
def test_corruption_is_drawn_anew_each_epoch_and_the_same_for_scoring(objective):
    data = batches(objective)
    assert sorted(epoch_rows(data, 0)) == sorted(epoch_rows(batches(objective), 0))
    weights = [data.read(i, 0, BATCH)["decoder_loss_weights"] for i in (0, 50)]
    assert weights[0].any()
    if objective != "prefix_lm":
        assert sorted(epoch_rows(data, 0)) != sorted(epoch_rows(data, 1))
    store = text_store(only=60)
    passes = [
        heldout(store, "only", settings(objective), batch_size=4, seed=3).read(0, 0, 4)
        for _ in range(2)
    ]
    assert same(*passes)


def test_prefix_lm_gives_the_start_of_each_row_and_asks_for_the_rest():
    data = batches("prefix_lm", prefix_attention="bidirectional")
    pivots = []
    for index in range(20):
        batch = data.read(index, 0, BATCH)
        real = (batch["decoder_segment_ids"] == 1).sum(axis=1)
        for r in range(BATCH):
            given = int(np.argmax(batch["decoder_loss_weights"][r]))
            pivots.append(given)
            assert 1 <= given <= real[r] - 1
            assert batch["decoder_loss_weights"][r, given : real[r]].all()
            assert not batch["decoder_loss_weights"][r, real[r] :].any()
            seen = np.flatnonzero(batch["decoder_causal_attention"][r])
            assert seen.tolist() == list(range(given + 1))
    # 160 draws from 31 values: all but a few appear, both ends among the usual.
    assert len(set(pivots)) > 25
    assert min(pivots) < 4
    assert max(pivots) > 28


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_pass_scores_every_heldout_row_once(objective):
    store = store_for(objective, only=150)
    data = settings(objective)
    passed = heldout(store, "only", data, batch_size=BATCH, seed=3)
    assert passed.num_rows % BATCH  # so that the last batch is filled up
    assert passed.num_eval_batches == passed.num_rows // BATCH + 1
    read = [passed.read(i, 0, BATCH) for i in range(passed.num_eval_batches)]
    weights = np.concatenate([batch["decoder_loss_weights"] for batch in read])
    targets = np.concatenate([batch["decoder_target_tokens"] for batch in read])
    part = store.split("only", "validation")
    if objective == "causal_lm":
        stored = np.concatenate(part.documents["targets"]).tolist()
        assert targets[weights > 0].tolist() == stored
        assert weights.sum() == passed.tokens_per_epoch == len(stored)
    if objective == "seq2seq":
        kept = [d[:9] for d in part.documents["targets"]]
        assert targets[weights > 0].tolist() == np.concatenate(kept).tolist()
    last = passed.num_eval_batches - 1
    for name in FEATURES:
        assert not read[-1][name][passed.num_rows % BATCH :].any()
    parts = [passed.read(last, start, start + 1) for start in range(BATCH)]
    joined = {n: np.concatenate([p[n] for p in parts]) for n in passed.features}
    assert same(read[-1], joined)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_scored_target_says_its_document(objective):
    store = store_for(objective, only=150)
    passed = heldout(store, "only", settings(objective), batch_size=BATCH, seed=3)
    stored = store.split("only", "validation").documents["targets"]
    found = collections.defaultdict(list)
    for index in range(passed.num_eval_batches):
        batch = passed.read(index, 0, BATCH)
        documents = passed.documents(index, 0, BATCH)
        part = passed.documents(index, 2, 5)
        assert np.array_equal(documents[2:5], part)
        assert documents.dtype == np.int64
        assert ((documents >= 0) == (batch["decoder_loss_weights"] == 1)).all()
        tokens = batch["decoder_target_tokens"]
        for document, token in zip(
            documents[documents >= 0], tokens[documents >= 0], strict=True
        ):
            found[int(document)].append(int(token))
    for number, tokens in found.items():
        whole = stored[number].tolist()
        if objective == "causal_lm":
            assert tokens == whole
        elif objective == "seq2seq":
            assert tokens == whole[:9]
        else:  # what is scored of a document stands in it, sentinels and ends aside
            kept = [token for token in tokens if 1 < token < 259]
            assert not collections.Counter(kept) - collections.Counter(whole)
    if objective in ("causal_lm", "seq2seq"):
        assert sorted(found) == list(range(len(stored)))


def test_a_mixture_interleaves_its_tasks_and_reports_counts():
    store = text_store(big=200, small=11, unused=30)
    rates = {"big": 3.0, "small": 1.0, "unused": 0.0}
    data = training(
        store, settings(), MixtureSettings(rates=rates), batch_size=BATCH, seed=5
    )
    alone = {
        name: training(
            MemoryStore({name: store.splits[name]}),
            settings(),
            ALONE,
            batch_size=1,
            seed=5,
        )
        for name in store.tasks
    }
    seen = collections.Counter()
    for index in range(40):
        number, k = data.mixture.assign(index * BATCH, (index + 1) * BATCH)
        batch = data.read(index, 0, BATCH)
        for r in range(BATCH):  # each task's rows are those of a run on it alone
            name = store.tasks[number[r]]
            assert k[r] == seen[name]
            row = alone[name].read(seen[name], 0, 1)
            assert same({n: v[r : r + 1] for n, v in batch.items()}, row)
            seen[name] += 1
        progress = data.progress(index + 1)
        assert {name: p.rows for name, p in progress.items()} == {
            name: seen[name] for name in store.tasks
        }
    assert (seen["big"], seen["small"], seen["unused"]) == (240, 80, 0)
    small = data.progress(40)["small"]
    assert small.epochs == 80 / data.rows("small") > 1
    assert small.tokens == round(
        small.epochs * store.split("small", "train").num_tokens()
    )


def test_weighting_takes_rates_sizes_or_a_schedule():
    store = text_store(big=200, small=11)
    store.rates = {"big": 1.0, "small": 4.0}

    def shares(step: int = 0, **mixture) -> float:
        data = training(
            store, settings(), MixtureSettings(**mixture), batch_size=BATCH, seed=0
        )
        before, after = (data.mixture.counts((step + n) * BATCH) for n in (0, 1000))
        return float((after - before)[0] / (1000 * BATCH))

    tokens = [store.split(name, "train").num_tokens() for name in store.tasks]
    assert shares() == pytest.approx(0.2, abs=1e-3)
    assert shares(rates={"big": 1, "small": 1}) == 0.5
    sized = {"weighting": "proportional"}
    assert shares(**sized) == pytest.approx(tokens[0] / sum(tokens), abs=1e-3)
    root = np.sqrt(tokens)
    assert shares(**sized, temperature=2.0) == pytest.approx(
        root[0] / root.sum(), abs=1e-3
    )
    assert shares(**sized, cap_tokens=10) == 0.5
    turning = {"schedule": {0: {"big": 1, "small": 0}, 1000: {"big": 0, "small": 1}}}
    assert shares(**turning) == 0.5  # the mean of a share that falls from 1 to 0
    assert shares(1000, **turning) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rates": {"a": 1, "c": 1}}, ["MIXTURE_RATES", "'c' are not", "'b' have no"]),
        ({"schedule": {7: {"a": 1}}}, ["MIXTURE_SCHEDULE[7]", "'b' have no rate"]),
    ],
)
def test_a_mixture_that_is_not_the_stores_is_refused(changes, words):
    mixture = MixtureSettings(**changes)
    with pytest.raises(StoreError) as error:
        training(text_store(a=5, b=5), settings(), mixture, batch_size=2, seed=0)
    assert all(word in str(error.value) for word in words)


def test_a_store_that_does_not_suit_the_objective_is_refused():
    store = MemoryStore({**pair_store(pairs=5).splits, **text_store(text=5).splits})
    with pytest.raises(
        StoreError, match="'inputs', 'targets' of every Task, and 'text"
    ):
        training(store, settings("seq2seq"), ALONE, batch_size=2, seed=0)
    training(store, settings("causal_lm"), ALONE, batch_size=2, seed=0)
    short = settings(
        "span_corruption", task_feature_lengths={"inputs": 32, "targets": 5}
    )
    with pytest.raises(StoreError, match="TASK_FEATURE_LENGTHS"):
        heldout(store, "text", short, batch_size=2, seed=0)


def test_a_task_without_tokens_is_refused_unless_its_rate_is_0():
    empty = {"train": MemorySplit({"targets": []})}
    empty["validation"] = empty["train"]
    for objective in OBJECTIVES[:4]:
        data = settings(objective)
        store = MemoryStore({"empty": empty, **text_store(text=30).splits})
        with pytest.raises(StoreError, match="'empty' holds no tokens: set the rate"):
            training(store, data, ALONE, batch_size=2, seed=0)
        with pytest.raises(StoreError, match="HELDOUT_SPLIT"):
            heldout(store, "empty", data, batch_size=2, seed=0)
        without = MixtureSettings(rates={"empty": 0.0, "text": 1.0})
        ready = training(store, data, without, batch_size=2, seed=0)
        assert ready.read(5, 0, 2)["decoder_loss_weights"].any()
        assert ready.progress(5)["empty"].rows == ready.rows("empty") == 0
        assert ready.tokens_per_epoch == store.split("text", "train").num_tokens()
        assert ready.padding_fraction < 1


def test_a_pack_index_of_other_tokens_is_refused():
    for objective in ("causal_lm", "seq2seq"):
        first = store_for(objective, only=60)
        data = training(first, settings(objective), ALONE, batch_size=2, seed=0)
        data.read(0, 0, 2)
        other = store_for(objective, only=61)
        other.split("only", "train").kept = first.split("only", "train").kept
        with pytest.raises(StoreError, match="does not fit its split"):
            training(other, settings(objective), ALONE, batch_size=2, seed=0).read(
                0, 0, 2
            )


def test_padding_is_what_batches_hold():
    for objective in OBJECTIVES:
        data = batches(objective, shuffle=False)
        rows = data.rows("only")
        epochs = 15 if objective == "ul2" else 1  # it draws how much there is
        real = np.concatenate(
            [
                data.read(n // BATCH, n % BATCH, n % BATCH + 1)["decoder_segment_ids"]
                for n in range(rows * epochs)
            ]
        )
        tolerance = 0.01 if objective == "ul2" else 1e-9
        assert data.padding_fraction == pytest.approx((real == 0).mean(), abs=tolerance)


def test_rows_outside_a_batch_are_refused():
    data = batches()
    for index, start, stop in ((-1, 0, 1), (0, 0, BATCH + 1), (0, 3, 2), (0, -1, 2)):
        with pytest.raises(ValueError, match="a batch has rows 0 to 8"):
            data.read(index, start, stop)
    held = heldout(text_store(only=60), "only", settings(), batch_size=BATCH, seed=0)
    with pytest.raises(ValueError, match="of a pass of"):
        held.read(held.num_eval_batches, 0, 1)


def test_a_store_on_disk_gives_the_same_batches_and_keeps_its_pack_indices(tmp_path):
    for objective in OBJECTIVES:
        attention = "causal" if objective == "causal_lm" else "bidirectional"
        data = settings(objective, prefix_attention=attention)
        memory = store_for(objective, one=60, two=20)
        folder = tmp_path / objective
        on_disk(memory, folder)
        for _ in range(2):  # the second time, the pack index is read
            stored = open_store(folder)
            ours, theirs = (
                training(store, data, ALONE, batch_size=BATCH, seed=4)
                for store in (stored, memory)
            )
            assert same(ours.read(31, 0, BATCH), theirs.read(31, 0, BATCH))
            held = [
                heldout(store, "two", data, batch_size=BATCH, seed=4)
                for store in (stored, memory)
            ]
            last = held[0].num_eval_batches - 1
            for index in (0, last):
                assert same(*(h.read(index, 0, BATCH) for h in held))
                assert np.array_equal(*(h.documents(index, 0, BATCH) for h in held))
            # Rows beyond the split are asked for by some host or other.
            assert not held[0].read(last, BATCH, BATCH)["decoder_positions"].any()
        kept = list(folder.glob("*/train/pack-*"))
        assert len(kept) == (2 if objective in ("causal_lm", "seq2seq") else 0)


def test_rows_beyond_a_heldout_split_are_empty():
    held = heldout(text_store(only=5), "only", settings(), batch_size=64, seed=0)
    assert held.num_rows < 60
    batch = held.read(0, 60, 64)
    assert all(v.shape == (4, 32) and not v.any() for v in batch.values())
    assert (held.documents(0, 60, 64) == -1).all()
