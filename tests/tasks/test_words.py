"""Whole words and entities: where they begin, and that each is masked whole or not."""

import dataclasses
import re

import numpy as np
import pytest
import tokenizers
from memory_store import VOCABULARY, MemorySplit, MemoryStore, settings

from tasks.batches import training
from tasks.errors import StoreError
from tasks.masked_tokens import Masking, masking
from tasks.settings import MixtureSettings, problems
from tasks.train_vocabulary import train_vocabulary
from tasks.vocabularies import ByteVocabulary
from tasks.words import units

pytestmark = pytest.mark.fast

ENTITIES = ("New York", "York", "New York City", "Ada", "d'Arc", "C++")
WORDS = (*ENTITIES, "new", "yorkers", "Adam", "(New York)", "city,", "a", "C", "it's")


def text_of(number: int, seed: int = 0) -> str:
    drawn = np.random.default_rng(seed).integers(0, len(WORDS), number)
    return " ".join(WORDS[i] for i in drawn)


@pytest.fixture(scope="module")
def pieces():
    texts = [text_of(60, seed) for seed in range(20)]
    return train_vocabulary(iter(texts), 300, extra_ids=4)[0]


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "entities.txt"
    path.write_text("\n".join((*ENTITIES, "", "  ")), encoding="utf-8")
    return str(path)


def spans_of(text: str) -> list[tuple[int, int]]:
    """The oracle: entities and words of ASCII text, every other character by itself."""
    found, place = [], 0
    while place < len(text):
        end = place + 1
        inside = text[place].isalnum() and place and text[place - 1].isalnum()
        assert not inside, "the loop goes from word to word"
        while text[place].isalnum() and end < len(text) and text[end].isalnum():
            end += 1
        for entity in sorted(ENTITIES, key=len, reverse=True):
            stop = place + len(entity)
            cut = text[stop - 1 : stop + 1].isalnum() and stop < len(text)
            if text[place:stop] == entity and not cut:
                end = max(end, stop)
                break
        found.append((place, end))
        place = end
    return found


def test_bytes_begin_units_where_the_text_does(listed):
    text = text_of(300)
    tokens = np.asarray(VOCABULARY.encode(text))
    found = units(VOCABULARY, listed, 100)(tokens)
    wanted = np.zeros(len(text), bool)
    wanted[[start for start, _ in spans_of(text)]] = True
    np.testing.assert_array_equal(found, wanted)
    entities = [text[a:b] for a, b in spans_of(text) if text[a:b] in ENTITIES]
    assert set(entities) == set(ENTITIES)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_every_entity_is_masked_whole_or_not_at_all(listed, pieces, kind):
    vocabulary = {"bytes": VOCABULARY, "pieces": pieces}[kind]
    text = text_of(300, 1)
    tokens = np.asarray(vocabulary.encode(text))
    mask = dataclasses.replace(
        Masking(0.15, vocabulary.size, vocabulary.extra_ids, vocabulary.eos_id),
        units=units(vocabulary, listed, 40),
    )
    ends = np.cumsum([len(vocabulary.decode([i])) for i in tokens.tolist()])
    assert ends[-1] == len(text)
    fates = set()
    for key in range(30):
        read, chosen = mask(tokens, key)
        assert 0 <= round(0.15 * len(tokens)) - chosen.sum() <= 2
        np.testing.assert_array_equal(read[~chosen], tokens[~chosen])
        masked = read == vocabulary.size - 1
        for start, stop in spans_of(text):
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            here = slice(first, last + 1)
            assert len(set(chosen[here].tolist())) == 1, text[start:stop]
            assert len(set(masked[here].tolist())) == 1, text[start:stop]
            if text[start:stop] in ENTITIES:
                fates.add((text[start:stop], bool(chosen[first])))
    assert len(fates) == 2 * len(ENTITIES)


def test_eight_tenths_of_units_are_masked_whole(listed):
    tokens = np.asarray(VOCABULARY.encode(text_of(4000, 2)))
    mask = Masking(0.15, VOCABULARY.size, VOCABULARY.extra_ids, 1)
    mask = dataclasses.replace(mask, units=units(VOCABULARY, listed, 40))
    read, chosen = mask(tokens, 3)
    first = np.flatnonzero(mask.units(tokens) & chosen)
    # Of about 1,000 units; a standard deviation is 1.3 %.
    assert np.mean(read[first] == VOCABULARY.size - 1) == pytest.approx(0.8, abs=0.05)
    assert np.mean(read[first] == tokens[first]) == pytest.approx(0.1, abs=0.04)
    again = mask(tokens, 3)
    np.testing.assert_array_equal(again[0], read)
    assert (mask(tokens, 4)[1] != chosen).any()


def test_units_of_one_token_are_chosen_as_single_tokens_are():
    tokens = np.random.default_rng(0).choice([*b" .,;:"], 200) + 3
    tokens[::9] = 1
    alone = Masking(0.15, VOCABULARY.size, VOCABULARY.extra_ids, 1)
    whole = dataclasses.replace(alone, units=units(VOCABULARY, "", 9))
    for one, other in zip(alone(tokens, 5), whole(tokens, 5), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_row_of_one_long_word_is_masked_whole():
    tokens = np.asarray([*VOCABULARY.encode("incomprehensible"), 1])
    mask = dataclasses.replace(
        Masking(0.15, VOCABULARY.size, VOCABULARY.extra_ids, 1),
        units=units(VOCABULARY, "", 9),
    )
    assert mask(tokens, 0)[1].tolist() == [True] * 16 + [False]


def test_pieces_of_other_tokenizers_go_on_with_words():
    names = ("[UNK]", "[SEP]", "a", "new", "york", "##ers", "##s", ",", "中", "国")
    model = tokenizers.models.WordPiece({n: i for i, n in enumerate(names)})
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    made.add_special_tokens(["[UNK]", "[SEP]"])
    from tasks.huggingface_vocabulary import HuggingFaceVocabulary

    vocabulary = HuggingFaceVocabulary(made.to_str().encode(), "[SEP]", 1)
    tokens = np.asarray(vocabulary.encode("new yorkers, a new 中国"))
    begins = units(vocabulary, "", 9)(tokens)
    read = [names[i] for i in tokens]
    assert read == ["new", "york", "##ers", ",", "a", "new", "中", "国"]
    assert begins.tolist() == [True, True, False, True, True, True, True, True]


def test_rows_are_masked_by_units(listed):
    documents = [
        np.asarray([*VOCABULARY.encode(text_of(n % 7 + 4, n)), 1]) for n in range(20)
    ]
    store = MemoryStore({"task": {"train": MemorySplit({"targets": documents})}})
    data = settings(
        "masked_entities",
        task_feature_lengths={"targets": 128},
        layout="encoder",
        entities=listed,
    )
    assert not problems(data)
    batches = training(store, data, MixtureSettings(), batch_size=8, seed=3)
    batch = batches.read(0, 0, 8)
    found = units(VOCABULARY, listed, 19)
    for row in range(8):
        real = batch["encoder_segment_ids"][row] > 0
        tokens = batch["encoder_target_tokens"][row][real]
        chosen = batch["encoder_loss_weights"][row][real] == 1
        change = np.flatnonzero(np.diff(chosen.astype(int)) != 0) + 1
        assert chosen.any()
        assert not chosen[tokens == 1].any()
        assert found(tokens)[change].all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        (b"", "holds no entity: list them"),
        (b"\n  \n", "holds no entity: list them"),
        (b"Ada\n\xff\n", "is not UTF-8, at byte 4"),
        (b"Ada\nIncomprehensible\n", "line 2: 'Incomprehensible' has 16 tokens, and"),
    ],
)
def test_lists_that_do_not_suit_are_refused(tmp_path, content, said):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    store = MemoryStore({"t": {"train": MemorySplit({"targets": [np.arange(9) + 1]})}})
    data = settings("masked_entities", layout="encoder", entities=str(path))
    with pytest.raises(StoreError, match=re.escape(said)):
        training(store, data, MixtureSettings(), batch_size=1, seed=0)


def test_an_entity_without_tokens_of_text_is_refused(tmp_path):
    names = {"[UNK]": 0, "[SEP]": 1, "a": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="[UNK]"))
    made.add_special_tokens(["[UNK]", "[SEP]"])
    from tasks.huggingface_vocabulary import HuggingFaceVocabulary

    path = tmp_path / "list.txt"
    path.write_text("a\nAda")
    vocabulary = HuggingFaceVocabulary(made.to_str().encode(), "[SEP]", 1)
    data = settings("masked_entities", layout="encoder", entities=str(path))
    with pytest.raises(ValueError, match="line 2: 'Ada' has no tokens that stand for"):
        masking(data, vocabulary)


def test_a_list_for_another_objective_is_refused():
    data = settings("causal_lm", entities="list.txt")
    assert problems(data) == [
        "ENTITIES = 'list.txt' means nothing to OBJECTIVE = 'causal_lm', only to "
        "'masked_entities': leave it at ''"
    ]
    assert not problems(settings("causal_lm"))
    assert masking(settings("causal_lm"), ByteVocabulary()) is None
