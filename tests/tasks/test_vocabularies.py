import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from corpus import texts
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from tasks import files, train_vocabulary
from tasks.sentinels import extra_outside
from tasks.store import StoreError
from tasks.train_vocabulary import train_sentencepiece
from tasks.vocabularies import (
    ByteVocabulary,
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    from_file,
    from_files,
    start_id,
    to_files,
)

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
ENGLISH = str.__doc__ + dict.__doc__ + json.__doc__
# A poem of Li Bai, and a sentence about it.
CHINESE = (
    "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。\n"
    "这首诗是唐代诗人李白写的：他在夜里看见月光，想起了家乡。\n"
)
pytestmark = pytest.mark.fast

KINDS = ("bytes", "bpe", "unigram", "file", "huggingface")


def train_tokenizer(sample, eos_token="<|endoftext|>"):
    """A tokenizer.json as GPT-2's: byte pairs, and truncation that must not act."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", eos_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(sample, trainer)
    model.enable_truncation(max_length=4)
    return model.to_str().encode()


def with_extra(vocabulary):
    return dataclasses.replace(vocabulary, extra_ids=2)


@pytest.fixture(scope="module")
def trained():
    return train_sentencepiece(texts("train", 60), 320)


@pytest.fixture(scope="module")
def every_kind(trained, tmp_path_factory):
    sample = [ENGLISH, CHINESE] * 3
    folder = tmp_path_factory.mktemp("vocabularies")
    (folder / "a.model").write_bytes(trained.model)
    (folder / "tokenizer.json").write_bytes(train_tokenizer(sample))
    return {
        "bytes": ByteVocabulary(3),
        "bpe": with_extra(train_sentencepiece(sample, 400)),
        "unigram": with_extra(train_sentencepiece(sample, 400, model_type="unigram")),
        "file": from_file(folder / "a.model", extra_ids=5),
        "huggingface": from_file(folder / "tokenizer.json", extra_ids=7),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*AWKWARD, ENGLISH, CHINESE, ENGLISH + CHINESE])
def test_text_survives_every_vocabulary(every_kind, kind, text):
    vocabulary = every_kind[kind]
    ids = vocabulary.encode(text)
    assert vocabulary.decode([*ids, vocabulary.eos_id]) == text
    assert all(0 < i < vocabulary.size - vocabulary.extra_ids for i in ids)
    assert vocabulary.eos_id not in ids


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_survives_every_vocabulary(every_kind, kind):
    vocabulary = every_kind[kind]

    @examples(max_examples=60, deadline=None)
    @given(st.text())
    def survives(text):
        assert vocabulary.decode(vocabulary.encode(text)) == text

    survives()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_trained_vocabulary_has_pieces_for_chinese(model_type):
    words = [
        "床前",
        "明月",
        "月光",
        "疑是",
        "地上",
        "霜",
        "举头",
        "望",
        "低头",
        "思",
        "故乡",
    ]
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(words, 9)) + "。\n" for _ in range(40)]
    roomy = train_sentencepiece(lines, 320, model_type=model_type)
    assert len(roomy.encode(lines[0])) < 0.4 * len(lines[0].encode())
    # A vocabulary too small for the characters of a text gives the rarest no piece.
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 600))) + "\n" + "".join(lines)
    tiny = train_sentencepiece([many], 300, model_type=model_type)
    assert tiny.decode(tiny.encode(many)) == many
    assert len(tiny.encode(lines[0])) < 0.7 * len(lines[0].encode())


def test_pieces_are_fewer_than_bytes(trained):
    text = "".join(texts("validation", 7))
    assert trained.size == 320
    assert len(trained.encode(text)) < 0.6 * len(text.encode())


def test_any_ids_decode(every_kind):
    ids = np.random.default_rng(0).integers(-5, 1000, 2000)
    for vocabulary in every_kind.values():
        assert isinstance(vocabulary.decode(ids), str)
        assert vocabulary.has_padding
        hello = vocabulary.encode("hé")
        end, above = vocabulary.eos_id, vocabulary.size - 1  # an extra id
        assert vocabulary.decode([end, *hello, 0, -3, 10**12, above, end]) == "hé"
    for kind in ("bytes", "file", "huggingface"):
        half = every_kind[kind].encode("\u0104")[:1]  # 0xC4 of 0xC4 0x84
        assert every_kind[kind].decode(half) == "\ufffd"


def test_a_vocabulary_survives_its_files(every_kind, trained):
    for vocabulary in (*every_kind.values(), ByteVocabulary(7), trained):
        kept = to_files(vocabulary)
        again = from_files(kept.get, "the store")
        assert again == vocabulary
        assert again.fingerprint == vocabulary.fingerprint
        assert (again.kind, again.size) == (vocabulary.kind, vocabulary.size)
        assert again.encode("x y\n") == vocabulary.encode("x y\n")
        assert all(isinstance(content, bytes) for content in kept.values())
        for name in set(kept) - {"vocabulary.json"}:
            missing = {n: content for n, content in kept.items() if n != name}
            with pytest.raises(StoreError, match=f"the store lacks {name}"):
                from_files(missing.get, "the store")
    with pytest.raises(StoreError, match=r"holds no readable vocabulary\.json"):
        from_files({}.get, "nowhere")
    future = json.dumps({"kind": "words", "extra_ids": 0}).encode()
    with pytest.raises(StoreError, match=r"holds no readable vocabulary\.json"):
        from_files({"vocabulary.json": future}.get, "nowhere")


def test_a_fingerprint_covers_all_that_decides_ids(every_kind, trained):
    ends = train_tokenizer([ENGLISH], "</s>"), train_tokenizer([CHINESE], "</s>")
    different = [
        *every_kind.values(),
        trained,
        SentencePieceVocabulary(trained.model, 4),
        with_extra(trained),
        ByteVocabulary(),
        HuggingFaceVocabulary(ends[0]),
        HuggingFaceVocabulary(ends[1]),
        HuggingFaceVocabulary(ends[0], extra_ids=1),
        HuggingFaceVocabulary(ends[0], eos_token="<pad>"),
    ]
    assert len({v.fingerprint for v in different}) == len(different)
    # The usual name and the same name given are one vocabulary.
    assert HuggingFaceVocabulary(ends[0], "</s>").fingerprint == (
        HuggingFaceVocabulary(ends[0]).fingerprint
    )


def test_training_is_a_function_of_the_text(trained):
    again = train_sentencepiece(iter(texts("train", 60)), 320)
    assert again.model == trained.model
    assert train_sentencepiece(texts("train", 50), 320).model != trained.model
    twice = [
        train_sentencepiece([CHINESE, ENGLISH], 330, model_type="unigram").model
        for _ in range(2)
    ]
    assert twice[0] == twice[1]


def test_statistics_count_the_sample():
    corpus = [ENGLISH, "月"]  # the rarest character has no piece: three bytes
    vocabulary, fit = train_vocabulary.train_vocabulary(corpus, 300, extra_ids=2)
    assert vocabulary.size == 302
    assert fit.sample_bytes == len("".join(corpus).encode())
    pieces = [i for text in corpus for i in vocabulary.encode(text)]
    assert fit.tokens == len(pieces)
    assert fit.byte_tokens == sum(3 <= i < 259 for i in pieces) >= 3
    assert fit.bytes_per_token == pytest.approx(fit.sample_bytes / len(pieces))
    assert fit.byte_share == pytest.approx(fit.byte_tokens / len(pieces))


def test_a_sample_is_even_and_keeps_the_order():
    corpus = texts("train", 60)
    everything = train_vocabulary._sample(corpus, 10**9)
    assert "".join(everything) == "".join(corpus).replace("\u2581", " ")
    some = train_vocabulary._sample(corpus, 10_000)
    assert 7_000 < sum(len(s.encode()) for s in some) <= 10_000
    places = [everything.index(stretch) for stretch in some]
    assert places == sorted(places)
    assert places[-1] > 0.7 * len(everything)  # not just the beginning


def test_more_pieces_than_the_text_has_are_refused():
    with pytest.raises(StoreError, match="VOCABULARY_PIECES = 5000: SentencePiece"):
        train_sentencepiece(["a few words"], 5000)


def test_what_is_no_vocabulary_is_refused(tmp_path, trained):
    with pytest.raises(StoreError, match="as the path of a SentencePiece model"):
        from_file("byte")
    with pytest.raises(StoreError, match="as the path of a SentencePiece model"):
        from_file(tmp_path)
    (tmp_path / "x.model").write_bytes(b"\x0bnot a model")
    with pytest.raises(StoreError, match=r"x\.model is not a SentencePiece model"):
        from_file(tmp_path / "x.model")
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(StoreError, match=r"x\.json is not a tokenizer\.json"):
        from_file(tmp_path / "x.json")
    files.write(tmp_path / "t.model", trained.model)
    with pytest.raises(StoreError, match=r"EOS_TOKEN = '</s>' would be ignored"):
        from_file(tmp_path / "t.model", eos_token="</s>")


def test_a_tokenizer_needs_an_end_of_document(tmp_path):
    content = train_tokenizer([ENGLISH], "[SEP]")
    files.write(tmp_path / "tokenizer.json", content)
    with pytest.raises(StoreError, match=r"set EOS_TOKEN to one of .* '\[SEP\]'"):
        from_file(tmp_path / "tokenizer.json")
    with pytest.raises(StoreError, match=r"EOS_TOKEN = '\[EOS\]' is no token of"):
        from_file(tmp_path / "tokenizer.json", eos_token="[EOS]")
    named = from_file(tmp_path / "tokenizer.json", eos_token="[SEP]")
    assert named.eos_id == 1
    assert start_id(named, "[SEP]") == named.id_of("[SEP]") == 1
    assert (start_id(named, ""), named.piece_of(1)) == (0, "[SEP]")
    assert named.piece_of(-1) is named.piece_of(named.size) is None


def test_a_start_is_a_piece_by_its_name(trained):
    third = trained.piece_of(3)
    assert start_id(trained, third) == 3
    assert trained.piece_of(trained.size) is None
    for vocabulary in (trained, ByteVocabulary()):
        with pytest.raises(StoreError, match="START_TOKEN = '<none>' is no piece of"):
            start_id(vocabulary, "<none>")


def test_a_piece_as_id_0_is_not_padding():
    model = json.loads(train_tokenizer([ENGLISH]))
    added = [token for token in model["added_tokens"] if token["content"] != "<pad>"]
    model["added_tokens"] = added
    vocabulary = HuggingFaceVocabulary(json.dumps(model).encode())
    assert vocabulary.decode([0]) == "<pad>"
    assert not vocabulary.has_padding


def test_an_end_as_id_0_is_not_padding():
    tokenizer = train_tokenizer([ENGLISH])
    assert HuggingFaceVocabulary(tokenizer).has_padding
    ended = HuggingFaceVocabulary(tokenizer, eos_token="<pad>")
    assert ended.eos_id == 0
    assert not ended.has_padding


def test_an_end_that_is_no_special_token_never_comes_from_text():
    model = json.loads(train_tokenizer([ENGLISH], "</s>"))
    for token in model["added_tokens"]:
        token["special"] = False
    vocabulary = HuggingFaceVocabulary(json.dumps(model).encode())
    assert vocabulary.eos_id == 1
    assert 1 not in vocabulary.encode("a</s>b")
    assert vocabulary.decode([*vocabulary.encode("a</s>b"), 1]) == "a</s>b"


def with_sentinels(number):
    """A tokenizer.json whose last tokens are sentinels, as T5's."""
    model = tokenizers.Tokenizer.from_str(train_tokenizer([ENGLISH]).decode())
    names = [f"<extra_id_{n}>" for n in reversed(range(number))]
    model.add_special_tokens(names)
    return model.to_str().encode(), model.get_vocab_size()


def test_sentinels_at_the_end_of_a_vocabulary_are_its_extra_ids(tmp_path):
    content, size = with_sentinels(4)
    files.write(tmp_path / "tokenizer.json", content)
    found = {n: from_file(tmp_path / "tokenizer.json", extra_ids=n) for n in (0, 3, 4)}
    assert [each.size for each in found.values()] == [size] * 3
    text = "a <extra_id_0> b"
    ids = found[4].encode(text)
    assert max(ids) < size - 4
    sentinels = [size - 1, size - 3]
    assert found[4].decode([*sentinels, *ids, *sentinels]) == text
    assert len({each.fingerprint for each in found.values()}) == 3
    appended = dataclasses.replace(found[4], tokenizer=train_tokenizer([ENGLISH]))
    assert appended.size == size  # 4 more than its own
    with pytest.raises(StoreError, match=r"EXTRA_IDS = 5: .* ends with 4 sentinels"):
        from_file(tmp_path / "tokenizer.json", extra_ids=5)
    kept = to_files(found[4])
    assert from_files(kept.get, "a store").fingerprint == found[4].fingerprint


def test_sentinels_are_counted_from_the_end():
    names = ["a", "\u2581<extra_id_2>", "<extra_id_1>", "\u2581<extra_id_0>"]
    assert extra_outside(2, 4, names.__getitem__) == 0
    assert extra_outside(2, 3, names.__getitem__) == 2  # the last is not the first
    with pytest.raises(StoreError, match=r"EXTRA_IDS = 9: .* ends with 3 sentinels"):
        extra_outside(9, 4, names.__getitem__)
    with pytest.raises(StoreError, match=r"EXTRA_IDS = 9: .* ends with 3 sentinels"):
        extra_outside(9, 3, names[1:].__getitem__)
    assert extra_outside(2, 0, names.__getitem__) == 2
