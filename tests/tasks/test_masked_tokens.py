"""Masked tokens: how many, which, what is read in their place, and the two sides."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from memory_store import MemorySplit, MemoryStore, documents, settings

from tasks import layouts
from tasks.batches import training
from tasks.huggingface_vocabulary import HuggingFaceVocabulary
from tasks.masked_tokens import Masking, masking
from tasks.settings import MixtureSettings, problems

pytestmark = pytest.mark.fast

V, EXTRA, EOS = 120, 4, 1
MASK = V - 1
MASKING = Masking(0.15, V, EXTRA, EOS)


def tokens_of(length: int, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(3, V - EXTRA, length)
    tokens[9::10] = EOS
    return tokens


def test_fifteen_percent_are_chosen_of_which_eight_tenths_are_masked():
    tokens = tokens_of(20_000)
    read, chosen = MASKING(tokens, 1, 2, 3)
    assert chosen.sum() == round(0.15 * (tokens != EOS).sum())
    assert not chosen[tokens == EOS].any()
    np.testing.assert_array_equal(read[~chosen], tokens[~chosen])
    masked, same = read[chosen] == MASK, read[chosen] == tokens[chosen]
    # Of 2,700 choices; a standard deviation is 0.8 and 0.6 %.
    assert np.mean(masked) == pytest.approx(0.8, abs=0.03)
    assert np.mean(same) == pytest.approx(0.1, abs=0.025)
    others = read[chosen][~masked & ~same]
    assert others.min() >= 1
    assert others.max() < V - EXTRA
    assert len(np.unique(others)) > 80


def test_a_piece_of_a_tokenizer_can_stand_for_masked_tokens():
    named = {"[PAD]": 0, "</s>": 1, "[MASK]": 2}
    words = named | {f"w{i}": i for i in range(3, V)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    model.add_special_tokens(list(named))
    vocabulary = HuggingFaceVocabulary(model.to_str().encode(), "</s>")
    data = settings("masked_lm", layout="encoder", extra_ids=0, mask_token="[MASK]")
    data = dataclasses.replace(data, vocabulary="some/tokenizer.json")
    assert not problems(data)
    found = masking(data, vocabulary)
    tokens = tokens_of(2_000)
    read, chosen = found(tokens, 1)
    assert np.mean(read[chosen] == 2) == pytest.approx(0.8, abs=0.06)
    assert (read[chosen] == V - 1).sum() <= 3  # one in ten of so many ids
    with pytest.raises(ValueError, match=r"MASK_TOKEN = '\[M\]' is no piece"):
        masking(dataclasses.replace(data, mask_token="[M]"), vocabulary)


def test_a_choice_is_a_function_of_its_key():
    tokens = tokens_of(500)
    first, again, other = (MASKING(tokens, *key) for key in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(first[0], again[0])
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_rows_have_one_that_is_chosen(length):
    _, chosen = MASKING(np.full(length, 7), 0)
    assert chosen.sum() == 1


def test_a_row_of_ends_alone_has_none():
    read, chosen = MASKING(np.full(3, EOS), 0)
    assert not chosen.any()
    assert (read == EOS).all()


def batches_of(objective: str, lengths: dict[str, int], **changes):
    store = MemoryStore({"task": {"train": MemorySplit({"targets": documents(40, 5)})}})
    data = settings(objective, task_feature_lengths=lengths, **changes)
    return training(store, data, MixtureSettings(), batch_size=8, seed=3)


def test_epochs_mask_other_tokens_of_the_same_rows():
    batches = batches_of("masked_lm", {"targets": 30}, layout="encoder", shuffle=False)
    rows = batches.rows("task")
    batches = training(
        MemoryStore({"task": {"train": MemorySplit({"targets": documents(40, 5)})}}),
        batches.tasks[0].data,
        MixtureSettings(),
        batch_size=rows,
        seed=3,
    )
    first, second = batches.read(0, 0, rows), batches.read(1, 0, rows)
    for name in ("target_tokens", "positions"):
        np.testing.assert_array_equal(
            first[f"encoder_{name}"], second[f"encoder_{name}"]
        )
    weights = first["encoder_loss_weights"], second["encoder_loss_weights"]
    assert (weights[0] != weights[1]).any()
    task = batches.tasks[0]
    document_BL = task.documents(np.arange(rows), np.zeros(rows, np.int64), 3)
    np.testing.assert_array_equal(document_BL >= 0, weights[0] == 1)


@pytest.mark.parametrize("objective", ["span_corruption", "ul2"])
def test_both_sides_have_the_pairs_that_one_row_joins(objective):
    lengths = {"inputs": 40, "targets": 40}
    apart = batches_of(objective, lengths, layout="encoder_decoder").read(0, 0, 8)
    joined = batches_of(objective, lengths).read(0, 0, 8)
    for row in range(8):
        sides = [
            apart[f"{side}_tokens"][row][apart[f"{segments}_segment_ids"][row] > 0]
            for side, segments in (
                ("encoder_input", "encoder"),
                ("decoder_target", "decoder"),
            )
        ]
        whole = joined["decoder_target_tokens"][row]
        whole = whole[joined["decoder_segment_ids"][row] > 0]
        np.testing.assert_array_equal(np.concatenate(sides), whole)
        assert apart["decoder_loss_weights"][row].sum() == len(sides[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layout": "encoder"}, "'causal_lm' is not for ARCHITECTURE = 'encoder'"),
        ({"objective": "masked_lm"}, "'masked_lm' is not for ARCHITECTURE = 'decoder'"),
        (
            {"objective": "masked_lm", "layout": "encoder", "extra_ids": 0},
            "in the place of masked tokens, and EXTRA_IDS = 0 has none",
        ),
        (
            {"mask_token": "[MASK]"},
            "MASK_TOKEN = '[MASK]' means nothing to OBJECTIVE = 'causal_lm'",
        ),
        (
            {"objective": "masked_lm", "layout": "encoder", "mask_token": "[MASK]"},
            "MASK_TOKEN = '[MASK]' is no piece of VOCABULARY = 'sentencepiece'",
        ),
    ],
)
def test_objectives_that_do_not_suit_the_shape_are_refused(changes, said):
    data = dataclasses.replace(settings("causal_lm"), **changes)
    assert any(said in problem for problem in problems(data))
    assert not problems(settings("causal_lm"))
    assert layouts.features(data)
