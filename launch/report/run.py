"""The page that a run leaves behind: one HTML file that refers to nothing else."""

import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from launch.report import data, figures, series
from launch.report.about import About
from launch.report.gather import Heldout, Loads, Story, Training, gather, numbers
from launch.report.happened import happened
from launch.report.pages import Figure, render
from launch.report.series import number
from launch.terminal.lines import compact, duration
from launch.terminal.training import Extreme, load_extremes

REPORT_FILE = "report.html"

Record = Mapping[str, Any]
_DEAD = 0.1  # an expert below this share of the mean load is called almost idle


def write_report(model_dir: str | os.PathLike[str], about: About) -> pathlib.Path:
    """Writes `report.html` from the metrics of a run.

    Everything is escaped; whatever is missing or not finite is said so or left out.

    Args:
        model_dir: the run; its `metrics.jsonl` may be missing or empty.
        about: what the page says beside.
    Returns:
        The path of the page.
    """
    story = gather(model_dir)
    for note in story.notes:
        print(f"warning: {note}", file=sys.stderr, flush=True)
    train, heldout = story.train, story.heldout
    rivals = _rivals(about.baselines)
    router = next((value for macro, value, _ in about.knobs if macro == "ROUTER"), "")
    load, routing = _routing(train, story.loads)
    page = render(
        "run.html.jinja",
        title=about.title,
        facts=about.facts,
        cards=_cards(train, heldout, rivals, about.tokens_per_step),
        rivals=_beside(heldout, rivals),
        loss=_loss(train, heldout, rivals, about.tokens_per_step),
        data=data.data(train, heldout),
        ledger=ledger(story, by_cap="expert_choice" in router),
        load=load,
        routing=routing,
        pace=_pace(train),
        happened=happened(pathlib.Path(model_dir)),
        about=about,
        max_points=series.MAX_POINTS,
        notes=story.notes,
    )
    path = pathlib.Path(model_dir) / REPORT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    # A byte-level model can sample half a character, which no encoding can hold.
    draft.write_bytes(page.encode("utf-8", "replace"))
    os.replace(draft, path)
    return path


def ledger(story: Story, *, by_cap: bool = False) -> list[str]:
    """Says in sentences where the routed tokens went; [] for a dense model.

    Args:
        story: what a run has recorded.
        by_cap: what is dropped is what exceeds a token's experts (EXPERT_CHOICE_CAP),
            and not the slots of an expert.
    """
    train, recent = story.train, [*story.train.recent]
    sentences = []
    shares = numbers(recent, "router/dropped_fraction")
    if shares:
        per_thousand = 1000 * sum(shares) / len(shares)
        why = "their token had EXPERT_CHOICE_CAP experts" if by_cap else "it was full"
        sentences.append(
            f"At the end of training, of every 1,000 choices that the routers made, "
            f"{1000 - per_thousand:,.1f} were computed by their expert and "
            f"{per_thousand:,.1f} were dropped because {why}; a dropped choice adds "
            "nothing and its token goes on along the residual path."
        )
    if train.most_drops is not None:
        sentences.append(
            f"On average over the recorded steps of the whole run "
            f"{_percent(train.drops)} were dropped, in the worst record of them "
            f"{_percent(train.most_drops)}."
        )
    alone = numbers(recent, "router/tokens_without_expert_fraction")
    if any(alone):
        sentences.append(
            f"{_percent(sum(alone) / len(alone))} of the tokens of a sparse layer had "
            "no expert at all, and only their residual went on."
        )
    spilled = numbers(recent, "router/spilled_fraction")
    if any(spilled):
        sentences.append(
            f"{_percent(sum(spilled) / len(spilled))} of the choices found their "
            "expert full and were computed by the token's next best expert."
        )
    if again := train.greatest["perf/steps_taken_again"]:
        sentences.append(
            f"{again:,} steps sent a device more rows than ROW_BUDGET has room "
            "for and were taken again in rounds, with the same result."
        )
    scored = numbers([story.heldout.last], "router/dropped_fraction")
    if scored:
        sentences.append(
            f"In the last held-out evaluation {_percent(scored[0])} were dropped."
            if scored[0]
            else "In the last held-out evaluation none was dropped."
        )
    return sentences + _extremes(story)


def _extremes(story: Story) -> list[str]:
    """The most and the least loaded expert, and how many are almost idle."""
    if story.loads is None:
        found, idle = _recorded_extremes(story.train.last), ""
    else:
        mean_LE = story.loads.mean_LE
        found, idle = load_extremes(mean_LE), f"; {_idle(mean_LE)}"
    if found is None:
        return []
    most, least = found
    return [
        f"The most loaded expert, {most.expert} of sparse layer {most.layer}, took "
        f"{most.relative:.2f} times the mean of its layer, the least loaded, "
        f"{least.expert} of layer {least.layer}, {least.relative:.2f} times{idle}."
    ]


def _recorded_extremes(record: Record) -> tuple[Extreme, Extreme] | None:
    """What a record says of the most and the least loaded expert."""
    name = "router/load"
    try:
        most, least = (
            Extreme(
                record[f"{name}_{end}_layer"],
                record[f"{name}_{end}_expert"],
                float(record[f"{name}_{end}"]),
            )
            for end in ("most", "least")
        )
    except KeyError:
        return None
    return most, least


def _idle(mean_LE: np.ndarray) -> str:
    """How many experts are almost idle, in words."""
    there_LE = np.isfinite(mean_LE)
    sum_L1 = np.sum(mean_LE, axis=1, keepdims=True, where=there_LE)
    of_layer_L1 = sum_L1 / np.maximum(there_LE.sum(axis=1, keepdims=True), 1)
    idle = int((mean_LE < _DEAD * of_layer_L1).sum())
    verb = "was" if idle == 1 else "were"
    return (
        f"{idle or 'none'} of {int(there_LE.sum()):,} {verb} almost idle (below "
        f"{100 * _DEAD:.0f} % of the mean)"
    )


def _cards(
    train: Training,
    heldout: Heldout,
    rivals: Mapping[str, float],
    tokens_per_step: int | None,
) -> list[tuple[str, str, str]]:
    """The numbers a reader came for: names, values, and what they compare with."""
    final = heldout.last
    nats, bits = final.get("loss/nats_per_token"), final.get("loss/bits_per_byte")
    over = f"over {final['tokens']:,} tokens" if final.get("tokens") else ""
    about = f"nats per token {over}".strip() if final else "not scored"
    cards = [("held-out loss", _figure(nats), about)]
    if bits is not None:
        cards.append(("held-out bits per byte", _figure(bits), _verdict(bits, rivals)))
    if train.last:
        step = train.last["step"]
        seen = compact(step * tokens_per_step) if tokens_per_step else ""
        cards.append(
            ("trained", f"{step:,}", f"steps, {seen} tokens" if seen else "steps")
        )
    speeds = train.pace.curve("perf/tokens_per_second").mean
    if len(speeds):
        note = "tokens per second"
        used = numbers(train.recent, "perf/model_flops_utilization")
        if used:
            note += f", {100 * float(np.median(used)):.1f} % of the peak"
        cards.append(("speed", compact(float(np.median(speeds))), note))
    drops = numbers(train.recent, "router/dropped_fraction")
    if drops:
        cards.append(
            ("dropped", _percent(sum(drops) / len(drops)), "of choices, lately")
        )
    if skipped := train.greatest["state/skipped_steps"]:
        cards.append(("skipped", f"{skipped:,}", "steps with a non-finite gradient"))
    return cards


def _beside(heldout: Heldout, rivals: Mapping[str, float]) -> Figure | None:
    """Our bits per byte beside those of simpler models, where both are known."""
    bits = heldout.last.get("loss/bits_per_byte")
    if not rivals or (bits is None and heldout.last):
        return None
    ours = {"this model": bits} if _is_finite(bits) else {}
    return Figure(
        figures.bars(ours, rivals, unit="bits per byte, less is better"),
        "Bits that one byte of the held-out text takes: ours and simpler models.",
        wide=True,
    )


def _loss(
    train: Training,
    heldout: Heldout,
    rivals: Mapping[str, float],
    tokens_per_step: int | None,
) -> Figure | None:
    """The loss curves."""
    if not train.last and not heldout.last:
        return None
    reference = None
    final = heldout.last
    nats, bits = final.get("loss/nats_per_token"), final.get("loss/bits_per_byte")
    unigram = rivals.get("unigram")
    if _is_finite(nats) and _is_finite(bits) and _is_finite(unigram) and bits:
        reference = ("unigram", unigram * nats / bits)
    svg = figures.loss(
        *(train.trends, heldout.trends),
        tokens_per_step=tokens_per_step,
        reference=reference,
    )
    return Figure(
        svg,
        "Cross-entropy without the auxiliary losses, on the batches being learnt and "
        "on held-out text.",
        wide=True,
    )


def _routing(
    train: Training, loads: Loads | None
) -> tuple[Figure | None, list[Figure]]:
    """Load, and drops and entropy, per sparse layer; nothing for a dense model."""
    load, pair = None, []
    if loads is not None:
        layers, experts = loads.mean_LE.shape
        words = (
            "Load of each expert over the mean of its layer: white is balanced, red "
            "overloaded, blue idle."
        )
        if layers > len(loads.layers):
            words += f" {len(loads.layers)} of {layers} layers are shown."
        stride = math.ceil(experts / series.MAX_ROWS)
        if stride > 1:
            words += (
                f" Each row shows the one of {stride} neighbouring experts that is "
                "furthest from the mean."
            )
        load = Figure(figures.load(loads), words, wide=True)
    trends = train.trends
    if trends.layer_curves("router/dropped_fraction_per_layer"):
        words = "Choices dropped in each sparse layer."
        pair.append(Figure(figures.dropped(trends), words))
    if train.has_entropy:
        words = (
            "Entropy of the router's probabilities: ln E means undecided among all "
            "experts, 0 means certain."
        )
        experts = None if loads is None else loads.mean_LE.shape[1]
        pair.append(Figure(figures.entropy(trends, experts), words))
    return load, pair


def _pace(train: Training) -> list[Figure]:
    """Speed and the optimizer."""
    pair = []
    if len(train.pace.curve("perf/tokens_per_second").steps):
        first = number(train.first, "perf/step_seconds")
        words = "Speed, and the share of each step spent waiting for data."
        if train.has_steady_pace:
            steady = float(np.median(train.pace.curve("perf/step_seconds").mean))
            words += f" The median step took {_unbroken(steady)}"
            if first is not None and first > 1.5 * steady:
                words += f", the first step {_unbroken(first)}"
            words += "."
        pair.append(Figure(figures.throughput(train.pace), words))
    if "optimizer/gradient_norm" in train.last:
        words = "Global gradient norm before clipping, and the learning rate."
        pair.append(Figure(figures.optimization(train.trends), words))
    return pair


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


def _unbroken(seconds: float) -> str:
    """A duration that no line break parts from its unit."""
    return duration(seconds).replace(" ", "\N{NO-BREAK SPACE}")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
