"""What to learn from, and in which pieces. Read before jax: standard library only."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The data of a run.

    Attributes:
        mixture_or_task_name: a registered SeqIO Task.
        mixture_or_task_module: the module that registers it; imported only where
            tokens are made.
        task_feature_lengths: tokens per packed row of each feature,
            `{"targets": 256}` for a language model.
        vocabulary: "bytes", "sentencepiece" (trained on the task's own train split
            when the store is prepared), the path of a SentencePiece model, or "task",
            which keeps the tokens of a Task that tokenises with a vocabulary of its
            own. The others are applied to the text of a Task whose preprocessors
            call `seqio.preprocessors.tokenize`.
        vocabulary_size: pieces of a vocabulary that is trained.
        store_dir: where the prepared tokens are.
        train_split: split that is learnt.
        heldout_split: split that is only scored.
        shuffle: visit packed rows in a keyed random order, another one each epoch.
        bad_utf8: what `prepare` does with a document that is not UTF-8: "error"
            refuses it by name, "replace" substitutes U+FFFD and counts it.
    """

    mixture_or_task_name: str
    mixture_or_task_module: str
    task_feature_lengths: Mapping[str, int]
    store_dir: str
    vocabulary: str = "sentencepiece"
    vocabulary_size: int = 2048
    train_split: str = "train"
    heldout_split: str = "validation"
    shuffle: bool = True
    bad_utf8: str = "error"

    @property
    def length(self) -> int:
        """L, tokens per row."""
        return int(self.task_feature_lengths["targets"])


def problems(data: DataSettings) -> list[str]:
    """Lists the rules that the settings break, before any file is looked at."""
    found = []
    lengths = dict(data.task_feature_lengths)
    if set(lengths) != {"targets"} or not all(
        isinstance(n, int) and n >= 2 for n in lengths.values()
    ):
        found.append(
            f"TASK_FEATURE_LENGTHS = {lengths}: a language model has one feature, "
            "'targets', of at least 2 tokens, such as {'targets': 256}"
        )
    if data.vocabulary == "sentencepiece" and data.vocabulary_size < 300:
        found.append(
            f"VOCABULARY_SIZE = {data.vocabulary_size}: a SentencePiece vocabulary "
            "with byte fallback needs at least 300 pieces"
        )
    if data.train_split == data.heldout_split:
        found.append(
            f"HELDOUT_SPLIT = {data.heldout_split!r} is also TRAIN_SPLIT: what is "
            "scored must not be learnt"
        )
    if data.bad_utf8 not in ("error", "replace"):
        found.append(f"BAD_UTF8 = {data.bad_utf8!r}: use 'error' or 'replace'")
    return found
