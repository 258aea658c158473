"""`switchyard prepare --inspect`: what is in a store, counted, measured and shown."""

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.config.settings import Settings
from launch.data.opening import cut_words, training_batches
from launch.terminal.lines import is_utf8, legible
from tasks.batches import Batches
from tasks.store import Split, TokenStore
from tasks.vocabularies import Vocabulary

_BAR = 40  # characters of the longest bar
# Control characters would act on the terminal; "␛" shows one.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_GIVEN, _PREDICTED, _BOUNDARY = "dim", "", "bold cyan"


def show(store: TokenStore, settings: Settings, num_examples: int) -> None:
    """Prints counts, lengths of documents, and rows as the model will see them."""
    width = None if Console().is_terminal else 160
    console = Console(highlight=False, soft_wrap=True, width=width)
    batches = training_batches(store, settings)
    console.print(_counts(store, batches))
    for task in store.tasks:
        part = store.split(task, settings.data.train_split)
        for feature in part.features:
            console.print(_lengths(task, part, feature, is_utf8(console)))
    head = Text.from_markup(
        f"\nrows of {batches.length:,} tokens, as OBJECTIVE = "
        f"{settings.data.objective!r} makes them; [dim]‹given›[/], predicted, "
        f"[{_BOUNDARY}]│[/] where a piece begins, which sees nothing before it, "
        f"{100 * batches.padding_fraction:.1f} % padding{cut_words(batches)}"
    )
    console.print(legible(head, console))
    for number, text in enumerate(_examples(store, batches, num_examples)):
        example = Text.assemble((f"\nrow {number}\n", "bold"), text)
        console.print(legible(example, console))


def _counts(store: TokenStore, batches: Batches) -> Table:
    """A line for each split of each Task, and for each of its languages."""
    table = Table(box=None, header_style="bold")
    texts, numbers = ("task", "split"), ("documents", "tokens", "of inputs")
    for name in (*texts, *numbers, "bytes/token", "rows"):
        table.add_column(name, justify="left" if name in texts else "right")
    table.add_column("left out")
    manifest = store.manifest
    for name, task in manifest.tasks.items():
        for split, counts in task.splits.items():
            rows = f"{batches.rows(name):,}" if split == manifest.train_split else ""
            odd = dict(counts.removed)
            if counts.replaced_documents:
                odd["mended, and kept"] = counts.replaced_documents
            table.add_row(
                name,
                split,
                f"{counts.documents:,}",
                f"{counts.tokens['targets']:,}",
                f"{inputs:,}" if (inputs := counts.tokens.get("inputs")) else "",
                f"{counts.bytes_per_token:.2f}",
                rows,
                ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in odd.items()),
            )
            for language, of_language in counts.languages.items():
                table.add_row(
                    "",
                    f"  {language or '(none said)'}",
                    f"{of_language.documents:,}",
                    f"{of_language.tokens:,}",
                    "",
                    f"{of_language.text_bytes / of_language.tokens:.2f}",
                )
    return table


def _lengths(task: str, part: Split, feature: str, utf8: bool) -> Text:
    """Draws how long documents are, in doublings."""
    lengths = np.diff(part.offsets(feature))
    doublings = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
    first = int(np.flatnonzero(doublings)[0])
    text = Text(
        f"\n{task}: tokens per document of {feature!r}; median "
        f"{int(np.median(lengths)):,}, longest {int(lengths.max()):,}"
    )
    for power, number in enumerate(doublings.tolist()[first:], start=first):
        bar = ("█" if utf8 else "#") * round(_BAR * number / doublings.max())
        text.append(f"\n{'≤' if utf8 else '<='} {2**power:>9,} {number:>11,} {bar}")
    return text


def _examples(store: TokenStore, batches: Batches, number: int) -> list[Text]:
    """The first rows of the first batches."""
    found = []
    for place in range(number):
        index, row = divmod(place, batches.sizes.of(0))
        features = batches.read(index, row, row + 1)
        found.append(_row({name: f[0] for name, f in features.items()}, store))
    return found


def _row(features: dict[str, np.ndarray], store: TokenStore) -> Text:
    """One row as text: what is given, what is predicted, and where pieces begin.

    Of an encoder-decoder both sides; of an encoder what is read and, after an arrow,
    what is predicted in its place.
    """
    text = Text()
    if "decoder_target_tokens" not in features:
        _append(text, features, "encoder", store)
        return text
    if "encoder_input_tokens" in features:
        _append(text, features, "encoder", store)
        text.append(" → ", style=_BOUNDARY)
    _append(text, features, "decoder", store)
    return text


def _append(
    text: Text, features: dict[str, np.ndarray], side: str, store: TokenStore
) -> None:
    """Adds the row of one side."""
    read_L, segment_L = (
        features[f"{side}_{name}"] for name in ("input_tokens", "segment_ids")
    )
    target_L = features.get(f"{side}_target_tokens", read_L)
    weight_L = features.get(f"{side}_loss_weights", np.zeros_like(read_L))
    masked = side == "encoder" and weight_L.any()
    real_L = segment_L > 0
    change_L = np.diff(segment_L, prepend=0) != 0
    cuts = np.flatnonzero(change_L | (np.diff(weight_L, prepend=-1) != 0))
    for start, stop in zip(cuts, [*cuts[1:], len(target_L)], strict=True):
        if not real_L[start]:
            text.append(f"[{stop - start} of padding]", style=_GIVEN)
            continue
        if change_L[start]:
            text.append("│", style=_BOUNDARY)
        words = readable(target_L[start:stop], store.vocabulary)
        if f"{side}_images" in features and not weight_L[start]:
            words = f"{stop - start} patches"
        if weight_L[start]:
            if masked:
                read = readable(read_L[start:stop], store.vocabulary)
                text.append(f"{read}→", style=_GIVEN)
            text.append(words, style=_PREDICTED)
        else:  # marked, because a file or a pipe shows no style
            text.append(f"‹{words}›", style=_GIVEN)


def readable(ids: np.ndarray, vocabulary: Vocabulary) -> str:
    """Returns text, with ids that stand for no text by a name: ⏹ ends a document.

    Control characters are shown by their pictures.
    """
    extra = vocabulary.size - vocabulary.extra_ids
    parts: list[str] = []
    begin = 0
    for place, token in enumerate([*ids.tolist(), None]):
        named = token is None or token >= extra or token == vocabulary.eos_id
        if named:
            text = vocabulary.decode(ids[begin:place])
            parts.append(text.translate(_PICTURES))
            begin = place + 1
        if token == vocabulary.eos_id:
            parts.append("⏹")
        elif token is not None and token >= extra:
            parts.append(f"<{vocabulary.size - 1 - token}>")
    return "".join(parts)
