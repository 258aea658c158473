"""The documents of one shard of a Task: read, checked to be UTF-8, not yet tokenised.

A Task over documents of our own sources that does nothing but tokenise is not run by
SeqIO at all: its source gives the text, without TensorFlow's cost per example. Any
other Task is run with SeqIO's byte vocabulary, from whose ids the text comes back
exactly; with VOCABULARY = "task" its own tokens are kept.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tasks import seqio_tasks
from tasks.errors import StoreError
from tasks.settings import DataSettings


@dataclasses.dataclass(frozen=True)
class Document:
    """A document of a Task.

    Attributes:
        number: in its shard, those that are left out counted too.
        name: what it is called where faults are reported.
        text: content of each feature; empty if the Task's own tokens are kept.
        ids: the Task's own tokens of each feature, an end among them if the Task adds
            one; else empty.
        language: that it says it is of; "" if it says none.
        fault: "" or what was wrong with its UTF-8: "replaced" or "bad_utf8".
        image: pixels of the image that its text belongs to, a byte each; else empty.
    """

    number: int
    name: str
    text: Mapping[str, str]
    ids: Mapping[str, np.ndarray]
    language: str = ""
    fault: str = ""
    image: bytes = b""


def read(
    task: Any, split: str, shard: int, data: DataSettings, *, skip: int = 0
) -> Iterator[Document]:
    """Yields the documents of a shard in stored order.

    Args:
        task: the SeqIO Task.
        split: name of a split of its source.
        shard: which of the split's shards.
        data: says what becomes of text that is not UTF-8, and whose tokens are kept.
        skip: documents at the beginning that are passed over.
    Raises:
        StoreError: the source cannot be read, or a document is not UTF-8 and BAD_UTF8
            is "error".
    """
    where = f"split {split!r} of task {task.name!r}"
    if data.vocabulary == "task":
        yield from _tokenised(task, split, shard, data, skip)
        return
    for number, raw in enumerate(_raw(task, split, shard, skip), start=skip):
        name, language, contents = raw
        said = f"document {name} in {where}"
        image = contents.pop("images", b"")
        if "images" in seqio_tasks.features(task):
            _check_image(image, data, said)
        texts, fault = _decoded(contents, data.bad_utf8, said)
        yield Document(number, name, texts, {}, language, fault, image)


def _check_image(image: bytes, data: DataSettings, where: str) -> None:
    """Refuses an image of another size than the settings say.

    Without IMAGE_SIZE any size is kept, but none at all is no image.
    """
    wanted = data.image_values
    if len(image) == wanted or (image and not wanted):
        return
    raise StoreError(
        f"{where} has an image of {len(image):,} bytes, and IMAGE_SIZE = "
        f"{data.image_size} with IMAGE_CHANNELS = {data.image_channels} wants "
        f"{wanted or 'some'}: set them to what the Task yields, or give its images "
        "that size"
    )


def _decoded(
    contents: Mapping[str, bytes], bad_utf8: str, where: str
) -> tuple[dict[str, str], str]:
    """The texts of a document, and its fault.

    Raises:
        StoreError: a text is not UTF-8 and `bad_utf8` is "error".
    """
    texts, fault = {}, ""
    for feature, content in contents.items():
        try:
            texts[feature] = content.decode()
        except UnicodeDecodeError as error:
            if bad_utf8 == "error":
                raise StoreError(
                    f"{where} is not UTF-8 at byte {error.start:,} "
                    f"(0x{content[error.start]:02x}): repair it, or set BAD_UTF8 = "
                    "'replace' to substitute U+FFFD, or 'drop' to leave such documents "
                    "out; both count them"
                ) from None
            fault = "replaced" if bad_utf8 == "replace" else "bad_utf8"
            texts[feature] = content.decode(errors="replace")
    return texts, fault


def is_plain(task: Any) -> bool:
    """Whether the text of a Task's source is the text of the Task."""
    seqio = seqio_tasks.import_seqio()
    return hasattr(task.source, "documents") and all(
        step is seqio.preprocessors.tokenize for step in _functions(task)
    )


def _functions(task: Any) -> Iterator[Any]:
    """The preprocessors of a Task; those that are bound to arguments as they are."""
    for step in task.preprocessors:
        bound = isinstance(step, functools.partial) and not (step.args or step.keywords)
        yield step.func if bound else step


def _raw(
    task: Any, split: str, shard: int, skip: int
) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Yields name, language and the bytes of each feature."""
    if is_plain(task):
        wanted = seqio_tasks.features(task)
        found = task.source.documents(split, shard)
        with seqio_tasks.explained(f"task {task.name!r} in split {split!r}"):
            for document in itertools.islice(found, skip, None):
                contents = {feature: document.features[feature] for feature in wanted}
                yield repr(document.name), document.language, contents
        return
    for number, example in enumerate(_examples(task, split, shard, skip), start=skip):
        name = _name(example, number, shard)
        where = f"document {name} in split {split!r} of task {task.name!r}"
        contents = {
            feature: seqio_tasks.as_bytes(example[feature], where)
            for feature in seqio_tasks.features(task)
        }
        yield name, _text(example.get("language")), contents


def _examples(
    task: Any, split: str, shard: int, skip: int
) -> Iterator[dict[str, np.ndarray]]:
    seqio = seqio_tasks.import_seqio()
    reading = seqio_tasks.reading_bytes(seqio, task)
    num_shards = len(seqio_tasks.shards(task, split))
    return seqio_tasks.examples(seqio, reading, split, shard, num_shards, skip)


def _tokenised(
    task: Any, split: str, shard: int, data: DataSettings, skip: int
) -> Iterator[Document]:
    """Yields the documents of a Task that keeps its own tokens."""
    seqio = seqio_tasks.import_seqio()
    num_shards = len(seqio_tasks.shards(task, split))
    features = seqio_tasks.features(task)
    found = seqio_tasks.examples(seqio, task, split, shard, num_shards, skip)
    for number, example in enumerate(found, start=skip):
        name = _name(example, number, shard)
        where = f"document {name} in split {split!r} of task {task.name!r}"
        ids = {feature: example[feature] for feature in features}
        for of_feature in ids.values():
            seqio_tasks.refuse_what_is_no_row(of_feature, where)
        contents = {}
        for feature in features:
            # The text that SeqIO's own tokenising kept beside its tokens.
            text = example.get(f"{feature}_pretokenized")
            if isinstance(text, bytes):
                contents[feature] = text
        _, fault = _decoded(contents, data.bad_utf8, where)
        yield Document(number, name, {}, ids, _text(example.get("language")), fault)


def _name(example: Mapping[str, Any], number: int, shard: int) -> str:
    name = _text(example.get("name"))
    return repr(name) if name else f"{number:,} of shard {shard:,}"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else ""
