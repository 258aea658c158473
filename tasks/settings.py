"""What to learn from, and in which pieces. Read before jax: standard library only."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from tasks.objectives import OBJECTIVES, Objective


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The data of a run.

    Attributes:
        mixture_or_task_name: a registered SeqIO Task or Mixture.
        mixture_or_task_module: the module that registers it; imported only where
            tokens are made or scored.
        task_feature_lengths: tokens of each feature in one row: `{"targets": 256}`
            for text, `{"inputs": 512, "targets": 114}` where inputs are given.
        store_dir: where the prepared tokens are: a folder, `gs://` or `s3://`.
        objective: what a row asks the model to predict; or "module:name" of an
            `Objective` of your own.
        objective_options: further arguments of the maker of one of your own.
        own: what that name stands for, once it is imported.
        layout: whose features a batch has: a "decoder"'s, in whose rows targets follow
            their inputs; an "encoder_decoder"'s, with a row for each; an "encoder"'s.
        packing: how objectives that learn stored tokens, or mask them, cut text into
            rows. "next_fit" keeps a document's pieces whole; "stream" cuts the stored
            stream every L tokens.
        prefix_attention: whether the tokens that are given, and not predicted, see
            one another whole ("bidirectional") or only those before them ("causal").
        noise_density: fraction of tokens that "span_corruption", "masked_lm" and
            "masked_entities" mask.
        mean_noise_span_length: mean length of spans, in tokens ("span_corruption").
        entities: path of the list of what "masked_entities" masks as one, beside words;
            "" is words alone.
        image_size: height and width of the image before each text, in pixels; 0: none.
        patch_size: the same of a patch, which takes the place of a token.
        image_channels: numbers of a pixel.
        vocabulary: "bytes", "sentencepiece" (trained on the train split when the
            store is prepared), the path of a SentencePiece model or of a Hugging Face
            `tokenizer.json`, or "task", which keeps the tokens of a Task that
            tokenises with a vocabulary of its own.
        vocabulary_size: pieces of a vocabulary that is trained.
        vocabulary_model: kind of pieces of a vocabulary that is trained.
        extra_ids: ids after the vocabulary's own: sentinels of the denoising
            objectives, from the top down.
        mask_token: the piece of a `tokenizer.json` that stands for a masked token; ""
            takes the last of the extra ids.
        eos_token: the piece of a `tokenizer.json` that ends a document; "" asks the
            files beside it, its post-processor, and then which of its special tokens
            has a usual name.
        start_token: the piece of a tokenizer's file that a decoder reads before the
            first token of a text; "" reads id 0.
        train_split: split that is learnt.
        heldout_split: split that is only scored.
        shuffle: visit rows in a keyed random order, another one each epoch.
        bad_utf8: what `prepare` does with a document that is not UTF-8: "error"
            refuses it by name, "replace" substitutes U+FFFD and counts it, "drop"
            leaves it out and counts it.
        read_retries: how often a failed read of the store is tried again.
    """

    mixture_or_task_name: str
    mixture_or_task_module: str
    task_feature_lengths: Mapping[str, int]
    store_dir: str
    objective: (
        Literal[
            "causal_lm",
            "prefix_lm",
            "span_corruption",
            "ul2",
            "seq2seq",
            "captions",
            "masked_lm",
            "masked_entities",
        ]
        | str
    ) = "causal_lm"
    objective_options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    own: Objective | None = dataclasses.field(default=None, metadata={"knob": False})
    layout: Literal["decoder", "encoder_decoder", "encoder"] = "decoder"
    packing: Literal["next_fit", "stream"] = "next_fit"
    prefix_attention: Literal["causal", "bidirectional"] = "causal"
    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    entities: str = ""
    image_size: int = 0
    patch_size: int = 16
    image_channels: int = 3
    vocabulary: str = "sentencepiece"
    vocabulary_size: int = 2048
    vocabulary_model: Literal["bpe", "unigram"] = "bpe"
    extra_ids: int = 0
    mask_token: str = ""
    eos_token: str = ""
    start_token: str = ""
    train_split: str = "train"
    heldout_split: str = "validation"
    shuffle: bool = True
    bad_utf8: Literal["error", "replace", "drop"] = "error"
    read_retries: int = 5

    @property
    def asks(self) -> Objective | None:
        """The objective; None where it is your own, and not imported yet."""
        return OBJECTIVES.get(self.objective, self.own)

    @property
    def length(self) -> int:
        """L, tokens of a row that is scored: a decoder alone has inputs in it too."""
        if self.layout == "encoder_decoder":
            return int(self.task_feature_lengths.get("targets", 0))
        return self.tokens_per_row

    @property
    def encoder_length(self) -> int:
        """Tokens of a row of the encoder beside a decoder; 0 without."""
        return self.tokens_per_row - self.length

    @property
    def num_patches(self) -> int:
        """P, patches before the text of a row."""
        return (self.image_size // max(self.patch_size, 1)) ** 2

    @property
    def image_values(self) -> int:
        """N, numbers of an image."""
        return self.image_size**2 * self.image_channels

    @property
    def tokens_per_row(self) -> int:
        """Tokens of a row on both sides."""
        return sum(map(int, self.task_feature_lengths.values()))


@dataclasses.dataclass(frozen=True)
class MixtureSettings:
    """How much of each Task of a Mixture a run learns from.

    Rates are shares of rows, and so of tokens. They need not add up to 1.

    Attributes:
        weighting: "rates" takes `rates`, or those of the SeqIO Mixture;
            "proportional" takes each Task's number of tokens.
        rates: share of each Task by its name; empty: those of the Mixture.
        temperature: rates are raised to 1 / temperature ("proportional").
        cap_tokens: no Task counts as larger than this ("proportional"); 0: no cap.
        schedule: rates at some steps, `{0: {"a": 1, "b": 0}, 1000: {"a": 1, "b": 1}}`,
            linear in between, constant before and after; replaces all of the above.
    """

    weighting: Literal["rates", "proportional"] = "rates"
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    temperature: float = 1.0
    cap_tokens: int = 0
    schedule: Mapping[int, Mapping[str, float]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True)
class FilterSettings:
    """Which documents of the train split `prepare` leaves out.

    Attributes:
        duplicates: "exact" leaves out all but the first of equal documents, "near"
            also those that resemble an earlier one.
        near_similarity: Jaccard similarity of two documents' shingles from which on
            they are near duplicates.
        quality_task: a registered Task whose train split is text of good quality; a
            classifier of good against raw text then decides what is kept. "" keeps
            all.
        quality_pareto: shape of the Pareto draw that keeps a document: a larger one
            keeps fewer bad documents (9 in GPT-3, arXiv:2005.14165, appendix A).
        quality_sample: documents of each side that the classifier learns from.
    """

    duplicates: Literal["keep", "exact", "near"] = "keep"
    near_similarity: float = 0.8
    quality_task: str = ""
    quality_pareto: float = 9.0
    quality_sample: int = 20_000


def problems(
    data: DataSettings,
    mixture: MixtureSettings | None = None,
    filters: FilterSettings | None = None,
) -> list[str]:
    """Lists the rules that the settings break, before any file is looked at."""
    return [
        *_length_problems(data),
        *_layout_problems(data),
        *_vocabulary_problems(data),
        *_split_problems(data),
        *_mixture_problems(mixture or MixtureSettings()),
        *_filter_problems(filters or FilterSettings(), data),
    ]


_PACKED = tuple(name for name, asks in OBJECTIVES.items() if asks.packs)


def _listed(names: Sequence[str]) -> str:
    """Names in quotes, with an "and" before the last."""
    *first, last = map(repr, names)
    return f"{', '.join(first)} and {last}" if first else last


def _length_problems(data: DataSettings) -> list[str]:
    """Which features an objective needs, and how long."""
    lengths, asks = dict(data.task_feature_lengths), data.asks
    wanted = set(lengths) if asks is None else set(asks.lengths)
    found = []
    if set(lengths) != wanted or not all(
        isinstance(n, int) and n >= 2 for n in lengths.values()
    ):
        example = "{'targets': 256}"
        if "inputs" in wanted:
            example = "{'inputs': 512, 'targets': 114}"
        found.append(
            f"TASK_FEATURE_LENGTHS = {lengths}: OBJECTIVE = {data.objective!r} has "
            f"{' and '.join(map(repr, sorted(wanted)))}, each of at least 2 tokens, "
            f"such as {example}"
        )
    if data.packing == "stream" and not (asks and asks.packs):
        found.append(
            f"PACKING = 'stream' is for OBJECTIVE = {_listed(_PACKED)}, and "
            f"would be ignored with {data.objective!r}: set it to 'next_fit'"
        )
    found += _noise_problems(data)
    if (data.objective == "captions") != (data.image_size > 0):
        found.append(
            f"IMAGE_SIZE = {data.image_size} and OBJECTIVE = {data.objective!r}: "
            "'captions' are learnt after images, and no other objective has them; set "
            "both, or IMAGE_SIZE to 0 and another OBJECTIVE"
        )
    if data.objective == "causal_lm" and data.prefix_attention != "causal":
        found.append(
            "PREFIX_ATTENTION = 'bidirectional' has no prefix to act on with "
            "OBJECTIVE = 'causal_lm': set it to 'causal'"
        )
    if data.objective_options and data.objective in OBJECTIVES:
        found.append(
            f"OBJECTIVE_OPTIONS = {data.objective_options} means nothing to OBJECTIVE "
            f"= {data.objective!r}, only to one of your own: set it to {{}}"
        )
    return found


def _layout_problems(data: DataSettings) -> list[str]:
    """Which objectives suit which shape of model."""
    found = []
    if data.asks is not None and data.layout not in data.asks.layouts:
        suits = [name for name, o in OBJECTIVES.items() if data.layout in o.layouts]
        found.append(
            f"OBJECTIVE = {data.objective!r} is not for ARCHITECTURE = "
            f"{data.layout!r}, which can have {', '.join(map(repr, suits))}"
        )
    if data.layout != "decoder" and data.prefix_attention != "causal":
        found.append(
            "PREFIX_ATTENTION = 'bidirectional' means nothing to ARCHITECTURE = "
            f"{data.layout!r}, whose encoder sees all: set it to 'causal'"
        )
    return found


def _noise_problems(data: DataSettings) -> list[str]:
    """What is masked, where anything is."""
    density, length = data.noise_density, data.mean_noise_span_length
    found = []
    if not 0 < density < 1:
        found.append(f"NOISE_DENSITY = {density}: must be in (0, 1)")
    if length < 1:
        found.append(f"MEAN_NOISE_SPAN_LENGTH = {length}: must be at least 1")
    if data.mask_token and data.vocabulary in ("bytes", "sentencepiece", "task"):
        found.append(
            f"MASK_TOKEN = {data.mask_token!r} is no piece of VOCABULARY = "
            f"{data.vocabulary!r}, only of a tokenizer.json: set it to ''"
        )
    default = {field.name: field.default for field in dataclasses.fields(data)}
    for macro, field, value, owners in (
        (
            *("NOISE_DENSITY", "noise_density", density),
            ("span_corruption", "masked_lm", "masked_entities"),
        ),
        (
            *("MEAN_NOISE_SPAN_LENGTH", "mean_noise_span_length", length),
            ("span_corruption",),
        ),
        ("ENTITIES", "entities", data.entities, ("masked_entities",)),
        (
            *("MASK_TOKEN", "mask_token", data.mask_token),
            ("masked_lm", "masked_entities"),
        ),
    ):
        if data.objective not in owners and value != default[field]:
            found.append(
                f"{macro} = {value!r} means nothing to OBJECTIVE = "
                f"{data.objective!r}, only to {_listed(owners)}: leave it at "
                f"{default[field]!r}"
            )
    return found


def _vocabulary_problems(data: DataSettings) -> list[str]:
    found = []
    if data.vocabulary == "sentencepiece" and data.vocabulary_size < 300:
        found.append(
            f"VOCABULARY_PIECES = {data.vocabulary_size}: a SentencePiece vocabulary "
            "with byte fallback needs at least 300 pieces"
        )
    if data.eos_token and data.vocabulary in ("bytes", "sentencepiece", "task"):
        found.append(
            f"EOS_TOKEN = {data.eos_token!r} would be ignored with VOCABULARY = "
            f"{data.vocabulary!r}, which says itself what ends a document: set it to ''"
        )
    if data.start_token:
        start = f"START_TOKEN = {data.start_token!r}"
        if data.vocabulary in ("bytes", "sentencepiece", "task"):
            found.append(
                f"{start} is no piece of VOCABULARY = {data.vocabulary!r}, only of a "
                "tokenizer's file: set it to ''"
            )
        if data.layout == "encoder" or data.image_size:
            found.append(
                f"{start} means nothing to an encoder, or where texts begin with "
                "images: set it to ''"
            )
    if data.bad_utf8 == "replace" and data.vocabulary == "task":
        found.append(
            "BAD_UTF8 = 'replace' cannot mend text with VOCABULARY = 'task', whose "
            "Tasks have tokenised it already: set it to 'error' or 'drop'"
        )
    if data.extra_ids < 0:
        found.append(f"EXTRA_IDS = {data.extra_ids}: cannot be negative")
    needed = data.asks.sentinels if data.asks and not data.mask_token else 0
    if data.extra_ids < needed:
        uses = "marks what it asks for with sentinels"
        remedy = f"set it to {needed} or more (T5 has 100)"
        if data.objective in ("masked_lm", "masked_entities"):
            uses = "puts the last of EXTRA_IDS in the place of masked tokens"
            remedy = "set it to 1, or MASK_TOKEN to a piece of a tokenizer.json"
        found.append(
            f"OBJECTIVE = {data.objective!r} {uses}, and EXTRA_IDS = {data.extra_ids} "
            f"has {'too few' if data.extra_ids > 0 else 'none'}: {remedy}"
        )
    return found


def _split_problems(data: DataSettings) -> list[str]:
    found = []
    if data.train_split == data.heldout_split:
        found.append(
            f"HELDOUT_SPLIT = {data.heldout_split!r} is also TRAIN_SPLIT: what is "
            "scored must not be learnt"
        )
    if data.read_retries < 0:
        found.append(f"READ_RETRIES = {data.read_retries}: cannot be negative")
    return found


def _mixture_problems(mixture: MixtureSettings) -> list[str]:
    found = []
    if mixture.temperature <= 0:
        found.append(
            f"MIXTURE_TEMPERATURE = {mixture.temperature}: must be above 0; 1 is "
            "proportional, larger ones are more even"
        )
    if mixture.cap_tokens < 0:
        found.append(f"MIXTURE_CAP_TOKENS = {mixture.cap_tokens}: cannot be negative")
    tables = {"MIXTURE_RATES": mixture.rates} if mixture.rates else {}
    for step, rates in mixture.schedule.items():
        tables[f"MIXTURE_SCHEDULE[{step}]"] = rates
        if step < 0:
            found.append(f"MIXTURE_SCHEDULE: step {step} is negative")
    for name, rates in tables.items():
        if any(rate < 0 for rate in rates.values()) or sum(rates.values()) <= 0:
            found.append(
                f"{name} = {dict(rates)}: rates cannot be negative, and one must be "
                "above 0"
            )
    if mixture.weighting != "proportional" and (
        mixture.temperature != 1 or mixture.cap_tokens
    ):
        found.append(
            f"MIXTURE_TEMPERATURE = {mixture.temperature} and MIXTURE_CAP_TOKENS = "
            f"{mixture.cap_tokens} would be ignored with MIXTURE_WEIGHTING = 'rates': "
            "set it to 'proportional', or them to 1.0 and 0"
        )
    if mixture.weighting == "proportional" and mixture.rates:
        found.append(
            "MIXTURE_RATES would be ignored with MIXTURE_WEIGHTING = 'proportional': "
            "set it to 'rates', or leave MIXTURE_RATES empty"
        )
    if mixture.schedule and (mixture.rates or mixture.weighting != "rates"):
        found.append(
            "MIXTURE_SCHEDULE replaces MIXTURE_RATES and MIXTURE_WEIGHTING: give one "
            "of them"
        )
    return found


def _filter_problems(filters: FilterSettings, data: DataSettings) -> list[str]:
    found = []
    if data.image_size and filters.duplicates == "near":
        found.append(
            "DUPLICATES = 'near' looks at text alone, and would take images with alike "
            "captions for copies: set it to 'exact', which looks at both, or 'keep'"
        )
    if data.vocabulary == "task" and (
        filters.duplicates != "keep" or filters.quality_task
    ):
        found.append(
            "DUPLICATES and QUALITY_TASK look at text, and VOCABULARY = 'task' keeps "
            "tokens: set one of the other vocabularies"
        )
    if not 0 < filters.near_similarity <= 1:
        found.append(
            f"NEAR_DUPLICATE_SIMILARITY = {filters.near_similarity}: must be in (0, 1]"
        )
    if filters.quality_pareto <= 0:
        found.append(f"QUALITY_PARETO = {filters.quality_pareto}: must be above 0")
    if filters.quality_sample < 10:
        found.append(
            f"QUALITY_SAMPLE = {filters.quality_sample}: a classifier needs at least "
            "10 documents of each side"
        )
    return found
