"""The rows of one split of a Task, each a function of its number, seed and epoch."""

import dataclasses
import functools
import itertools

import numpy as np

from tasks import denoising, masked_tokens, objectives, packing
from tasks.draws import name_key
from tasks.errors import StoreError
from tasks.settings import DENOISING, DataSettings
from tasks.store import Split


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """What the rows of a split hold.

    Text is cut into rows by `data.packing` for "causal_lm". The other objectives on
    text make one piece of each row, cut from the stream as T5 does, documents or not.

    Attributes:
        task: its name.
        part: where its tokens are.
        data: the objective and the lengths.
    """

    task: str
    part: Split = dataclasses.field(repr=False)
    data: DataSettings

    @property
    def features(self) -> tuple[str, ...]:
        """Which stored features are read."""
        if self.data.objective == "seq2seq":
            return ("inputs", "targets")
        return ("targets",)

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
        if self.corruption is None:
            return self.index.padding_fraction
        last = self.num_tokens - (self.num_rows - 1) * self.index.length
        each = [
            (self.num_rows - 1) * sum(denoising.lengths(self.index.length, denoiser))
            + sum(denoising.lengths(last, denoiser))
            for denoiser in self.corruption.denoisers
        ]
        positions = self.num_rows * self.data.tokens_per_row
        return 1.0 - sum(each) / len(each) / positions

    @property
    def truncation(self) -> packing.Truncation:
        """What pairs that are too long lose; text loses nothing."""
        if self.data.objective != "seq2seq":
            return packing.Truncation(0, {"targets": 0})
        return packing.truncation(self._offsets, self.data.task_feature_lengths)

    @functools.cached_property
    def corruption(self) -> denoising.Corruption | None:
        """How rows are corrupted, if they are."""
        if self.data.objective not in DENOISING:
            return None
        words = self.part.vocabulary
        return denoising.corruption(
            self.data, words.size, words.extra_ids, words.eos_id
        )

    @functools.cached_property
    def masking(self) -> masked_tokens.Masking | None:
        """How single tokens are masked, if they are."""
        if self.data.objective != "masked_lm":
            return None
        words = self.part.vocabulary
        return masked_tokens.Masking(
            self.data.noise_density, words.size, words.extra_ids, words.eos_id
        )

    @functools.cached_property
    def index(self) -> packing.Pack | packing.Stream:
        """Which stored tokens share a row.

        Raises:
            StoreError: the one that is kept is of other tokens.
        """
        num_tokens, length = self.part.num_tokens("targets"), self.data.length
        if self.is_empty:  # of rate 0
            return packing.Stream(length, 0)
        if self.corruption is not None:
            return packing.Stream(self.corruption.raw_length, num_tokens)
        if self.data.objective == "prefix_lm":
            return packing.Stream(length, num_tokens)
        if self.data.objective == "seq2seq":
            return self._pairs()
        if self.data.packing == "stream":
            return packing.Stream(length, num_tokens, self._offsets["targets"])
        key = f"next_fit-{length}"
        index = self.part.pack(
            key, lambda: packing.pack(self.part.offsets("targets"), length)
        )
        self._check(key, packing.faults(index, num_tokens))
        return index

    def read(
        self, rows: np.ndarray, epochs: np.ndarray, seed: int
    ) -> dict[str, np.ndarray]:
        """Returns the features of rows.

        Args:
            rows: int64[B], each in [0, num_rows).
            epochs: int64[B]; a row draws anew in each.
            seed: of the draws.
        Returns:
            int32[B, L] under each name in `objectives.features(data)`, each with its L.
        """
        (*inputs, targets), read_BL, _ = self._lay_out(rows, epochs, seed)
        if inputs:
            return objectives.encoder_decoder(inputs[0], targets)
        if read_BL is not None:
            return objectives.encoder(targets, read_BL)
        return objectives.decoder(
            targets, bidirectional=self.data.prefix_attention == "bidirectional"
        )

    def documents(self, rows: np.ndarray, epochs: np.ndarray, seed: int) -> np.ndarray:
        """Returns int64[B, L]: of which document each predicted token is; else -1.

        A sentinel is of the document of the first token that it stands for, and the
        end of corrupted targets of that of the last.
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
    ) -> tuple[tuple[objectives.Rows, ...], np.ndarray | None, np.ndarray]:
        """Rows of each side, the predicted last; what is read; and where it is from.

        What is read in place of the tokens is None if they are read themselves. The
        last says where predicted tokens, in order, are in stored targets.
        """
        if self.data.objective == "seq2seq":
            pairs, sources = self._pairs_of(rows)
            return objectives.sides(pairs, self.data), None, sources
        bounds = [self.index.bounds(int(row)) for row in rows]
        ranges = self.part.read(
            "targets", [b[0] for b in bounds], [b[-1] for b in bounds]
        )
        keys = [
            (seed, self._name_key, int(epoch), int(row))
            for epoch, row in zip(epochs, rows, strict=True)
        ]
        if self.corruption is not None:
            pairs, sources = self._corrupted(bounds, ranges, keys)
            return objectives.sides(pairs, self.data), None, sources
        laid_out, sources = self._lay_out_text(bounds, ranges, keys)
        if self.masking is None:
            return (laid_out,), None, sources
        return self._masked(laid_out, bounds, ranges, keys)

    def _masked(
        self,
        laid_out: objectives.Rows,
        bounds: list[np.ndarray],
        ranges: list[np.ndarray],
        keys: list[tuple[int, int, int, int]],
    ) -> tuple[tuple[objectives.Rows, ...], np.ndarray, np.ndarray]:
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
        self,
        bounds: list[np.ndarray],
        ranges: list[np.ndarray],
        keys: list[tuple[int, int, int, int]],
    ) -> tuple[objectives.Rows, np.ndarray]:
        """Rows of stored tokens as they are; of a prefix LM, the first are given."""
        shape = (len(bounds), self.data.length)
        tokens_BL, begins_BL = np.zeros(shape, np.int32), np.zeros(shape, bool)
        num_given_B = np.zeros(len(bounds), np.int64)
        for row, (bound, tokens) in enumerate(zip(bounds, ranges, strict=True)):
            tokens_BL[row, : len(tokens)] = tokens
            begins_BL[row, bound[:-1] - bound[0]] = True
            if self.data.objective == "prefix_lm":
                num_given_B[row] = denoising.prefix_length(len(tokens), *keys[row])
        num_tokens_B = np.asarray([len(tokens) for tokens in ranges], np.int64)
        given_BL = np.arange(self.data.length) < num_given_B[:, None]
        sources = [
            np.arange(bound[0] + given, bound[-1])
            for bound, given in zip(bounds, num_given_B, strict=True)
        ]
        laid_out = objectives.Rows(tokens_BL, begins_BL, num_tokens_B, given_BL)
        return laid_out, _concatenate(sources)

    def _corrupted(
        self,
        bounds: list[np.ndarray],
        ranges: list[np.ndarray],
        keys: list[tuple[int, int, int, int]],
    ) -> tuple[list[list[tuple[np.ndarray, np.ndarray]]], np.ndarray]:
        """One pair of each row: the corrupted tokens, and those that were masked."""
        assert self.corruption is not None
        corrupted = [
            self.corruption(tokens, *key)
            for tokens, key in zip(ranges, keys, strict=True)
        ]
        sources = [
            bound[0] + row.sources for bound, row in zip(bounds, corrupted, strict=True)
        ]
        pairs = [[(row.inputs, row.targets)] for row in corrupted]
        return pairs, _concatenate(sources)

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
            key, lambda: packing.pack_pairs(self._offsets, lengths, joined=joined)
        )
        documents = self.part.num_documents
        found = packing.faults(index)
        if not found and len(index.pieces) - 1 != documents:
            found = [f"it holds {len(index.pieces) - 1:,} pairs, not {documents:,}"]
        self._check(key, found)
        return index

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


def _concatenate(sources: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *sources])
