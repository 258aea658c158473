"""The rows of one split of a Task, each a function of its number, seed and epoch."""

import dataclasses
import functools
import itertools

import numpy as np

from tasks import flat, layouts, masked_tokens, packing
from tasks.draws import name_key
from tasks.errors import StoreError
from tasks.objectives import Asked, Maker, Objective
from tasks.settings import DataSettings
from tasks.store import Split
from tasks.vocabularies import start_id


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """What the rows of a split hold.

    Text is cut into rows by `data.packing` where tokens are learnt as they are stored,
    or masked ("causal_lm", "masked_lm"). The other objectives on text make one piece of
    each row, cut from the stream as T5 does, documents or not.

    Attributes:
        task: its name.
        part: where its tokens are.
        data: the objective and the lengths.
    """

    task: str
    part: Split = dataclasses.field(repr=False)
    data: DataSettings

    @property
    def asks(self) -> Objective:
        """The objective."""
        asks = self.data.asks
        assert asks is not None, "what a configuration names is imported by now"
        return asks

    @property
    def features(self) -> tuple[str, ...]:
        """Which stored features are read."""
        return self.asks.reads

    @property
    def stored_tokens(self) -> int:
        """Tokens of all features that are read; the pixels of images are none."""
        return sum(self.part.num_tokens(f) for f in self.features if f != "images")

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn from."""
        return not self.part.num_tokens("targets")

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.index.num_rows

    @property
    def num_tokens(self) -> int:
        """Stored tokens that an epoch reads; pairs that are too long lose some."""
        return self.index.num_tokens

    @property
    def padding_fraction(self) -> float:
        """The part of all row positions that holds no token, on average."""
        if self.maker is None or self.maker.num_positions is None:
            return self.index.padding_fraction
        last = self.num_tokens - (self.num_rows - 1) * self.index.length
        made = (self.num_rows - 1) * self.maker.num_positions(self.index.length)
        made += self.maker.num_positions(last)
        return 1.0 - made / (self.num_rows * self.data.tokens_per_row)

    @property
    def truncation(self) -> packing.Truncation:
        """What pairs that are too long lose; text loses nothing."""
        if self.data.image_size:
            return packing.truncation(self._offsets, {"targets": self._text_length})
        if "inputs" not in self.features:
            return packing.Truncation(0, {"targets": 0})
        return packing.truncation(self._offsets, self.data.task_feature_lengths)

    @functools.cached_property
    def maker(self) -> Maker | None:
        """What makes pairs of text, if pairs are made of it.

        Raises:
            StoreError: the settings or the vocabulary do not allow for it.
        """
        try:
            return self.asks.make(self.data, self.part.vocabulary)
        except ValueError as error:
            raise StoreError(str(error)) from error

    @functools.cached_property
    def masking(self) -> masked_tokens.Masking | None:
        """How tokens, words or entities are masked, if they are.

        Raises:
            StoreError: the list of entities does not suit.
        """
        try:
            return masked_tokens.masking(self.data, self.part.vocabulary)
        except ValueError as error:
            raise StoreError(str(error)) from error

    @functools.cached_property
    def start_id(self) -> int:
        """What a decoder reads before a text.

        Raises:
            StoreError: the vocabulary has no such START_TOKEN.
        """
        return start_id(self.part.vocabulary, self.data.start_token)

    @functools.cached_property
    def index(self) -> packing.Pack | packing.Stream | packing.Captions:
        """Which stored tokens share a row.

        Raises:
            StoreError: the one that is kept is of other tokens.
        """
        num_tokens, length = self.part.num_tokens("targets"), self.data.length
        if self.is_empty:  # of rate 0
            return packing.Stream(length, 0)
        if self.maker is not None:
            return packing.Stream(self.maker.row_tokens, num_tokens)
        if self.data.image_size:
            self._check_images()
            text, given = self._text_length, self.data.num_patches
            return packing.Captions(text, given, self._offsets["targets"])
        if "inputs" in self.features:
            return self._pairs()
        if self.data.packing == "stream":
            return packing.Stream(length, num_tokens, self._offsets["targets"])
        key = f"next_fit-{length}"
        index = self.part.pack(
            key,
            lambda: packing.pack(self.part.offsets("targets"), length, flat.room),
        )
        self._check(key, packing.faults(index, num_tokens))
        return _released(index)

    def read(
        self, rows: np.ndarray, epochs: np.ndarray, seed: int
    ) -> dict[str, np.ndarray]:
        """Returns the features of rows.

        Args:
            rows: int64[B], each in [0, num_rows).
            epochs: int64[B]; a row draws anew in each.
            seed: seed for the draws of all rows.
        Returns:
            int32[B, L] under each name in `layouts.features(data)`, each with its L;
            images are uint8.
        """
        (*inputs, targets), read_BL, _ = self._lay_out(rows, epochs, seed)
        if self.data.image_size:
            return layouts.captions(
                targets,
                self._images(rows),
                self.data.num_patches,
                bidirectional=self.data.prefix_attention == "bidirectional",
            )
        if read_BL is not None:
            return layouts.encoder(targets, read_BL)
        if inputs:
            found = layouts.encoder_decoder(inputs[0], targets)
        else:
            bidirectional = self.data.prefix_attention == "bidirectional"
            found = layouts.decoder(targets, bidirectional=bidirectional)
        return layouts.started(found, self.start_id)

    def documents(self, rows: np.ndarray, epochs: np.ndarray, seed: int) -> np.ndarray:
        """Returns int64[B, L]: of which document each predicted token is; else -1.

        What is no stored token is of the document of its source (`Asked`).
        """
        (*_, targets), _, sources = self._lay_out(rows, epochs, seed)
        place_L = np.arange(self.data.length)
        predicted_BL = place_L < targets.num_tokens_B[:, None]
        predicted_BL &= ~targets.given_BL
        ends = self._offsets["targets"][1:]
        document_BL = np.full(predicted_BL.shape, -1, np.int64)
        document_BL[predicted_BL] = np.searchsorted(ends, sources, side="right")
        return document_BL

    def _lay_out(
        self, rows: np.ndarray, epochs: np.ndarray, seed: int
    ) -> tuple[tuple[layouts.Rows, ...], np.ndarray | None, np.ndarray]:
        """Rows of each side, the predicted last; what is read; and where it is from.

        What is read in place of the tokens is None if they are read themselves. The
        last says where predicted tokens, in order, are in stored targets.
        """
        if "inputs" in self.features:
            pairs, sources = self._pairs_of(rows)
            return layouts.sides(pairs, self.data), None, sources
        bounds = [self.index.bounds(int(row)) for row in rows]
        ranges = self.part.read(
            "targets", [b[0] for b in bounds], [b[-1] for b in bounds]
        )
        keys = [
            (seed, self._name_key, int(epoch), int(row))
            for epoch, row in zip(epochs, rows, strict=True)
        ]
        if self.maker is not None:
            pairs, sources = self._made(self.maker, bounds, ranges, keys)
            return layouts.sides(pairs, self.data), None, sources
        if self.data.image_size:
            given = np.zeros(self.data.num_patches, np.int64)
            sources = _concatenate([np.arange(*bound) for bound in bounds])
            captioned = [[(given, tokens)] for tokens in ranges]
            return layouts.sides(captioned, self.data), None, sources
        laid_out, sources = self._lay_out_text(bounds, ranges)
        if self.masking is None:
            return (laid_out,), None, sources
        return self._masked(laid_out, bounds, ranges, keys)

    @property
    def _text_length(self) -> int:
        """Tokens of a row that are left behind its patches."""
        return self.data.length - self.data.num_patches

    def _images(self, rows: np.ndarray) -> np.ndarray:
        """Returns uint8[B, N]: the image of each document."""
        size = self.data.image_values
        found = self.part.read("images", rows * size, (rows + 1) * size)
        return np.asarray(found, np.uint8).reshape(len(rows), size)

    def _check_images(self) -> None:
        """Refuses images of another size than the settings say."""
        offsets, size = self._offsets["images"], self.data.image_values
        wrong = np.flatnonzero(np.diff(offsets) != size)
        if len(wrong):
            first = int(wrong[0])
            raise StoreError(
                f"image {first:,} of {self.task!r} has "
                f"{offsets[first + 1] - offsets[first]:,} numbers, and IMAGE_SIZE = "
                f"{self.data.image_size} with IMAGE_CHANNELS = "
                f"{self.data.image_channels} wants {size:,}: set them to what the Task "
                "yields, or give its images that size"
            )

    def _masked(
        self,
        laid_out: layouts.Rows,
        bounds: list[np.ndarray],
        ranges: list[np.ndarray],
        keys: list[tuple[int, int, int, int]],
    ) -> tuple[tuple[layouts.Rows, ...], np.ndarray, np.ndarray]:
        """Rows of which some tokens are predicted, and what is read in their place."""
        assert self.masking is not None
        read_BL, given_BL = laid_out.tokens_BL.copy(), laid_out.given_BL.copy()
        sources = []
        for row, (bound, tokens) in enumerate(zip(bounds, ranges, strict=True)):
            read, chosen = self.masking(tokens, *keys[row])
            read_BL[row, : len(tokens)] = read
            given_BL[row, : len(tokens)] = ~chosen
            sources.append(bound[0] + np.flatnonzero(chosen))
        predicted = dataclasses.replace(laid_out, given_BL=given_BL)
        return (predicted,), read_BL, _concatenate(sources)

    def _lay_out_text(
        self, bounds: list[np.ndarray], ranges: list[np.ndarray]
    ) -> tuple[layouts.Rows, np.ndarray]:
        """Rows of stored tokens as they are, all of them predicted."""
        pieces = [
            [tokens[i:j] for i, j in itertools.pairwise((bound - bound[0]).tolist())]
            for bound, tokens in zip(bounds, ranges, strict=True)
        ]
        sources = [np.arange(bound[0], bound[-1]) for bound in bounds]
        return layouts.rows_of(pieces, self.data.length), _concatenate(sources)

    def _made(
        self,
        maker: Maker,
        bounds: list[np.ndarray],
        ranges: list[np.ndarray],
        keys: list[tuple[int, int, int, int]],
    ) -> tuple[list[list[tuple[np.ndarray, np.ndarray]]], np.ndarray]:
        """One pair of each row, made of its tokens."""
        made = list(map(maker.ask, ranges, keys))
        if self.data.own is not None:
            for asked, tokens in zip(made, ranges, strict=True):
                self._check_own(asked, len(tokens))
        sources = [
            bound[0] + row.sources for bound, row in zip(bounds, made, strict=True)
        ]
        return [[(row.inputs, row.targets)] for row in made], _concatenate(sources)

    def _check_own(self, asked: Asked, num_tokens: int) -> None:
        """Refuses what an objective of somebody's own may not make."""
        size = self.part.vocabulary.size
        if broken := layouts.broken_rule(asked, num_tokens, self.data, size):
            raise StoreError(
                f"OBJECTIVE = {self.data.objective!r}, of {num_tokens} tokens of "
                f"{self.task!r}: {broken}"
            )

    def _pairs_of(
        self, rows: np.ndarray
    ) -> tuple[list[list[tuple[np.ndarray, np.ndarray]]], np.ndarray]:
        """Stored inputs of each row, each with the targets that belong to it."""
        assert isinstance(self.index, packing.Pack)
        first, last = self.index.rows[rows], self.index.rows[rows + 1]
        inputs = self._trimmed("inputs", first, last)
        targets = self._trimmed("targets", first, last)
        starts = self._offsets["targets"]
        sources = [
            starts[document] + np.arange(len(tokens))
            for a, row in zip(first, targets, strict=True)
            for document, tokens in enumerate(row, a)
        ]
        pairs = [
            list(zip(*row, strict=True)) for row in zip(inputs, targets, strict=True)
        ]
        return pairs, _concatenate(sources)

    def _trimmed(
        self, feature: str, first: np.ndarray, last: np.ndarray
    ) -> list[list[np.ndarray]]:
        """Documents [first, last) of each row, as much as fits of each."""
        offsets, length = self._offsets[feature], self.data.task_feature_lengths
        ranges = self.part.read(feature, offsets[first], offsets[last])
        rows = []
        for tokens, a, b in zip(ranges, first, last, strict=True):
            bounds = (offsets[a : b + 1] - offsets[a]).tolist()
            documents = (tokens[i:j] for i, j in itertools.pairwise(bounds))
            rows.append([document[: length[feature]] for document in documents])
        return rows

    def _pairs(self) -> packing.Pack:
        """The pack index of pairs."""
        lengths, joined = self.data.task_feature_lengths, self.data.layout == "decoder"
        key = f"pairs-{lengths['inputs']}-{lengths['targets']}"
        key += "" if joined else "-apart"
        index = self.part.pack(
            key,
            lambda: packing.pack_pairs(
                self._offsets, lengths, joined=joined, room=flat.room
            ),
        )
        documents = self.part.num_documents
        found = packing.faults(index)
        if not found and len(index.pieces) - 1 != documents:
            found = [f"it holds {len(index.pieces) - 1:,} pairs, not {documents:,}"]
        self._check(key, found)
        return _released(index)

    def _check(self, key: str, found: list[str]) -> None:
        if found:
            raise StoreError(
                f"the pack index {key!r} of {self.task!r} does not fit its split: "
                f"{'; '.join(found)}. Delete it: it will be computed again."
            )

    @functools.cached_property
    def _offsets(self) -> dict[str, np.ndarray]:
        return {name: self.part.offsets(name) for name in self.features}

    @functools.cached_property
    def _name_key(self) -> int:
        return name_key(self.task)


def _released(index: packing.Pack) -> packing.Pack:
    """The index after a pass over all of it: rows that are read need little of it."""
    flat.released(index.pieces)
    flat.released(index.rows)
    return index


def _concatenate(sources: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *sources])
