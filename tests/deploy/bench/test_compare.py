"""What may be compared, what a comparison says, and the command that ends with 1 on a regression."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

from tests.deploy.bench.samples import result_of, rows_of
from txl_deploy.bench.compare import compare_paired, compare_results, compare_rows, match, parse_threshold
from txl_deploy.bench.result import BenchResult, Proof
from txl_deploy.bench.stats import LatencySummary
from txl_deploy.cli.bench_compare import command
from txl_train.errors import ArtifactError, UsageError, ValidationError

N = 700
TURNS = (50,) * 14


def with_samples(row, samples, **changes):
    seconds = sum(samples) / 1e3
    return dataclasses.replace(
        row,
        samples_ms=tuple(float(x) for x in samples),
        latency=LatencySummary.of(samples),
        tokens_per_s=row.n_tokens / seconds,
        **{"block_sizes": TURNS, "valid": True, "invalid_reasons": (), **changes},
    )


@pytest.fixture(scope="module")
def row():
    return rows_of((1,), with_reference=False)[0]


def noise(seed, factor=1.0):
    return factor * np.random.default_rng(seed).lognormal(0, 0.05, N)


def moods():
    """Return what the machine does to all that run in a turn."""
    return np.repeat(np.random.default_rng(9).lognormal(0, 0.2, len(TURNS)), 50)


@pytest.mark.parametrize("p", [50, 99, None])
def test_the_same_latencies_differ_by_nothing(row, p):
    ratio = compare_rows(with_samples(row, noise(1)), with_samples(row, noise(2)), p=p)
    assert ratio.verdict == "no difference"
    assert not ratio.regression


@pytest.mark.parametrize(("factor", "verdict", "regression"), [(1.1, "slower", True), (0.9, "faster", False), (1.015, "slower", False)])
def test_ten_percent_more_is_a_regression_and_one_percent_is_let_pass(row, factor, verdict, regression):
    ratio = compare_rows(with_samples(row, noise(1)), with_samples(row, noise(2, factor)))
    assert ratio.verdict == verdict
    assert ratio.regression is regression
    assert ratio.interval_95[0] < factor < ratio.interval_95[1]


@pytest.mark.parametrize("p", [50, None])
def test_taking_turns_shows_what_the_moods_of_the_machine_hide(row, p):
    a, b = with_samples(row, moods() * noise(1)), with_samples(row, moods() * noise(2, 1.05))
    paired = compare_paired(a, b, p=p)
    assert paired.paired
    assert paired.verdict == "slower"
    assert paired.interval_95[0] < 1.05 < paired.interval_95[1]
    with pytest.raises(ValidationError, match="no interval"):
        compare_rows(a, b, p=None)


def test_the_paired_interval_holds_the_truth_as_often_as_it_says(row):
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(40):
        mood = np.repeat(generator.lognormal(0, 0.1, len(TURNS)), 50)
        own = np.repeat(generator.lognormal(0, 0.01, (2, len(TURNS))), 50, axis=1)  # what a turn does to one of them alone
        a, b = (dataclasses.replace(row, samples_ms=tuple(mood * o * generator.lognormal(0, 0.05, N)), block_sizes=TURNS) for o in own)
        low, high = compare_paired(a, b, p=None).interval_95
        hits += low <= 1 <= high
    assert hits >= 34  # 38 of 40 nominally; 3 standard errors are 4


def test_rows_that_did_not_take_turns_are_not_paired(row):
    a = with_samples(row, noise(1))
    with pytest.raises(ValidationError, match="did not take turns"):
        compare_paired(a, dataclasses.replace(a, block_sizes=(100,) * 7))
    with pytest.raises(ValidationError, match="took 7 turns, but"):
        compare_paired(*[dataclasses.replace(a, block_sizes=(100,) * 7)] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundary": "step_with_token_h2d"}, "different boundaries: step_device_resident and step_with_token_h2d"),
        ({"tgt_len": 8}, "different lengths: tgt 4, .* and tgt 8"),
        ({"batch_size": 16}, "no row in common: .* at batch size 1 against .* at batch size 16"),
        ({"dtype": "fp16"}, "no row in common"),
    ],
)
def test_rows_of_something_else_are_never_compared(row, change, message):
    with pytest.raises(ValidationError, match=message):
        match(result_of([row]), result_of([dataclasses.replace(row, **change)]))


def test_another_text_is_never_compared_and_another_machine_on_request(row):
    result = result_of([row])
    with pytest.raises(ValidationError, match="different texts: `split` is test in one and valid"):
        match(result, dataclasses.replace(result, workload={**result.workload, "split": "valid"}))
    for change in ({"threads": 2}, {"cpu": "another"}, {"gpus": [{"name": "a GPU"}]}):
        other = dataclasses.replace(result, environment={**result.environment, **change})
        with pytest.raises(ValidationError, match="different machines"):
            match(result, other)
        assert len(match(result, other, across_machines=True)) == 1


def test_rows_that_stand_twice_are_not_guessed_at(row):
    with pytest.raises(ValidationError, match="more than once"):
        match(result_of([row, row]), result_of([row]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"valid": False, "invalid_reasons": ("measured for 1.0 s, shorter than 10 s",)}, "the new row is INVALID: measured for 1.0 s"),
        ({"verified": False}, "perplexity of the new row"),
    ],
)
def test_a_row_that_is_not_to_be_believed_is_not_compared(row, changes, reason):
    old, new = with_samples(row, noise(1)), with_samples(row, noise(2), **changes)
    (pair,) = compare_results(result_of([old]), result_of([new]))
    assert pair.ratio is None
    assert reason in pair.reason


@pytest.mark.parametrize(("text", "expected"), [("2%", 0.02), ("0.05", 0.05), (" 10 % ", 0.1), ("0", 0.0)])
def test_a_threshold_is_a_share_or_percent(text, expected):
    assert parse_threshold(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "much", "-1%", "nan", "inf"])
def test_a_wrong_threshold_is_an_error_with_a_remedy(text):
    with pytest.raises(UsageError) as caught:
        parse_threshold(text)
    assert "--max-regression" in caught.value.remedy


@pytest.fixture
def files(row, tmp_path):
    def write(name, samples, **changes):
        result_of([with_samples(row, samples, **changes)]).write(tmp_path / name)
        return str(tmp_path / name)

    return write


def run(*arguments):
    return CliRunner().invoke(command, arguments)


def test_the_command_prints_the_ratio_and_ends_with_0_where_nothing_regressed(files):
    result = run(files("a.json", noise(1)), files("b.json", noise(2)))
    assert result.exit_code == 0
    assert "no difference, unpaired, n 700 and 700" in result.output


def test_the_command_fails_on_a_regression_and_says_so_in_the_file_too(files, tmp_path):
    out = tmp_path / "compare.json"
    result = run(files("a.json", noise(1)), files("b.json", noise(2, 1.2)), "--out", str(out), "--percentile", "99")
    assert isinstance(result.exception, ValidationError)
    assert "REGRESSION beyond 2.0%" in result.output
    document = json.loads(out.read_text())
    assert document["schema"] == "txl.benchmark_comparison"
    assert document["rows"][0]["regression"] is True
    assert document["rows"][0]["comparison"]["quantity"] == "p99"


def test_what_is_let_pass_is_the_users_choice(files):
    assert run(files("a.json", noise(1)), files("b.json", noise(2, 1.2)), "--max-regression", "30%").exit_code == 0


def test_the_command_prints_one_json_document(files):
    document = json.loads(run(files("a.json", noise(1)), files("b.json", noise(2)), "--json", "--percentile", "mean").stdout)
    assert document["rows"][0]["comparison"]["verdict"] == "no difference"


def test_nothing_compared_is_a_failure(files):
    invalid = files("b.json", noise(2), valid=False, invalid_reasons=("drift",))
    result = run(files("a.json", noise(1)), invalid)
    assert isinstance(result.exception, ValidationError)
    assert "the new row is INVALID: drift" in result.exception.message


def test_a_file_that_is_none_keeps_its_own_error(files, tmp_path):
    assert isinstance(run(files("a.json", noise(1)), str(tmp_path / "absent.json")).exception, ArtifactError)
    assert BenchResult.read(tmp_path / "a.json").rows


INVALID = {"valid": False, "invalid_reasons": ("drift",)}


def write(path, *rows, **changes):
    dataclasses.replace(result_of(rows), **changes).write(path)
    return str(path)


def test_one_row_that_cannot_be_compared_fails_unless_it_is_accepted(row, tmp_path):
    sizes = [dataclasses.replace(row, batch_size=size) for size in (1, 2)]
    old = write(tmp_path / "a.json", *(with_samples(r, noise(1)) for r in sizes))
    new = write(tmp_path / "b.json", with_samples(sizes[0], noise(2)), with_samples(sizes[1], noise(2), **INVALID))
    result = run(old, new)
    assert isinstance(result.exception, ValidationError)
    assert "1 of 2 rows could not be compared" in result.exception.message
    assert "--accept-invalid" in result.exception.remedy
    accepted = run(old, new, "--accept-invalid")
    assert accepted.exit_code == 0
    assert "not compared: the new row is INVALID: drift" in accepted.output


def test_a_row_of_another_model_is_not_accepted_as_noise_is(row, tmp_path):
    sizes = [dataclasses.replace(row, batch_size=size) for size in (1, 2)]
    old = write(tmp_path / "a.json", *(with_samples(r, noise(1)) for r in sizes))
    other = {"verified": False, "valid": False, "invalid_reasons": ("the perplexity is another",)}
    new = write(tmp_path / "b.json", with_samples(sizes[0], noise(2)), with_samples(sizes[1], noise(2), **other))
    assert isinstance(run(old, new, "--accept-invalid").exception, ValidationError)


def test_rows_of_one_file_alone_are_listed_and_are_no_failure(row, tmp_path):
    sizes = [with_samples(dataclasses.replace(row, batch_size=size), noise(size)) for size in (1, 2, 4)]
    old, new = write(tmp_path / "a.json", *sizes[:2]), write(tmp_path / "b.json", sizes[0], sizes[2])
    result = run(old, new)
    assert result.exit_code == 0
    assert "batch    2  not compared: only the old file has it" in result.output
    assert "batch    4  not compared: only the new file has it" in result.output
    assert "2 of 3 rows stand in one file only; that alone is no failure." in result.output
    rows = json.loads(run(old, new, "--json").stdout)["rows"]
    assert [(r["batch_size"], r["in_files"]) for r in rows] == [(1, [True, True]), (2, [True, False]), (4, [False, True])]


def test_what_was_measured_without_proof_stays_marked(row, tmp_path):
    old = write(tmp_path / "a.json", with_samples(row, noise(1)), unvalidated=True)
    new = write(tmp_path / "b.json", with_samples(row, noise(2), proof=Proof(kind="none", reason="no receipt")), unvalidated=True)
    sound = write(tmp_path / "c.json", with_samples(row, noise(2)))
    text = run(old, new).output
    assert "UNVALIDATED: a.json" in text
    assert "UNVALIDATED: b.json" in text
    document = json.loads(run(sound, new, "--json").stdout)
    assert document["unvalidated"] == [False, True]
    assert document["rows"][0]["unvalidated"] is True
    assert "UNVALIDATED" not in run(sound, sound).output


def test_the_comparison_is_never_written_over_its_inputs_or_what_is_no_result(files, tmp_path):
    old, new = files("a.json", noise(1)), files("b.json", noise(2))
    before = (tmp_path / "a.json").read_bytes()
    assert isinstance(run(old, new, "--out", str(tmp_path / "." / "a.json")).exception, UsageError)
    assert (tmp_path / "a.json").read_bytes() == before
    (tmp_path / "text").write_text("somebody's")
    assert isinstance(run(old, new, "--out", str(tmp_path / "text")).exception, UsageError)
    assert (tmp_path / "text").read_text() == "somebody's"
