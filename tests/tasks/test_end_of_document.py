"""Which token of a tokenizer.json ends a document, and who says so."""

import json
import re

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from tasks import end_of_document, files, vocabularies
from tasks.errors import StoreError
from tasks.vocabularies import from_file

pytestmark = pytest.mark.fast


def tokenizer(folder, *, special, plain=(), processor=None):
    """Writes a tokenizer.json of these tokens, numbered in their order."""
    names = [*special, *plain, "word"]
    model = models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="word")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(list(special))
    if processor:
        made.post_processor = processor
    files.write(folder / "tokenizer.json", made.to_str().encode())
    return folder / "tokenizer.json"


def said(folder, name, **fields):
    (folder / name).write_text(json.dumps(fields))


GEMMA = {"special": ("<pad>", "<eos>", "<bos>"), "plain": ("</s>",)}
CHAT = {"special": ("<pad>", "<|endoftext|>", "<|im_end|>")}


def test_an_ordinary_token_is_not_taken_for_the_end(tmp_path):
    assert from_file(tokenizer(tmp_path, **GEMMA)).end == "<eos>"
    path = tokenizer(tmp_path, special=("<pad>", "<unk>"), plain=("</s>",))
    with pytest.raises(
        StoreError,
        match=re.escape("one of its special tokens, '<pad>', '<unk>', or to '</s>', "),
    ):
        from_file(path)
    assert from_file(path, eos_token="</s>").eos_id == 2
    # A tokenizer without special tokens leaves nothing else to go by.
    assert from_file(tokenizer(tmp_path, special=(), plain=("</s>",))).end == "</s>"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}}),
        ("special_tokens_map.json", {"eos_token": "<|im_end|>"}),
        ("special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}}),
        ("generation_config.json", {"eos_token_id": 2}),
        ("generation_config.json", {"eos_token_id": [2]}),
        ("config.json", {"eos_token_id": 2}),
    ],
)
def test_a_file_beside_it_decides(tmp_path, name, fields):
    path = tokenizer(tmp_path, **CHAT)
    with pytest.raises(
        StoreError, match=r"EOS_TOKEN to one of them, '<\|endoftext\|>', '<\|im_end"
    ):
        from_file(path)
    said(tmp_path, name, **fields)
    assert from_file(path).end == "<|im_end|>"
    assert from_file(path, eos_token="<|endoftext|>").end == "<|endoftext|>"
    # Nobody has to ask the files again of what is kept.
    kept = vocabularies.to_files(from_file(path))
    assert vocabularies.from_files(kept.get, "the store").end == "<|im_end|>"


@pytest.mark.parametrize(
    "processor",
    [
        processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 1)]),
        processors.BertProcessing(("[SEP]", 1), ("<pad>", 0)),
        processors.RobertaProcessing(("[SEP]", 1), ("<pad>", 0)),
        processors.Sequence(
            [
                processors.ByteLevel(),
                processors.TemplateProcessing(
                    single="<pad> $A [SEP]",
                    special_tokens=[("[SEP]", 1), ("<pad>", 0)],
                ),
            ]
        ),
    ],
)
def test_a_post_processor_that_ends_texts_decides(tmp_path, processor):
    special = ("<pad>", "[SEP]", "</s>")
    path = tokenizer(tmp_path, special=special, processor=processor)
    assert from_file(path).end == "[SEP]"
    said(tmp_path, "tokenizer_config.json", eos_token="</s>")
    assert from_file(path).end == "</s>"


def test_a_post_processor_that_only_begins_texts_says_nothing(tmp_path):
    begins = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    assert from_file(tokenizer(tmp_path, **GEMMA, processor=begins)).end == "<eos>"


def test_what_does_not_decide_is_refused(tmp_path):
    path = tokenizer(tmp_path, **CHAT)
    said(tmp_path, "generation_config.json", eos_token_id=[1, 2])
    with pytest.raises(
        StoreError, match=r"generation_config\.json names several ends of a document: "
    ):
        from_file(path)
    said(tmp_path, "tokenizer_config.json", eos_token="<gone>")
    with pytest.raises(
        StoreError, match=r"tokenizer_config\.json says that '<gone>' ends .* EOS_TOKEN"
    ):
        from_file(path)


def test_files_of_something_else_say_nothing(tmp_path):
    path = tokenizer(tmp_path, **GEMMA)
    (tmp_path / "config.json").write_text("no json")
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    said(tmp_path, "special_tokens_map.json", eos_token=None)
    said(tmp_path, "generation_config.json", eos_token_id=99)
    assert from_file(path).end == "<eos>"


def test_stores_that_name_no_end_keep_the_one_they_had(tmp_path):
    content = tokenizer(tmp_path, **CHAT).read_bytes()
    kept = {
        "vocabulary.json": b'{"kind": "huggingface", "extra_ids": 0, "eos_token": ""}',
        "tokenizer.json": content,
    }
    assert end_of_document.first_usual(content) == "<|endoftext|>"
    assert vocabularies.from_files(kept.get, "the store").end == "<|endoftext|>"
