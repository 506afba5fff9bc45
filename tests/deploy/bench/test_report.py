"""The table on the terminal and the page: what they show, what they mark, what they refuse to load."""

from __future__ import annotations

import builtins
import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest

from tests.deploy.bench.samples import result_of, rows_of
from txl_deploy.bench import plots, plots_bench
from txl_deploy.bench.published import published_tables
from txl_deploy.bench.report import (
    Findings,
    Training,
    disturbances,
    flat_facts,
    format_markdown,
    format_ms,
    format_perplexity,
    format_table,
    gather,
    group_series,
    read_training,
    scores,
    write_report,
)
from txl_deploy.bench.stats import LatencySummary
from txl_train.errors import ArtifactError, EnvironmentUnfitError, UsageError

# --- the table -------------------------------------------------------------------------------------------------------------------


def test_the_table_has_the_specifications_columns_and_one_line_a_row():
    lines = format_table(rows_of()).splitlines()
    assert lines[0].split() == ["Batch", "Seq.", "Memory", "Throughput", "Latency"]
    titles = "Runtime size length length tok/s avg ms 50% 90% 95% 99% n Perplexity Verified Valid"
    assert lines[1].split() == titles.split()
    body = lines[3:9]
    assert [line.split()[0] for line in body] == ["PyTorch"] * 3 + ["ONNX"] * 3
    assert [line.split()[1] for line in body[:3]] == ["1", "2", "4"]


def test_the_tables_columns_are_aligned():
    lines = format_table(rows_of((1, 32, 256))).splitlines()
    assert {line.index("  40  ") for line in lines[3:9]} == {lines[1].index("   n  ")}


def test_a_percentile_from_too_few_samples_is_marked_and_explained():
    text = format_table(rows_of((1,), n=100))
    reference = text.splitlines()[3].split()
    assert [cell.endswith("*") for cell in reference[6:10]] == [False, False, True, True]
    assert "* p95 from 100 samples: 130 make it sound." in text
    assert "* p99 from 100 samples: 459 are the least, 662 make it sound." in text


def test_a_note_is_told_once_with_the_batch_sizes_it_is_about():
    text = format_table([dataclasses.replace(row, notes=("the text is short",)) for row in rows_of((1, 2))])
    assert text.count("the text is short (batch size 1, 2)") == 1


@pytest.mark.parametrize(("busy", "count"), [(None, 0), (0.05, 0), (0.5, 1)])
def test_processors_that_others_keep_busy_are_told(busy, count):
    sentences = disturbances({"cpu_busy_before": busy})
    assert len(sentences) == count
    assert all("50%" in sentence for sentence in sentences)


def test_enough_samples_need_no_mark():
    assert "*" not in format_table(rows_of((1,), n=662))


def test_only_the_percentiles_asked_for_are_shown():
    assert format_table(rows_of((1,)), (50, 99)).splitlines()[1].split()[7:10] == ["50%", "99%", "n"]


def test_verdicts_on_model_and_figures_stand_in_the_last_columns():
    def verdict(rows, line):
        unjudged = [dataclasses.replace(row, valid=None, invalid_reasons=()) for row in rows]
        cells = re.split(r"  +", format_table(unjudged).splitlines()[line])
        assert cells[-1] == "not judged"
        return cells[-2]

    assert verdict(rows_of((1,)), 3) == "reference"
    assert verdict(rows_of((1,)), 4) == "yes, equal"
    assert verdict(rows_of((1,), nll_offset=1e-3), 4) == "NO 1e-03"
    assert verdict(rows_of((1,), with_reference=False), 3) == "not checked"


@pytest.mark.parametrize(("value", "text"), [(0.0412, "0.041"), (1.2345, "1.23"), (99.999, "100.00"), (1234.56, "1,234.6")])
def test_milliseconds_keep_three_digits(value, text):
    assert format_ms(value) == text


@pytest.mark.parametrize(("value", "text"), [(23.3041, "23.304"), (2345.67, "2,345.7"), (1e9, "1e+09"), (None, "not finite")])
def test_perplexities_are_written_like_the_specifications(value, text):
    assert format_perplexity(value) == text


def test_labels_name_only_what_tells_series_apart():
    assert [series.label for series in group_series(rows_of((1,)))] == ["PyTorch (reference)", "ONNX Runtime"]
    onnx = rows_of((1,))[1]
    twice = [onnx, dataclasses.replace(onnx, memory="hidden"), dataclasses.replace(onnx, dtype="fp16")]
    assert [series.label for series in group_series(twice)] == ["ONNX Runtime FP32 kv", "ONNX Runtime FP32 hidden", "ONNX Runtime FP16"]


# --- what a folder holds ---------------------------------------------------------------------------------------------------------


def write_metrics(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


TRAIN = [
    {"kind": "train", "step": step, "loss_nats_per_token": 6 - step / 100, "perplexity": 1.0, "train_seconds": step}
    for step in (10, 20, 30)
]
VALID = [{"kind": "valid", "step": 30, "nll_nats_per_token": 5.5, "perplexity": 1.0}]


def test_the_training_curve_is_read_from_the_metrics(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", TRAIN + VALID + [{"kind": "test", "step": 30, "nll_nats_per_token": 5.4}])
    training = read_training(tmp_path / "metrics.jsonl")
    assert training == Training([(10, 5.9), (20, 5.8), (30, 5.7)], [(30, 5.5)], (30, 5.4), in_bits=False, seconds=30)


def test_after_a_resumption_the_later_record_of_a_step_counts(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", [*TRAIN, {"kind": "train", "step": 20, "loss_nats_per_token": 1.0}])
    assert read_training(tmp_path / "metrics.jsonl").train == [(10, 5.9), (20, 1.0)]


def test_a_last_line_cut_short_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, TRAIN)
    path.write_text(path.read_text() + '{"kind": "tra')
    assert len(read_training(path).train) == 3


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "tra\n' + json.dumps(TRAIN[0]) + "\n")
    with pytest.raises(ArtifactError, match="Line 1"):
        read_training(path)


def test_a_loss_that_is_not_finite_is_left_out(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", [*TRAIN, {"kind": "train", "step": 40, "loss_nats_per_token": None}])
    assert len(read_training(tmp_path / "metrics.jsonl").train) == 3


@pytest.fixture
def work_dir(tmp_path):
    return fill(tmp_path)


def fill(tmp_path):
    """Write one of each file that a report is made of."""
    result_of(rows_of()).write(tmp_path / "benchmark.json")
    write_metrics(tmp_path / "metrics.jsonl", TRAIN + VALID)
    (tmp_path / "parity-onnx.json").write_text(
        json.dumps({"passed": True, "reason": "all within bounds", "max_abs_delta_nll": 1e-6, "segments": [{}]})
    )
    (tmp_path / "eval-onnx.json").write_text(
        json.dumps({"runtime": "onnx", "split": "test", "perplexity": 31.5, "n_tokens": 2000, "mem_len": 8})
    )
    splits = {"train": {"tokens": 12345, "types": 99, "oov": 0}}
    baselines = {"dataset": "pydoc", "splits": splits, "unigram": {"perplexity": 345.25, "split": "test", "n_tokens": 2000}}
    (tmp_path / "baselines.json").write_text(json.dumps(baselines))
    return tmp_path


def test_a_folder_is_searched_for_everything_that_can_be_shown(work_dir):
    found = gather(work_dir)
    assert [name for name, _ in found.benches] == ["benchmark.json"]
    assert [name for name, _ in found.parities] == ["parity-onnx.json"]
    assert [(score.model, score.perplexity) for score in scores(found)] == [("ONNX Runtime", 31.5), ("unigram", 345.25)]
    assert found.training.best == (30, 5.5)


def test_a_named_result_replaces_the_folders(work_dir, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "elsewhere.json"
    result_of(rows_of((1,))).write(other)
    assert [name for name, _ in gather(work_dir, [other]).benches] == ["elsewhere.json"]


def test_an_empty_folder_is_nothing_to_report(tmp_path):
    with pytest.raises(UsageError, match="nothing to report") as caught:
        gather(tmp_path)
    assert "txl bench" in caught.value.remedy


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match="There is no folder"):
        gather(tmp_path / "absent")


@pytest.mark.parametrize("name", ["parity-onnx.json", "baselines.json", "eval-onnx.json", "benchmark.json"])
def test_a_damaged_file_is_an_error_that_names_it(work_dir, name):
    (work_dir / name).write_text("[")
    with pytest.raises(ArtifactError, match=name):
        gather(work_dir)


def test_facts_are_flattened_and_empty_ones_left_out():
    nested = {"a": 1, "b": {"c": None, "d": [1, 2]}, "e": [], "f": [{"g": "x"}, {"g": "y"}]}
    assert flat_facts(nested) == [("a", 1), ("b: d", [1, 2]), ("f 1: g", "x"), ("f 2: g", "y")]


# --- the page --------------------------------------------------------------------------------------------------------------------


class _Page(html.parser.HTMLParser):
    """Collects what a page would load, the text it shows, and whether its elements are closed in order."""

    void = frozenset({"meta", "source", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.shown: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "poster", "action")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.shown.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.shown))


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """Return a function that writes a report and parses it."""
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    pytest.importorskip("jinja2", reason="needs the extra `report`")

    def page(found: Findings) -> tuple[_Page, str, list[str]]:
        folder = tmp_path_factory.mktemp("report")
        paths = write_report(found, folder / "report.html")
        text = paths[0].read_text(encoding="utf-8")
        for path in paths[1:]:
            assert path.read_bytes().startswith(b"\x89PNG")
        return _Page(text), text, [path.name for path in paths]

    return page


@pytest.fixture(scope="module")
def full_page(page_of, tmp_path_factory):
    return page_of(gather(fill(tmp_path_factory.mktemp("work"))))


def test_the_page_is_whole_and_loads_nothing_from_anywhere(full_page):
    page, text, names = full_page
    assert names == ["report.html", "training.png", "latency.png", "throughput.png", "distributions.png"]
    assert page.loads
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.loads)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_page_tells_what_was_measured_whether_to_believe_it_and_how_to_repeat_it(full_page):
    page, _, _ = full_page
    for expected in (
        "All 6 measurements are of the model that was trained",
        "ONNX Runtime · fake · FP32 · key/value memory",
        "Throughput Avg (tok/s)",
        "pydoc, test split · A processor · 2 cores · 1 thread · 2026-01-01",
        "step_device_resident",
        "txl bench --artifact W/onnx --out W/benchmark.json",
        "all within bounds",
        "345.250",
        "31.500",
        "12,345",
        "nearest rank",
    ):
        assert expected in page.text, expected


def test_a_failed_row_is_told_before_anything_else_and_marked_where_it_stands(page_of):
    page, text, _ = page_of(Findings(benches=[("b.json", result_of(rows_of((1, 2), nll_offset=1e-3)))]))
    assert page.text.index("Do not use: 2 of 4 measurements") < page.text.index("Speed")
    assert text.count('<tr class="failed">') == 2
    assert "All 4 measurements" not in page.text


def test_rows_that_were_not_checked_are_not_called_verified(page_of):
    page, _, _ = page_of(Findings(benches=[("b.json", result_of(rows_of((1,), with_reference=False)))]))
    assert "1 of 1 measurements were not checked" in page.text
    assert "are of the model that was trained" not in page.text


def test_a_disturbed_measurement_is_told_beside_the_verdict(page_of):
    result = dataclasses.replace(
        result_of(rows_of((1,))), environment={"cpu": "A", "cores_usable": 1, "threads": 1, "gpus": [], "cpu_busy_before": 0.9}
    )
    page, _, _ = page_of(Findings(benches=[("b.json", result)]))
    assert "Other processes kept 90%" in page.text[: page.text.index("Speed")]


@pytest.mark.parametrize("environment", [{}, {"gpus": "none", "cpu": None, "threads": "two", "time_utc": 5}])
def test_a_result_that_says_little_of_its_machine_is_shown_nevertheless(page_of, environment):
    result = dataclasses.replace(result_of(rows_of((1,))), environment=environment, workload={}, settings={"percentiles": 7})
    page, _, _ = page_of(Findings(benches=[("b.json", result)]))
    assert "unknown processor" in page.text


def test_a_speedup_is_clear_only_where_the_medians_intervals_lie_apart(page_of):
    reference, onnx = rows_of((1,))

    def with_samples(row, samples):
        sound = {"valid": True, "invalid_reasons": ()}
        return dataclasses.replace(row, samples_ms=tuple(samples), latency=LatencySummary.of(samples), **sound)

    random = np.random.default_rng(0)
    baseline = with_samples(reference, random.uniform(3.0, 3.5, 200))
    for low, high, expected in ((1.0, 1.1, "faster"), (9.0, 9.1, "slower"), (3.0, 3.5, "unclear")):
        result = result_of([baseline, with_samples(onnx, random.uniform(low, high, 200))])
        _, text, _ = page_of(Findings(benches=[("b.json", result)]))
        assert f'class="gain {expected}"' in text


def test_one_batch_size_needs_no_curve_over_batch_sizes(page_of):
    _, _, names = page_of(Findings(benches=[("b.json", result_of(rows_of((4,))))]))
    assert names == ["report.html", "latency.png", "distributions.png"]


def test_several_results_have_charts_of_their_own(page_of):
    benches = [("a.json", result_of(rows_of((1,)))), ("a.json", result_of(rows_of((1,))))]
    _, _, names = page_of(Findings(benches=benches))
    assert names == ["report.html", "latency-1.png", "distributions-1.png", "latency-2.png", "distributions-2.png"]


def test_characters_are_scored_in_bits(page_of):
    training = Training([(10, 2.0)], [(10, 1.5)], None, in_bits=True, seconds=None)
    page, _, _ = page_of(Findings(training=training))
    assert "bits per character, validation" in page.text
    assert "2.164" in page.text  # 1.5 / ln 2
    assert "perplexity, validation" not in page.text


def test_unvalidated_figures_are_stamped_on_the_page_and_on_their_charts(page_of):
    sound = result_of(rows_of((1,)))
    page, text, _ = page_of(Findings(benches=[("b.json", dataclasses.replace(sound, unvalidated=True))]))
    assert "UNVALIDATED" in page.text[: page.text.index("In short")]
    assert text.count('<span class="mark bad">UNVALIDATED</span>') == 2
    point = plots_bench.Point(batch_size=1, p50_ms=1.0, p99_ms=2.0, tokens_per_s=64e3)
    paint = plots_bench.latency_over_batch([plots_bench.Line("a", [point])])
    assert plots.draw("n", "t", "d", paint, stamp=plots.STAMP).png != plots.draw("n", "t", "d", paint).png
    assert "UNVALIDATED" not in page_of(Findings(benches=[("b.json", sound)]))[0].text


def test_an_invalid_row_is_marked_with_its_reason_on_page_table_and_markdown(page_of):
    rows = [dataclasses.replace(row, valid=True, invalid_reasons=()) for row in rows_of((1, 2))]
    rows[0] = dataclasses.replace(rows[0], valid=False, invalid_reasons=("it drifts by 9 %",))
    found = Findings(benches=[("b.json", result_of(rows))])
    page, text, _ = page_of(found)
    assert "3 of 4 rows are VALID" in page.text
    assert text.count('<tr class="invalid">') == 1
    assert "it drifts by 9 %" in page.text
    assert "INVALID: FP32, PyTorch, batch size 1: it drifts by 9 %." in format_table(rows)
    assert "it drifts by 9 %" in format_markdown(found)


def test_published_tables_stand_in_a_section_of_their_own(page_of):
    found = Findings(benches=[("b.json", result_of(rows_of((1,))))])
    assert "NVIDIA" not in page_of(found)[0].text
    text = format_markdown(found, published_tables("t4"))
    assert text.index("Measured by `txl bench") < text.index("Published by NVIDIA, not measured here")
    assert "18,912.0" in text[text.index("Published by NVIDIA") :]


def test_what_comes_from_files_is_escaped(page_of):
    nasty = '<script>alert("x")</script>'
    result = result_of(rows_of((1,)), command=nasty)
    parity = ("<i>p</i>", {"passed": False, "reason": nasty, "worst": {nasty: nasty}})
    page, text, _ = page_of(Findings(benches=[(nasty, result)], parities=[parity]))
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert "<script" not in text


def test_the_same_chart_is_the_same_bytes():
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    paint = plots_bench.latency_over_batch(
        [plots_bench.Line("a", [plots_bench.Point(batch_size=1, p50_ms=1.0, p99_ms=2.0, tokens_per_s=64e3)])]
    )
    assert plots.draw("n", "t", "d", paint) == plots.draw("n", "t", "d", paint)


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path, missing):
    if missing == "jinja2":
        pytest.importorskip("matplotlib", reason="needs the extra `report`")
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentUnfitError) as caught:
        write_report(Findings(benches=[("b.json", result_of(rows_of((1,))))]), tmp_path / "report.html")
    assert "txl[report]" in caught.value.remedy
    assert not list(tmp_path.iterdir())
