"""The result file: what is written is read back, and what does not add up is refused."""

from __future__ import annotations

import json

import pytest

from tests.deploy.bench.samples import SHA, result_of, rows_of
from txl_deploy.bench.result import BenchResult
from txl_train.errors import ArtifactError, EnvironmentUnfitError


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "benchmark.json"
    result_of(rows_of((1, 2))).write(path)
    return path


def rewrite(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_result_is_read_back_as_it_was_written(written):
    assert BenchResult.read(written) == result_of(rows_of((1, 2)))


def test_a_row_has_the_fields_that_readers_rely_on(written):
    row = json.loads(written.read_text())["rows"][1]
    assert {"runtime", "provider", "dtype", "memory", "batch_size", "tgt_len", "mem_len", "boundary", "n", "tokens_per_s"} <= row.keys()
    assert {"latency_ms_p50", "latency_ms_p90", "latency_ms_p95", "latency_ms_p99", "latency_ms_mean", "latency_ms_min"} <= row.keys()
    assert {"perplexity", "nll_nats_per_token", "n_tokens", "perplexity_rel_diff", "verified"} <= row.keys()
    assert row["artifact"] == {"name": "model-onnx", "manifest_sha256": SHA, "parent_manifest_sha256": None}
    assert len(row["samples_ms"]) == row["n"] == 40


def test_each_row_stands_on_one_line_of_the_file(written):
    assert sum('"samples_ms"' in line for line in written.read_text().splitlines()) == 4


def test_writing_into_a_folder_that_is_a_file_says_so(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(EnvironmentUnfitError):
        result_of(rows_of((1,))).write(tmp_path / "taken" / "benchmark.json")


def test_all_rows_verified_makes_a_verified_result():
    assert result_of(rows_of()).verified is True


def test_one_failed_row_makes_a_failed_result():
    result = result_of(rows_of() + rows_of((8,), nll_offset=1e-3))
    assert result.verified is False
    assert [(row.runtime, row.batch_size) for row in result.failed] == [("onnx", 8)]


def test_rows_that_were_not_checked_leave_the_result_open():
    assert result_of(rows_of(with_reference=False)).verified is None
    assert result_of([]).verified is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["rows"][0].update(latency_ms_p99=0.1), "`latency_ms_p99` is 0.1, but the samples say"),
        (lambda d: d["rows"][0]["samples_ms"].pop(), "but the samples say"),
        (lambda d: d["rows"][0].update(tokens_per_s=1e6), "`tokens_per_s` is"),
        (lambda d: d["rows"][0].update(perplexity=2.0), "`perplexity` is 2.0"),
        (lambda d: d["rows"][0].pop("verified"), "'verified' is missing"),
        (lambda d: d["rows"][0].update(verified="yes"), "neither true nor false"),
        (lambda d: d["rows"][0].update(batch_size=1.5), "no count"),
        (lambda d: d["rows"][0].update(runtime=7), "no text"),
        (lambda d: d["rows"][0].update(samples_ms=["fast"]), "no number"),
        (lambda d: d["rows"][0].update(samples_ms=[]), "at least one sample"),
        (lambda d: d.update(rows={}, percentiles=None), "damaged"),
        (lambda d: d.pop("environment"), "'environment' is missing"),
        (lambda d: d.update(percentiles=[0]), "strictly within"),
        (lambda d: d.update(schema_version=99), "schema version 99"),
        (lambda d: d.update(schema="other"), "no result of `txl bench`"),
    ],
)
def test_a_document_that_does_not_add_up_is_refused(written, change, message):
    rewrite(written, change)
    with pytest.raises(ArtifactError) as caught:
        BenchResult.read(written)
    assert message in caught.value.message
    assert caught.value.remedy


def test_a_number_that_no_float_can_hold_is_refused(written):
    text = written.read_text()
    written.write_text(text.replace('"schema_version"', '"environment_after": {"load": 1e999}, "schema_version"', 1))
    with pytest.raises(ArtifactError, match="1e999 is too large for a number"):
        BenchResult.read(written)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"{", b"\xff\xfe", b'{"schema": "txl.benchmark"'])
def test_what_is_no_such_document_is_refused(tmp_path, content):
    path = tmp_path / "benchmark.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        BenchResult.read(path)


def test_a_missing_file_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(ArtifactError, match="There is no result file") as caught:
        BenchResult.read(tmp_path / "benchmark.json")
    assert "txl bench" in caught.value.remedy
