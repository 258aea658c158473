"""The page that a run leaves behind: one HTML file that refers to nothing else."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from launch.records.write import read_metrics
from launch.report import data, drawing, figures, series
from launch.report.about import About
from launch.report.pages import Figure, render
from launch.terminal.lines import compact, duration
from launch.terminal.training import load_extremes

REPORT_FILE = "report.html"

Record = Mapping[str, Any]
_DEAD = 0.1  # an expert below this share of the mean load is called almost idle
_RECENT = 10  # records of training that stand for the end of a run


def write_report(model_dir: str | os.PathLike[str], about: About) -> pathlib.Path:
    """Writes `report.html` from the metrics of a run.

    Everything is escaped; whatever is missing or not finite is said so or left out.

    Args:
        model_dir: the run; its `metrics.jsonl` may be missing or empty.
        about: what the page says beside.
    Returns:
        The path of the page.
    """
    records = read_metrics(model_dir)
    rivals = _rivals(about.baselines)
    train = [record for record in records if record["split"] == "train"]
    heldout = [record for record in records if record["split"] == "heldout"]
    router = next((value for macro, value, _ in about.knobs if macro == "ROUTER"), "")
    by_cap = "expert_choice" in router
    load, routing = _routing(train)
    page = render(
        "run.html.jinja",
        title=about.title,
        facts=about.facts,
        cards=_cards(train, heldout, rivals, about.tokens_per_step),
        rivals=_beside(heldout, rivals),
        loss=_loss(train, heldout, rivals, about.tokens_per_step),
        data=data.data(train, heldout),
        ledger=ledger(train, heldout, by_cap=by_cap),
        load=load,
        routing=routing,
        pace=_pace(train),
        about=about,
        max_points=drawing.MAX_POINTS,
    )
    path = pathlib.Path(model_dir) / REPORT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    # A byte-level model can sample half a character, which no encoding can hold.
    draft.write_bytes(page.encode("utf-8", "replace"))
    os.replace(draft, path)
    return path


def ledger(
    train: Sequence[Record], heldout: Sequence[Record], *, by_cap: bool = False
) -> list[str]:
    """Says in sentences where the routed tokens went; [] for a dense model.

    Args:
        train: records of training.
        heldout: records of held-out evaluations.
        by_cap: what is dropped is what exceeds a token's experts (EXPERT_CHOICE_CAP),
            and not the slots of an expert.
    """
    recent = train[-_RECENT:]
    sentences = []
    shares = _numbers(recent, "router/dropped_fraction")
    if shares:
        per_thousand = 1000 * sum(shares) / len(shares)
        why = "their token had EXPERT_CHOICE_CAP experts" if by_cap else "it was full"
        sentences.append(
            f"At the end of training, of every 1,000 choices that the routers made, "
            f"{1000 - per_thousand:,.1f} were computed by their expert and "
            f"{per_thousand:,.1f} were dropped because {why}; a dropped choice adds "
            "nothing and its token goes on along the residual path."
        )
        all_shares = _numbers(train, "router/dropped_fraction")
        sentences.append(
            f"On average over the recorded steps of the whole run "
            f"{_percent(sum(all_shares) / len(all_shares))} were dropped, in the worst "
            f"of them {_percent(max(all_shares))}."
        )
    alone = _numbers(recent, "router/tokens_without_expert_fraction")
    if any(alone):
        sentences.append(
            f"{_percent(sum(alone) / len(alone))} of the tokens of a sparse layer had "
            "no expert at all, and only their residual went on."
        )
    spilled = _numbers(recent, "router/spilled_fraction")
    if any(spilled):
        sentences.append(
            f"{_percent(sum(spilled) / len(spilled))} of the choices found their "
            "expert full and were computed by the token's next best expert."
        )
    again = _numbers(train, "perf/steps_taken_again")
    if any(again):
        sentences.append(
            f"{max(again):,.0f} steps sent a device more rows than ROW_BUDGET has room "
            "for and were taken again in rounds, with the same result."
        )
    scored = _numbers(heldout[-1:], "router/dropped_fraction")
    if scored:
        sentences.append(
            f"In the last held-out evaluation {_percent(scored[0])} were dropped."
            if scored[0]
            else "In the last held-out evaluation none was dropped."
        )
    load_TLE = [r["router/load"] for r in recent if r.get("router/load")]
    load_TLE = [load for load in load_TLE if np.shape(load) == np.shape(load_TLE[-1])]
    mean_LE = np.array(load_TLE, dtype=float).mean(axis=0) if load_TLE else None
    extremes = load_extremes([] if mean_LE is None else mean_LE.tolist())
    if mean_LE is not None and extremes:
        most, least = extremes
        of_layer_L1 = np.nanmean(mean_LE, axis=1, keepdims=True)
        idle = int((mean_LE < _DEAD * of_layer_L1).sum())
        experts = int(np.isfinite(mean_LE).sum())
        verb = "was" if idle == 1 else "were"
        sentences.append(
            f"The most loaded expert, {most.expert} of sparse layer {most.layer}, took "
            f"{most.relative:.2f} times the mean of its layer, the least loaded, "
            f"{least.expert} of layer {least.layer}, {least.relative:.2f} times; "
            f"{idle or 'none'} of {experts:,} {verb} almost idle (below "
            f"{100 * _DEAD:.0f} % of the mean)."
        )
    return sentences


def _cards(
    train: Sequence[Record],
    heldout: Sequence[Record],
    rivals: Mapping[str, float],
    tokens_per_step: int | None,
) -> list[tuple[str, str, str]]:
    """The numbers a reader came for: names, values, and what they compare with."""
    final = heldout[-1] if heldout else {}
    nats, bits = final.get("loss/nats_per_token"), final.get("loss/bits_per_byte")
    over = f"over {final['tokens']:,} tokens" if final.get("tokens") else ""
    about = f"nats per token {over}".strip() if heldout else "not scored"
    cards = [("held-out loss", _figure(nats), about)]
    if bits is not None:
        cards.append(("held-out bits per byte", _figure(bits), _verdict(bits, rivals)))
    if train:
        step = train[-1]["step"]
        seen = compact(step * tokens_per_step) if tokens_per_step else ""
        cards.append(
            ("trained", f"{step:,}", f"steps, {seen} tokens" if seen else "steps")
        )
    speeds = _numbers(_steady(train) or train, "perf/tokens_per_second")
    if speeds:
        cards.append(("speed", compact(float(np.median(speeds))), "tokens per second"))
    drops = _numbers(train[-_RECENT:], "router/dropped_fraction")
    if drops:
        cards.append(
            ("dropped", _percent(sum(drops) / len(drops)), "of choices, lately")
        )
    skipped = _numbers(train, "state/skipped_steps")
    if skipped and max(skipped) > 0:
        cards.append(
            ("skipped", f"{max(skipped):,.0f}", "steps with a non-finite gradient")
        )
    return cards


def _beside(heldout: Sequence[Record], rivals: Mapping[str, float]) -> Figure | None:
    """Our bits per byte beside those of simpler models, where both are known."""
    bits = heldout[-1].get("loss/bits_per_byte") if heldout else None
    if not rivals or (bits is None and heldout):
        return None
    ours = {"this model": bits} if _is_finite(bits) else {}
    return Figure(
        figures.bars(ours, rivals, unit="bits per byte, less is better"),
        "Bits that one byte of the held-out text takes: ours and simpler models.",
        wide=True,
    )


def _loss(
    train: Sequence[Record],
    heldout: Sequence[Record],
    rivals: Mapping[str, float],
    tokens_per_step: int | None,
) -> Figure | None:
    """The loss curves."""
    if not train and not heldout:
        return None
    reference = None
    final = heldout[-1] if heldout else {}
    nats, bits = final.get("loss/nats_per_token"), final.get("loss/bits_per_byte")
    unigram = rivals.get("unigram")
    if _is_finite(nats) and _is_finite(bits) and _is_finite(unigram) and bits:
        reference = ("unigram", unigram * nats / bits)
    svg = figures.loss(
        train, heldout, tokens_per_step=tokens_per_step, reference=reference
    )
    return Figure(
        svg,
        "Cross-entropy without the auxiliary losses, on the batches being learnt and "
        "on held-out text.",
        wide=True,
    )


def _routing(train: Sequence[Record]) -> tuple[Figure | None, list[Figure]]:
    """Load, and drops and entropy, per sparse layer; nothing for a dense model."""
    load, pair = None, []
    loads = [record["router/load"] for record in train if record.get("router/load")]
    if loads:
        layers, experts = len(loads[-1]), len(loads[-1][0])
        words = (
            "Load of each expert over the mean of its layer: white is balanced, red "
            "overloaded, blue idle."
        )
        if layers > drawing.MAX_LAYERS:
            words += f" {drawing.MAX_LAYERS} of {layers} layers are shown."
        stride = math.ceil(experts / series.MAX_ROWS)
        if stride > 1:
            words += (
                f" Each row shows the one of {stride} neighbouring experts that is "
                "furthest from the mean."
            )
        load = Figure(figures.load(train), words, wide=True)
    if any(record.get("router/dropped_fraction_per_layer") for record in train):
        words = "Choices dropped in each sparse layer."
        pair.append(Figure(figures.dropped(train), words))
    # A router without probabilities, such as "hashed", has no entropy.
    if any(any(record.get("router/entropy_nats_per_layer", ())) for record in train):
        words = (
            "Entropy of the router's probabilities: ln E means undecided among all "
            "experts, 0 means certain."
        )
        pair.append(Figure(figures.entropy(train), words))
    return load, pair


def _pace(train: Sequence[Record]) -> list[Figure]:
    """Speed and the optimizer."""
    pair = []
    if _numbers(train, "perf/tokens_per_second"):
        seconds = _numbers(train[:1], "perf/step_seconds")
        steady_records = _steady(train)
        later = _numbers(steady_records, "perf/step_seconds")
        words = "Speed, and the share of each step spent waiting for data."
        if later:
            steady = float(np.median(later))
            words += f" The median step took {_unbroken(steady)}"
            if seconds and seconds[0] > 1.5 * steady:
                words += f", the first step {_unbroken(seconds[0])}"
            words += "."
        shown = figures.throughput(steady_records if later else train)
        pair.append(Figure(shown, words))
    if any("optimizer/gradient_norm" in record for record in train):
        words = "Global gradient norm before clipping, and the learning rate."
        pair.append(Figure(figures.optimization(train), words))
    return pair


def _steady(train: Sequence[Record]) -> list[Record]:
    """Records without the first step of each start, which would flatten the rest."""
    name = "perf/steps_since_start"
    return [r for i, r in enumerate(train) if r.get(name, i + 1) != 1]


def _rivals(baselines: Mapping[str, float]) -> dict[str, float]:
    """Finite bits per byte by the name of what needs them."""
    unit = "_bits_per_byte"
    with_unit = {k.removesuffix(unit): v for k, v in baselines.items() if unit in k}
    rivals = with_unit or baselines
    return {name: float(v) for name, v in rivals.items() if _is_finite(v) and v > 0}


def _verdict(bits: Any, rivals: Mapping[str, float]) -> str:
    """How ours compares with the best of the others."""
    if not rivals or not _is_finite(bits):
        return ""
    name = min(rivals, key=lambda rival: rivals[rival])
    change = 1 - bits / rivals[name]
    return f"{100 * abs(change):.0f} % {'below' if change >= 0 else 'above'} {name}"


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if _is_finite(value) else "not finite"


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _numbers(records: Sequence[Record], name: str) -> list[float]:
    """The finite values of a metric."""
    values = [record.get(name) for record in records]
    return [float(value) for value in values if _is_finite(value)]


def _unbroken(seconds: float) -> str:
    """A duration that no line break parts from its unit."""
    return duration(seconds).replace(" ", "\N{NO-BREAK SPACE}")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
