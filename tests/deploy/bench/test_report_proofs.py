"""What the report says of proofs and comparisons: what lacks one is marked, what proves nothing is not counted, what is slower is told."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from tests.deploy.bench.samples import SHA, result_of, rows_of
from tests.deploy.test_receipt import receipt
from txl_deploy.bench.compare import Ratio
from txl_deploy.bench.report import Findings, format_markdown, format_summary, gather, write_report
from txl_deploy.bench.result import Proof
from txl_train.files import file_sha256


@pytest.fixture
def page_of(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    pytest.importorskip("jinja2", reason="needs the extra `report`")
    return lambda found: write_report(found, tmp_path / "out" / "report.html")[0].read_text(encoding="utf-8")


def valid_rows(sizes=(1,)):
    return [dataclasses.replace(row, valid=True, invalid_reasons=()) for row in rows_of(sizes)]


def ratio(level):
    return Ratio(quantity="p50", ratio=level, interval_95=(level - 0.01, level + 0.01), n_a=700, n_b=700, paired=True).to_dict()


def test_rows_without_proof_are_stamped_on_the_terminal_and_in_markdown():
    reference, onnx = valid_rows()
    found = Findings(benches=[("b.json", result_of([reference, dataclasses.replace(onnx, proof=Proof(kind="none"))]))])
    text = format_summary(found)
    assert text.startswith("UNVALIDATED: nothing proves")
    assert [line.split()[0] for line in text.splitlines() if line.endswith("VALID, UNVALIDATED")] == ["ONNX"]
    assert "**UNVALIDATED" in format_markdown(found)
    assert "UNVALIDATED" not in format_summary(Findings(benches=[("b.json", result_of([reference, onnx]))]))


@pytest.mark.parametrize(
    ("changes", "mark"),
    [({"verified": False}, "FAILED"), ({"valid": False, "invalid_reasons": ("drift",)}, "INVALID")],
)
def test_side_by_side_there_is_no_speed_of_a_row_that_is_not_to_be_believed(page_of, changes, mark):
    reference, onnx = (dataclasses.replace(row, block_sizes=()) for row in valid_rows())  # measured one after the other
    assert 'class="gain' in page_of(Findings(benches=[("b.json", result_of([reference, onnx]))]))
    of_own = page_of(Findings(benches=[("b.json", result_of([reference, dataclasses.replace(onnx, **changes)]))]))
    of_base = page_of(Findings(benches=[("b.json", result_of([dataclasses.replace(reference, **changes), onnx]))]))
    assert 'class="gain' not in of_own + of_base
    assert f'<span class="mark bad">{mark}</span></td>' in of_own
    assert f'<span class="mark bad">baseline {mark}</span>' in of_base


def test_rows_that_took_turns_have_a_speed_even_where_the_milliseconds_are_invalid(page_of):
    turns = [dataclasses.replace(row, block_sizes=(len(row.samples_ms) // 10,) * 10) for row in valid_rows()]
    reference, onnx = (dataclasses.replace(row, valid=False, invalid_reasons=("drift",)) for row in turns)
    assert 'class="gain faster">' in page_of(Findings(benches=[("b.json", result_of([reference, onnx]))]))
    failed = dataclasses.replace(onnx, verified=False)
    assert 'class="gain' not in page_of(Findings(benches=[("b.json", result_of([reference, failed]))]))


def test_a_comparison_of_two_that_took_turns_is_shown_and_a_regression_told_first(page_of):
    entries = ({"batch_size": 1, **ratio(1.2)}, {"batch_size": 2, **ratio(0.9)})
    found = Findings(benches=[("b.json", dataclasses.replace(result_of(valid_rows((1, 2))), comparisons=entries))])
    page = page_of(found)
    assert "REGRESSION: 1 of 2 rows" in page[: page.index("<h2>Speed")]
    assert "Latency of ONNX Runtime over PyTorch (reference)" in page
    assert re.search(r"<td>1.2000</td><td>1.1900 to 1.2100</td><td><span class=.mark bad.>slower, REGRESSION", page)
    assert "0.8900 to 0.9100" in format_markdown(found)


def test_a_file_of_comparisons_is_a_table_with_what_could_not_be_compared(page_of, tmp_path):
    row = {"runtime": "onnx", "dtype": "fp16", "batch_size": 4, "comparison": None, "reason": "the new row is INVALID: drift"}
    document = {"schema": "txl.benchmark_comparison", "files": ["a.json", "b.json"], "unvalidated": [True, False], "rows": [row]}
    path = tmp_path / "c.json"
    path.write_text(json.dumps(document))
    found = gather(None, files=[path])
    page = page_of(found)
    assert "Latency of b.json over a.json" in page
    assert "not compared: the new row is INVALID: drift" in page
    assert "UNVALIDATED: a.json was measured without proof" in page
    assert "not compared: the new row is INVALID" in format_markdown(found)


def put(folder, manifest, **changes):
    folder.mkdir()
    (folder / "manifest.json").write_text(manifest)
    sha256 = changes.pop("manifest_sha256", file_sha256(folder / "manifest.json"))
    receipt(manifest_sha256=sha256, **changes).write(folder / "receipt.json")


def test_only_receipts_of_what_was_measured_count_and_each_once(tmp_path, page_of):
    result_of(valid_rows()).write(tmp_path / "benchmark.json")
    put(tmp_path / "measured", "{}", manifest_sha256=SHA)
    put(tmp_path / "copy", "{}", manifest_sha256=SHA, command="txl eval again")
    put(tmp_path / "unrelated", "{}")
    put(tmp_path / "stale", "{}", manifest_sha256="9" * 64)
    found = gather(tmp_path)
    assert len(found.receipts) == 2
    assert [(name, reason.split(":")[0]) for name, reason in found.other_receipts] == [
        ("stale/receipt.json", "stale"),
        ("unrelated/receipt.json", "unrelated"),
    ]
    page = page_of(found)
    assert "1 of 1 receipts prove" in page
    assert "Receipts that prove none of this" in page


def test_without_measurements_a_receipt_counts_beside_its_own_artifact_only(tmp_path):
    put(tmp_path / "own", "{}")
    put(tmp_path / "stale", "{}", manifest_sha256="9" * 64)
    found = gather(tmp_path)
    assert len(found.receipts) == 1
    assert [name for name, _ in found.other_receipts] == ["stale/receipt.json"]


def test_many_samples_do_not_make_the_charts_larger_than_some(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    from txl_deploy.bench import plots, plots_bench

    def size(n):
        samples = [1 + (i * 7919 % n) / n for i in range(n)]
        point = plots_bench.Point(batch_size=1, p50_ms=1.5, p99_ms=2.0, tokens_per_s=1e3, samples_ms=samples)
        return len(plots.draw("n", "t", "d", plots_bench.distributions([plots_bench.Line("a", [point])])).svg_light)

    assert size(20000) < 1.2 * size(400)
