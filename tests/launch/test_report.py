import html.parser
import json
import math
import re
import subprocess
import sys
import tracemalloc
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from launch.records.write import MetricWriter
from launch.report import series
from launch.report.about import About
from launch.report.gather import gather
from launch.report.run import ledger, write_report

LOADS = [[0.45, 0.05, 0.25, 0.25], [0.25] * 4]


def _train(step, *, sparse=True, **extra):
    record = {
        "step": step,
        "split": "train",
        "loss/nats_per_token": 2 + 5 / (1 + step),
        "optimizer/learning_rate": 1e-3,
        "optimizer/gradient_norm": 1.0,
        "perf/tokens_per_second": 60_000.0,
        "perf/step_seconds": 30.0 if step == 1 else 0.5,
        "perf/data_wait_seconds": 0.01,
    }
    if sparse:
        record |= {
            "router/load": LOADS,
            "router/dropped_fraction": 0.01,
            "router/dropped_fraction_per_layer": [0.02, 0.0],
            "router/entropy_nats_per_layer": [1.2, 1.3],
        }
    return record | extra


def _heldout(step, **extra):
    record = {
        "loss/nats_per_token": 2.3456,
        "loss/bits_per_byte": 1.6543,
        "tokens": 999,
    }
    return {"step": step, "split": "heldout", **record, **extra}


def _record(folder, records):
    """Writes the file of a run, loads in its lines, as older versions did."""

    def word(value):
        if isinstance(value, list):
            return [word(item) for item in value]
        finite = not isinstance(value, float) or math.isfinite(value)
        return value if finite else str(value)

    lines = [json.dumps({k: word(v) for k, v in record.items()}) for record in records]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def _write(folder, records, **arguments):
    """The page of a run."""
    _record(folder, records)
    arguments = {"title": "A run", **arguments}
    return write_report(folder, About(**arguments)).read_text()


class _Page(html.parser.HTMLParser):
    """What a browser would see: elements with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text = [], ""
        self._skip = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._skip = tag == "style"

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        self.text += "" if self._skip else data


def _ledger(folder, records, **named):
    """What the page says of the ledger, in one text."""
    _record(folder, records)
    return " ".join(ledger(gather(folder), **named))


def _figure_names(page):
    """Figures by the prefix that their identifiers share."""
    return [
        name
        for name in ("bars", "loss", "load", "dropped", "entropy", "throughput")
        if f'id="{name}-' in page
    ]


RECORDS = [_train(1), _train(10), _heldout(10), _train(20), _heldout(20)]
ARGUMENTS = {
    "facts": [("model", "small")],
    "baselines": {"unigram": 4.75, "gzip": 3.25, "xz": 2.875},
    "sample": {"prompt": "Once upon", "continuation": " a time"},
    "knobs": [("NUM_EXPERTS", "4", "command line")],
    "checkpoint": "checkpoints/20",
    "command": "switchyard train --gin_file=runs/a.gin",
    "manifest": {"code": "abc123"},
    "tokens_per_step": 4096,
}


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("run"), RECORDS, **ARGUMENTS)


def test_the_page_holds_the_numbers_and_everything_it_was_given(full_page):
    text = _Page(full_page).text
    for part in (
        "2.3456",
        "1.6543",
        "over 999 tokens",
        "42 % below xz",  # 1 - 1.6543 / 2.875 = 0.4246
        "81.9k tokens",  # 20 steps of 4,096
        "4.750",
        "3.250",
        "2.875",
        "small",
        "NUM_EXPERTS",
        "command line",
        "checkpoints/20",
        "switchyard train --gin_file=runs/a.gin",
        "abc123",
    ):
        assert part in text
    assert "30.0\N{NO-BREAK SPACE}s" in text  # the step that compiled, apart


def test_the_page_refers_to_nothing_outside_itself(full_page):
    page = _Page(full_page)
    assert len([tag for tag, _ in page.elements if tag == "svg"]) == 7
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    outside = [url for url in re.findall(r"url\(([^)]*)\)", full_page) if url[0] != "#"]
    assert outside == []
    assert "@import" not in full_page
    assert "http" not in full_page


def test_identifiers_are_unique_and_what_refers_to_them_exists(full_page):
    ids = re.findall(r'\bid="([^"]*)"', full_page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', full_page)
    assert len(used) > 10
    assert {a or b for a, b in used} <= set(ids)


def test_figures_keep_text_as_text_and_take_their_colours_from_the_page(full_page):
    assert ">loss (nats per token)</text>" in full_page
    declared = set(re.findall(r"(--[\w-]+):", full_page))
    used = set(re.findall(r"var\((--[\w-]+)\)", full_page))
    assert {"--ink", "--blue", "--depth-0"} <= used <= declared
    assert "#0102" not in full_page
    assert "#0103" not in full_page


def test_every_figure_is_well_formed(full_page):
    for svg in re.findall(r"<svg.*?</svg>", full_page, re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)


def test_the_prompt_is_told_from_the_continuation(full_page):
    assert '<span class="prompt">Once upon</span> a time</div>' in full_page


def test_hostile_text_is_escaped(tmp_path):
    bad = "</div><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    bad += "$title$ $\\frac$ \ud800"
    page = _write(
        tmp_path,
        RECORDS,
        title=bad,
        facts=[(bad, bad)],
        baselines={bad.replace("\ud800", ""): 3.0},
        sample={"prompt": bad, "continuation": bad},
        knobs=[(bad, bad, bad)],
        checkpoint=bad,
        command=bad,
        manifest={bad: bad},
    )
    seen = _Page(page)
    tags = {tag for tag, _ in seen.elements}
    assert not tags & {"script", "img"}
    assert not [
        a for _, attributes in seen.elements for a in attributes if a[:2] == "on"
    ]
    # Title, fact, baseline, sample and manifest twice, knob thrice, path, command.
    assert seen.text.count("<script>alert(1)</script>") == 15


def test_a_dense_model_has_no_routing(tmp_path):
    page = _write(tmp_path, [_train(s, sparse=False) for s in (1, 2)] + [_heldout(2)])
    assert "Routing" not in page
    assert _figure_names(page) == ["loss", "throughput"]


def test_without_metrics_there_is_still_a_page(tmp_path):
    page = write_report(tmp_path / "new", About(title="A run")).read_text()
    assert "No metrics were recorded." in page
    assert _figure_names(page) == []


def test_one_record_is_enough(tmp_path):
    page = _write(tmp_path, [_train(1)])
    every = ["loss", "load", "dropped", "entropy", "throughput"]
    assert _figure_names(page) == every


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_numbers_are_marked_and_break_nothing(tmp_path, value):
    def spoil(record):
        return {
            name: np.full_like(np.array(v, float), value).tolist() if "/" in name else v
            for name, v in record.items()
        }

    some = _write(tmp_path, [_train(1), spoil(_train(2)), _train(3), _heldout(3)])
    assert ">not finite</text>" in some
    assert "2.3456" in some
    every = _write(tmp_path, [spoil(_train(s)) for s in (1, 2)] + [spoil(_heldout(2))])
    assert ">no finite value</text>" in every
    assert '<div class="value">not finite</div>' in every


def test_a_resumed_run_shows_each_step_once(tmp_path):
    first = [_train(s, **{"router/dropped_fraction": 0.9}) for s in (10, 20)]
    page = _write(tmp_path, [*first, _train(10), _train(20)])
    assert "1.00 %" in page
    assert "90.00 %" not in page


def test_a_long_and_wide_run_makes_a_small_page(tmp_path):
    layers, experts = 24, 256
    rng = np.random.default_rng(0)
    load = rng.dirichlet(np.ones(experts), size=layers).round(5).tolist()
    sparse = {
        "router/load": load,
        "router/dropped_fraction_per_layer": [0.1] * layers,
        "router/entropy_nats_per_layer": [1.0] * layers,
    }
    records = [_train(s, sparse=False) for s in range(1, 4001)]
    records += [_train(s, sparse=False, **sparse) for s in range(4001, 4041)]
    page = _write(tmp_path, records)
    assert len(page) < 1_000_000
    assert len(re.findall(r">sparse layer \d+</text>", page)) == series.MAX_LAYERS
    assert "8 of 24 layers are shown" in page
    assert "one of 4 neighbouring experts" in page


def test_of_the_token_stores_baselines_the_bits_per_byte_are_taken(tmp_path):
    baselines = {
        "unigram_nats_per_token": 7.0,
        "unigram_bits_per_byte": 4.75,
        "xz_bits_per_byte": 2.875,
        "compressed_text_bytes": 12_345,
    }
    page = _write(tmp_path, RECORDS, baselines=baselines)
    assert "42 % below xz" in page
    assert ">4.750</text>" in page
    assert "7.000" not in page
    assert "12345" not in page


@pytest.mark.fast
def test_a_reduced_curve_keeps_its_means_and_extremes():
    trends = series.Trends(np.arange(1000), bins=10)
    for step in range(1000):
        trends.add("loss", step, 100.0 if step == 500 else 1.0)
    # Ten spans of 100 steps; the spike is in the sixth: (99 + 100) / 100 = 1.99.
    found = trends.curve("loss")
    np.testing.assert_allclose(found.steps, np.arange(10) * 100 + 49.5, atol=1)
    np.testing.assert_allclose(found.mean, [1] * 5 + [1.99] + [1] * 4, atol=0.02)
    assert found.low.max() == 1.0
    np.testing.assert_array_equal(found.high, [1] * 5 + [100] + [1] * 4)
    assert found.merged
    assert trends.curve("another").steps.size == 0


@pytest.mark.fast
def test_few_records_have_a_point_each_and_what_is_not_finite_is_marked():
    trends = series.Trends(np.array([1, 2, 1000]))
    for step, value in ((1, 3.0), (2, math.nan), (1000, 5.0)):
        trends.add("loss", step, value)
        trends.add_layers("entropy", step, [value, 1.0])
    found = trends.curve("loss")
    assert found.steps.tolist() == [1, 1000]
    assert found.mean.tolist() == [3, 5]
    assert (found.lost, found.merged) == ([2], False)
    layers = trends.layer_curves("entropy")
    assert layers.steps.tolist() == [1, 1000], "a layer of no finite value: left out"
    assert layers.mean_TL.tolist() == [[3, 1], [5, 1]]
    assert (layers.low.tolist(), layers.high.tolist()) == ([1, 1], [3, 5])


@pytest.mark.fast
def test_a_heat_map_shows_load_over_the_mean():
    steps, load_TE = np.array([1.0, 2.0]), np.array([[1.0, 3.0], [0.5, 0.5]])
    heat_ET, stride = series.load_heat(steps, load_TE)
    assert stride == 1
    np.testing.assert_array_equal(heat_ET, [[0.5, 1.0], [1.5, 1.0]])


@pytest.mark.fast
def test_experts_that_share_a_row_show_the_one_furthest_from_the_mean():
    load_TE = np.ones((1, 2 * series.MAX_ROWS))
    load_TE[0, 5] = 3.0  # row 2
    heat_ET, stride = series.load_heat(np.array([1.0]), load_TE)
    assert (heat_ET.shape, stride) == ((series.MAX_ROWS, 1), 2)
    assert heat_ET.argmax() == 2
    assert heat_ET[2, 0] == pytest.approx(3 / (1 + 2 / 128))


@pytest.mark.fast
def test_the_ledger_counts_in_words(tmp_path):
    records = [_train(s) for s in range(1, 4)]
    records.append(_train(4, **{"router/dropped_fraction": 0.05}))
    records.append(_heldout(4, **{"router/dropped_fraction": 0.0}))
    words = _ledger(tmp_path, records)
    # (3 · 0.01 + 0.05) / 4 = 0.02.
    assert "980.0 were computed" in words
    assert "20.0 were dropped" in words
    assert "over the recorded steps of the whole run 2.00 % were dropped" in words
    assert "in the worst record of them 5.00 %" in words
    assert "dropped because it was full" in words
    assert "held-out evaluation none was dropped" in words
    assert "expert, 0 of sparse layer 0, took 1.80 times" in words
    assert "1 of layer 0, 0.20 times" in words
    assert "none of 8 were almost idle" in words
    assert _ledger(tmp_path, [_train(1, sparse=False), _heldout(1)]) == ""


@pytest.mark.fast
def test_records_weigh_by_the_steps_they_stand_for(tmp_path):
    few = {"router/dropped_fraction": 0.5, "state/steps": 1}
    many = {"router/dropped_fraction": 0.0, "state/steps": 9}
    words = _ledger(tmp_path, [_train(1, **few), _train(10, **many)])
    assert "of the whole run 5.00 % were dropped, in the worst record of them" in words


@pytest.mark.fast
def test_choices_beyond_the_cap_of_expert_choice_are_not_called_homeless(tmp_path):
    words = _ledger(tmp_path, [_train(1)], by_cap=True)
    assert "because their token had EXPERT_CHOICE_CAP experts" in words
    assert "full" not in words
    page = _write(tmp_path, [_train(1)], knobs=[("ROUTER", "'expert_choice'", "leaf")])
    assert "EXPERT_CHOICE_CAP experts" in page
    assert "full" not in _Page(page).text


@pytest.mark.parametrize("period", [0, 1, 3])
def test_loads_in_files_make_the_page_that_loads_in_lines_made(tmp_path, period):
    records = [_train(step) for step in range(1, 8)]
    lines = _write(tmp_path, records, title="A run")
    folder = tmp_path / "files"
    with MetricWriter(folder, load_period_steps=period) as writer:
        for record in records:
            writer.write(record)
    assert "LOADS" not in (folder / "metrics.jsonl").read_text()
    assert '"router/load":' not in (folder / "metrics.jsonl").read_text()
    page = write_report(folder, About(title="A run")).read_text()
    for words in ("0 of sparse layer 0, took 1.80 times", "1 of layer 0, 0.20 times"):
        assert words in page
        assert words in lines
    assert ("none of 8 were almost idle" in page) == (period > 0)
    assert ("load" in _figure_names(page)) == (period > 0)
    if period == 1:
        assert _figure(page, "load") == _figure(lines, "load")
    # Steps 1, 3 and 6: the first, and the first at or after each multiple.
    steps = [1, 3, 6] if period == 3 else range(1, 8) if period else []
    assert gathered_steps(folder) == [*steps]


def gathered_steps(folder):
    loads = gather(folder).loads
    return [] if loads is None else loads.steps.tolist()


def _figure(page, name):
    (found,) = re.findall(
        rf'<svg[^>]*>(?:(?!</svg>).)*id="{name}-.*?</svg>', page, re.S
    )
    return found


def test_a_damaged_matrix_is_left_out_and_said(tmp_path, capsys):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 4):
            writer.write(_train(step))
    files = sorted((tmp_path / "loads" / "train").iterdir())
    files[1].write_bytes(files[1].read_bytes()[:-1])
    (files[0].parent / ".DS_Store").touch()
    page = write_report(tmp_path, About(title="A run")).read_text()
    assert "load" in _figure_names(page)
    assert gathered_steps(tmp_path) == [1, 3]
    said = f"files of loads that cannot be read are left out: 1, {files[1]}"
    assert f"warning: {said}\n" in capsys.readouterr().err
    assert said in page


def test_of_a_model_that_was_changed_the_latest_loads_are_shown(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(1, **{"router/load": [[0.5, 0.5]]}))
        writer.write(_train(2))
    assert gathered_steps(tmp_path) == [2]


def _many_records(folder, number):
    """Writes records of 24 layers, 1.3 kB each."""
    layers = {name: [0.1] * 24 for name in _train(1) if name.endswith("per_layer")}
    record = _train(1, **layers, **{f"another/{n}": n / 7 for n in range(40)})
    del record["router/load"]
    line = json.dumps(record)[len('{"step": 1') :]
    with open(folder / "metrics.jsonl", "w") as file:
        file.writelines(f'{{"step": {step}{line}\n' for step in range(1, number + 1))


@pytest.mark.fast
def test_what_a_page_needs_does_not_grow_with_the_records(tmp_path):
    peaks = []
    for number in (400, 1200):
        _many_records(tmp_path, number)
        tracemalloc.start()
        assert gather(tmp_path).train.last["step"] == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Where each begins is kept; as Python's numbers a record takes about 5 kB.
    assert peaks[1] - peaks[0] < 800 * 300


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_page_of_very_many_records_is_made_in_little_memory(tmp_path):
    _many_records(tmp_path, 200_000)  # 390 MB
    program = (
        "import resource, sys\n"
        "from launch.report.about import About\n"
        "from launch.report.run import write_report\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "write_report(sys.argv[1] + '/new', About(title='A run'))\n"
        "before = most()\n"
        "write_report(sys.argv[1], About(title='A run'))\n"
        "print(most() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000, "kilobytes"
    assert "200,000" in (tmp_path / "report.html").read_text()


def test_a_router_without_probabilities_has_no_figure_of_their_entropy(tmp_path):
    hashed = {"router/entropy_nats_per_layer": [0.0, 0.0]}
    page = _write(tmp_path, [_train(1, **hashed), _train(2, **hashed)])
    assert _figure_names(page) == ["loss", "load", "dropped", "throughput"]


@pytest.mark.fast
def test_the_speed_leaves_out_the_first_step_of_every_start(tmp_path):
    def steady(records):
        _record(tmp_path, records)
        train = gather(tmp_path).train
        return train.pace.curve("perf/step_seconds").steps.tolist()

    name = "perf/steps_since_start"
    since = [_train(s, **{name: n}) for s, n in ((1, 1), (2, 2), (3, 1), (4, 2))]
    assert steady(since) == [2, 4]
    sparsely = [_train(s, **{name: n}) for s, n in ((1, 1), (10, 10), (20, 5))]
    assert steady(sparsely) == [10, 20]
    older = [_train(1), _train(2), _train(3)]
    assert steady(older) == [2, 3]
    assert steady([_train(1)]) == [1], "there is nothing else"


def _cells(page):
    """The text of each row of each table, cells apart."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r">([^<>]+)</", row) for row in rows]


def test_the_page_says_what_was_read_of_each_task_and_how_each_scores(tmp_path):
    read = {
        **{"data/rows/a": 30, "data/epochs/a": 0.25, "data/rows/b:<1>": 10},
        "data/epochs/b:<1>": 12.5,
    }
    records = [
        _train(1, **{"data/read_retries": 0}),
        _train(2, **{"data/read_retries": 3}),
        _train(3, **{"data/read_retries": 1}),  # after a restart
        _train(4, **{"data/read_retries": 2}, **read),
        {"step": 2, "split": "heldout", "metric/a/bleu": 12.25},
        _heldout(
            4,
            **{"metric/a/bleu": 22.125, "metric/a/odd": math.nan},
            **{"loss/nats_per_token/a": 2.25, "loss/bits_per_byte/a": 1.125},
            **{"loss/nats_per_token/b:<1>": 3.5, "loss/bits_per_byte/b:<1>": 2.5},
            **{"loss/nats_per_token/a/zh": 2.0},
        ),
    ]
    page = _write(tmp_path, records)
    assert "5 reads of the token store failed" in page
    rows = _cells(page)
    for row in (
        ["a", "30", "75.0 %", "0.25"],
        ["b:&lt;1&gt;", "10", "25.0 %", "12.5"],
        ["a", "2.2500", "1.1250"],
        ["b:&lt;1&gt;", "3.5000", "2.5000"],
        ["a/zh", "2.0000", "–"],
        ["metric", "step 2", "step 4"],
        ["a/bleu", "12.25", "22.12"],
        ["a/odd", "–", "nan"],
    ):
        assert row in rows, row


def test_where_nothing_compares_with_the_score_nothing_is_compared(tmp_path):
    scored = _heldout(2)
    del scored["loss/bits_per_byte"]
    page = _write(tmp_path, [_train(1), _train(2), scored], **ARGUMENTS)
    assert "bars" not in _figure_names(page)
    assert "bits per byte" not in _Page(page).text
    assert "2.3456" in page


def test_of_many_evaluations_some_are_shown_and_the_last_is(tmp_path):
    records = [_heldout(s, **{"metric/a/bleu": float(s)}) for s in range(1, 31)]
    page = _write(tmp_path, [_train(30), *records])
    (head,) = [row for row in _cells(page) if row[0] == "metric"]
    assert head[-1] == "step 30"
    assert len(head) == 7
    assert "6 of 30 evaluations are shown" in page


@pytest.mark.fast
def test_the_ledger_tells_of_spills_and_of_steps_taken_again(tmp_path):
    plain = _ledger(tmp_path, [_train(1)])
    assert "next best" not in plain
    assert "ROW_BUDGET" not in plain
    records = [
        _train(step, **{"router/spilled_fraction": 0.02 * step})
        | {"perf/steps_taken_again": step}
        for step in (1, 2, 3)
    ]
    words = _ledger(tmp_path, records)
    assert "4.00 % of the choices found their expert full" in words  # (2 + 4 + 6) / 3
    assert "3 steps sent a device more rows than ROW_BUDGET" in words
