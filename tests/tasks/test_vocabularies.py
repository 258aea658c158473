import numpy as np
import pytest
from corpus import texts

from tasks import train_vocabulary
from tasks.store import StoreError
from tasks.train_vocabulary import train_sentencepiece
from tasks.vocabularies import ByteVocabulary, load, save, sentencepiece_model

AWKWARD = [
    "",
    " ",
    " leading and trailing  ",
    "def f():\n\n\n\t\treturn 1\r\n    \n",
    "\u2581 ▁▁x▁",
    "a\0b",
    "</s> <unk> <0x0A> <pad> ⁇",
    "é vs e\u0301, ﬁ, Ⅳ, \u2028, \u00a0, \ufeff",
    "漢字 🙂👩‍👩‍👧 \u2585 \U0010ffff",
]


@pytest.fixture(scope="module")
def trained():
    return train_sentencepiece(texts("train", 60), 320)


@pytest.mark.fast
@pytest.mark.parametrize("text", AWKWARD)
def test_text_survives_bytes_and_pieces(trained, text):
    for vocabulary in (ByteVocabulary(), trained):
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        assert all(2 < i < vocabulary.size for i in ids)


@pytest.mark.fast
def test_pieces_are_fewer_than_bytes(trained):
    text = "".join(texts("validation", 7))
    assert trained.size == 320
    assert len(trained.encode(text)) < 0.6 * len(text.encode())


@pytest.mark.fast
def test_any_ids_decode(trained):
    ids = np.random.default_rng(0).integers(-5, 1000, 2000)
    for vocabulary in (ByteVocabulary(), ByteVocabulary(100), trained):
        assert isinstance(vocabulary.decode(ids), str)
        hello = vocabulary.encode("hé")
        assert vocabulary.decode([1, *hello, 0, -3, 10**9, 1]) == "hé"
        half = vocabulary.encode("\u0104")[:1]  # 0xC4 of 0xC4 0x84
        assert vocabulary.decode(half) == "\ufffd"


@pytest.mark.fast
def test_a_vocabulary_survives_saving(tmp_path, trained):
    for vocabulary in (ByteVocabulary(), ByteVocabulary(7), trained):
        save(vocabulary, tmp_path)
        again = load(tmp_path)
        assert again.fingerprint == vocabulary.fingerprint
        assert (again.kind, again.size) == (vocabulary.kind, vocabulary.size)
        assert again.encode("x y\n") == vocabulary.encode("x y\n")
    assert len({ByteVocabulary().fingerprint, ByteVocabulary(7).fingerprint}) == 2
    with pytest.raises(StoreError, match=r"holds no readable vocabulary\.json"):
        load(tmp_path / "nowhere")


@pytest.mark.fast
def test_training_is_a_function_of_the_text(trained):
    again = train_sentencepiece(iter(texts("train", 60)), 320)
    assert again.model == trained.model
    assert train_sentencepiece(texts("train", 50), 320).model != trained.model


@pytest.mark.fast
def test_a_sample_is_even_and_keeps_the_order():
    corpus = texts("train", 60)
    everything = train_vocabulary._sample(corpus, 10**9)
    assert "".join(everything) == "".join(corpus).replace("\u2581", " ")
    some = train_vocabulary._sample(corpus, 10_000)
    assert 7_000 < sum(len(s.encode()) for s in some) <= 10_000
    places = [everything.index(stretch) for stretch in some]
    assert places == sorted(places)
    assert places[-1] > 0.7 * len(everything)  # not just the beginning


@pytest.mark.fast
def test_more_pieces_than_the_text_has_are_refused():
    with pytest.raises(StoreError, match="VOCABULARY_SIZE = 5000: SentencePiece"):
        train_sentencepiece(["a few words"], 5000)


@pytest.mark.fast
def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(StoreError, match="as the path of a SentencePiece model"):
        sentencepiece_model("byte")
    (tmp_path / "x.model").write_bytes(b"\x0bnot a model")
    with pytest.raises(StoreError, match=r"x\.model is not a SentencePiece model"):
        sentencepiece_model(tmp_path / "x.model")


def test_ids_are_those_of_seqio(tmp_path, trained):
    import seqio

    (tmp_path / "v.model").write_bytes(trained.model)
    pairs = [
        (ByteVocabulary(100), seqio.ByteVocabulary(extra_ids=100)),
        (ByteVocabulary(), seqio.ByteVocabulary()),
        (trained, seqio.SentencePieceVocabulary(str(tmp_path / "v.model"))),
    ]
    for ours, theirs in pairs:
        assert (ours.size, ours.pad_id, ours.eos_id) == (
            theirs.vocab_size,
            theirs.pad_id,
            theirs.eos_id,
        )
        for text in ("def f():\n    return 'é'", "x  y\t🙂"):
            assert ours.encode(text) == list(theirs.encode(text))
