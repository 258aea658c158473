"""Where the text of a SeqIO Task comes from. Importing this file imports TensorFlow."""

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from tasks.errors import StoreError
from tasks.sources import Document, document_of, encoded

Reader = Callable[[], Iterator[Any]]  # of documents, or of names and texts


@dataclasses.dataclass(frozen=True)
class SourceShard:
    """What one worker reads in one go.

    Attributes:
        name: text that tells the shard from the others of its split.
        read: yields its documents. Of files it can be pickled, and called in a process
            without TensorFlow.
        paths: files that it reads, if it does.
    """

    name: str
    read: Reader
    paths: tuple[str, ...] = ()


class DocumentSource(seqio.DataSource):
    """Documents that Python reads, shard by shard.

    `documents` gives them as they are, and `get_dataset` gives SeqIO the same ones in
    the same order. An example holds the document's "name", "language" and "label"
    beside its texts; what a document lacks is empty there.

    Args:
        splits: for each split, a function that returns its shards. It is called when
            the split is read, not before.
        features: which texts a document has.
    """

    def __init__(
        self,
        splits: Mapping[str, Callable[[], Sequence[SourceShard]]],
        features: Sequence[str] = ("targets",),
    ):
        super().__init__(splits=tuple(splits))
        self.features = tuple(features)
        self._failed: Exception | None = None
        self._holds_failures = False
        self._shards = {split: functools.cache(splits[split]) for split in splits}

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: `list_shards` has all there are."""
        return False

    def list_shards(self, split: str) -> tuple[str, ...]:
        """Returns the names of the shards of a split."""
        return tuple(shard.name for shard in self._shards_of(split))

    def files(self, split: str) -> tuple[str, ...]:
        """Returns the files that a split is read from; none if it comes from code."""
        paths = (path for shard in self._shards_of(split) for path in shard.paths)
        return tuple(dict.fromkeys(paths))

    def documents(self, split: str, shard: int) -> Iterator[Document]:
        """Yields the documents of one shard, in order; their texts are bytes.

        Raises:
            TypeError: what its reader yields is no document, or a text of it is none.
        """
        chosen = self._shards_of(split)[shard]
        for number, given in enumerate(chosen.read()):
            where = f"document {number:,} of shard {chosen.name!r}"
            yield document_of(given, self.features, where)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Returns the documents of every n-th shard; `shuffle` is of shards alone."""
        chosen = list(range(len(self._shards_of(split))))
        if shard_info:
            chosen = chosen[shard_info.index :: shard_info.num_shards]
        if shuffle:
            random.Random(None if seed is None else int(seed)).shuffle(chosen)

        def examples() -> Iterator[dict[str, bytes]]:
            try:
                yield from in_order()
            except Exception as error:  # whatever a reader raises
                if not self._holds_failures:
                    raise
                self._failed = error

        def in_order() -> Iterator[dict[str, bytes]]:
            for shard in chosen:
                for document in self.documents(split, shard):
                    yield {
                        **document.features,
                        "name": encoded(document.name),
                        "language": encoded(document.language),
                        "label": encoded(document.label),
                    }

        keys = (*self.features, "name", "language", "label")
        text = tf.TensorSpec((), tf.string)
        return tf.data.Dataset.from_generator(
            examples, output_signature=dict.fromkeys(keys, text)
        )

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raises here what a reader raises while a dataset of the source is read.

        TensorFlow would write a stack, and raise something else.
        """
        self._holds_failures, self._failed = True, None
        try:
            yield
        finally:
            self._holds_failures = False
        if self._failed is not None:
            raise self._failed

    def _shards_of(self, split: str) -> Sequence[SourceShard]:
        if split not in self._shards:
            names = ", ".join(map(repr, self._shards))
            raise StoreError(f"there is no split {split!r}: there are {names}")
        return self._shards[split]()


class TfdsSource(seqio.TfdsDataSource):
    """A TFDS dataset that is on disk or in a bucket; nothing is downloaded.

    Args:
        dataset: name, config and version, such as "glue/sst2:2.0.0".
        splits: the dataset's split of each split.
        data_dir: where it is; None is TFDS_DATA_DIR, or ~/tensorflow_datasets.
    """

    def __init__(
        self, dataset: str, splits: Mapping[str, str], data_dir: str | None = None
    ):
        super().__init__(dataset, data_dir, dict(splits), read_only=True)
        self._dataset = dataset

    def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
        """Returns the examples of a split.

        Raises:
            StoreError: the dataset is not there; the message says how to get it.
        """
        self._check()
        return super().get_dataset(*args, **kwargs)

    def num_input_examples(self, split: str) -> int | None:
        """Returns how many examples a split has.

        Raises:
            StoreError: the dataset is not there.
        """
        self._check()
        return super().num_input_examples(split)

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the names of the files of a split.

        Raises:
            StoreError: the dataset is not there.
        """
        self._check()
        return super().list_shards(split)

    def _check(self) -> None:
        builder = self.tfds_dataset.builder
        if builder.info.splits:
            return
        name = self._dataset
        raise StoreError(
            f"the TFDS dataset {name!r} is not at {builder.data_path}, and nothing is "
            f"downloaded by itself. Where there is a network, run `tfds build {name} "
            "--data_dir=DIR`, and set the environment variable TFDS_DATA_DIR=DIR to "
            "that folder, a copy of it, or a bucket gs://... that holds it"
        )
