"""The scripts that measure training: the stability test of the specification, and curves side by side."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from txl_train.checkpoint import load_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

MODEL = ["--n-layer", "1", "--n-head", "2", "--d-head", "4", "--d-model", "8", "--d-inner", "8", "--mem-len", "6", "--no-adaptive"]
STEPS = ["--batch-size", "4", "--tgt-len", "5", "--log-interval", "2", "--lr", "0.02", "--warmup-step", "2"]
EVALUATION = ["--eval-tgt-len", "5", "--eval-batch-size", "4"]
SMALL = [*MODEL, *STEPS, *EVALUATION]


@pytest.fixture(autouse=True)
def scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def plain_environment() -> dict[str, str]:
    """No settings from outside, and one thread."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TXL_")} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = np.random.default_rng(0).choice(["a", "b", "c", "dd", "ee"], size=700)
    folder = tmp_path / "text"
    folder.mkdir()
    for split, part in (("train", words[:500]), ("valid", words[500:600]), ("test", words[600:])):
        (folder / f"{split}.txt").write_text(" ".join(part) + "\n", encoding="utf-8")
    return folder


def stability_command(folder: Path, *options: str) -> list[str]:
    own, _, of_training = " ".join(options).partition(" -- ")
    paths = ["--work-dir", str(folder / "W"), "--out", str(folder / "record")]
    return [sys.executable, str(BENCHMARKS / "stability.py"), *own.split(), *paths, "--", *SMALL, *of_training.split()]


def stability(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        stability_command(folder, *options), capture_output=True, text=True, timeout=300, check=False, env=plain_environment()
    )


def record_in(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return document


def rows_of(table: str) -> list[list[str]]:
    """Return the cells of the rows that hold figures."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if re.match(r"\|\s*[0-9]", line)]


# The stability test


@pytest.mark.slow
def test_two_seeds_give_the_specifications_tables_and_are_not_trained_twice(text: Path, tmp_path: Path) -> None:
    options = ["--seeds", "2", "--jobs", "2", "--", "--dataset", "text", "--data", str(text), "--max-step", "6", "--eval-interval", "3"]
    first = stability(tmp_path, *options)
    assert first.returncode == 0, first.stderr

    record, table = record_in(tmp_path), (tmp_path / "record.md").read_text(encoding="utf-8")
    assert [seed["seed"] for seed in record["seeds"]] == [1, 2]
    valid = [[point["perplexity"] for point in seed["valid"]] for seed in record["seeds"]]
    for seed, values in enumerate(valid, start=1):
        lines = (tmp_path / "W" / f"seed-{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert values == [line["perplexity"] for line in map(json.loads, lines) if line["kind"] == "valid"]
    assert valid[0] != valid[1], "each seed should train on its own"
    tested = [seed["test"]["perplexity"] for seed in record["seeds"]]
    expected = [[3, *(values[0] for values in valid)], [6, *(values[1] for values in valid)], [None, *tested]]
    for row, (step, a, b) in zip([*record["valid_by_step"], record["test"]], expected):
        assert row.get("step") == step
        figures = [row[key] for key in ("mean", "standard_deviation", "minimum", "maximum", "median")]
        assert figures == pytest.approx([(a + b) / 2, abs(a - b) / 2**0.5, min(a, b), max(a, b), (a + b) / 2])
    assert "|**Training step**|**Average**|**Standard deviation**|**Minimum**|**Maximum**|**Median**|" in table
    shown = rows_of(table)
    assert [len(row) for row in shown] == [6, 6, 5]
    assert shown[0][:3] == ["3", f"{statistics.fmean(v[0] for v in valid):.2f}", f"{statistics.stdev(v[0] for v in valid):.5f}"]
    assert {"cpu", "packages", "git_commit"} <= record["environment"].keys()
    assert record["settings"]["train"]["max_step"] == 6
    assert str(tmp_path) not in json.dumps(record) + table, "where things lie is nobody's business"

    began = (tmp_path / "W" / "seed-1" / "checkpoint_last.pt").stat().st_mtime_ns
    second = stability(tmp_path, *options)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("finished before") == 2
    assert (tmp_path / "W" / "seed-1" / "checkpoint_last.pt").stat().st_mtime_ns == began
    assert record_in(tmp_path)["valid_by_step"] == record["valid_by_step"]

    other = stability(tmp_path, *options, "--lr", "0.03")
    assert other.returncode == 2
    assert "optim.lr was 0.02 and would be 0.03" in other.stderr


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of one seed on characters, stopped by Ctrl-C at its first evaluation and continued."""
    folder = tmp_path_factory.mktemp("one-seed")
    letters = np.random.default_rng(0).choice(list("abc_"), size=700)
    for split, part in (("train", letters[:500]), ("valid", letters[500:600]), ("test", letters[600:])):
        (folder / f"{split}.txt").write_text(" ".join(part), encoding="utf-8")
    options = ["--seeds", "1", "--", "--dataset", "text8", "--data", str(folder), "--max-step", "1200", "--eval-interval", "200"]
    options += ["--log-interval", "100"]

    command = stability_command(folder, *options)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=plain_environment())
    metrics = folder / "W" / "seed-1" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"valid"' in metrics.read_text(encoding="utf-8")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "The same command goes on from here." in said
    assert not (folder / "record.json").exists()
    assert 200 <= load_checkpoint(folder / "W" / "seed-1" / "checkpoint_last.pt").progress["step"] < 1200

    resumed = stability(folder, *options)
    assert resumed.returncode == 0, resumed.stderr
    assert "seed 1: training, continued" in resumed.stderr
    return folder


@pytest.mark.slow
def test_ctrl_c_saves_the_seed_and_the_same_command_goes_on_to_the_end(one_seed: Path) -> None:
    (seed,) = record_in(one_seed)["seeds"]
    assert (seed["ending"], seed["steps"]) == ("finished", 1200)
    assert [point["step"] for point in seed["valid"]] == list(range(200, 1201, 200))


@pytest.mark.slow
def test_one_seed_of_characters_is_told_in_bits_and_has_no_deviation(one_seed: Path) -> None:
    record, table = record_in(one_seed), (one_seed / "record.md").read_text(encoding="utf-8")
    point = record["seeds"][0]["valid"][0]
    assert point["bits_per_char"] == pytest.approx(point["nll_nats_per_token"] / np.log(2))
    assert record["valid_by_step"][0]["standard_deviation"] is None
    assert "Validation bits per character" in table
    assert "There is one seed, so there is no deviation." in table
    assert rows_of(table)[0] == ["200", f"{point['bits_per_char']:.5f}", "–", *[f"{point['bits_per_char']:.5f}"] * 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "`--seeds` must be 1 or more"),
        (["--seeds", "2", "--", "--seed", "3"], "`--seed` is not for this script"),
        (["--seeds", "2", "--", "--work_dir=here"], "`--work-dir` is not for this script"),
        (["--seeds", "2", "--", "--set", "seed=3"], "this script's own to set"),
        (["--seeds", "2", "--", "--n-layre", "3"], "--n-layer"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], message: str
) -> None:
    import stability as script

    monkeypatch.chdir(tmp_path)
    assert script.main(options) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_seeds_that_did_not_come_as_far_are_counted(tmp_path: Path) -> None:
    import stability as script

    record = {
        "theme": "tiny",
        "finished_at": "2026-01-31T00:00:00+00:00",
        "command": "python benchmarks/stability.py",
        "figure": "perplexity",
        "start": {"device": "cpu", "parameters": 1234, "dataset": "text"},
        "environment": {"gpus": [], "cores_usable": 2},
        "seeds": [
            {"seed": 1, "status": "finished", "ending": "finished", "steps": 20, "train_seconds": 3.0},
            {"seed": 2, "status": "finished", "ending": "max_minutes", "steps": 10, "train_seconds": 3.0},
            {"seed": 3, "status": "failed", "reason": "exit code 1: Training diverged."},
        ],
        "valid_by_step": [{"step": 10, **script.summary([30.0, 34.0])}, {"step": 20, **script.summary([25.0])}],
        "test": script.summary([25.5, 33.5]),
    }
    table = script.tables(record, "record")
    assert "| 10 | 32.00 | 2.82843 | 30.00 | 34.00 | 32.00 |" in table
    assert "| 20 (1 of 2 seeds) | 25.00 | – | 25.00 | 25.00 | 25.00 |" in table
    assert "The time limit ended seed 2 early." in table
    assert "Seed 3 is not in the tables. It failed: exit code 1: Training diverged." in table


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("--data=/home/somebody/wikitext-103", "--data=…/wikitext-103"),
        ("Error: /srv/a/b.txt is missing", "Error: …/b.txt is missing"),
        ("txl train --data data/wikitext-103", "txl train --data data/wikitext-103"),
        ("https://example.org/a/b at 3 tokens/s", "https://example.org/a/b at 3 tokens/s"),
    ],
)
def test_records_do_not_tell_where_things_lie(said: str, kept: str) -> None:
    from running import without_folders

    assert without_folders({"what": [said, 3]}) == {"what": [kept, 3]}


# Curves


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A work folder with the records of a run that was killed while it wrote, and of steps that were done twice."""
    folder = tmp_path / "run"
    folder.mkdir()
    records = [{"kind": "train", "step": step, "loss_nats_per_token": 9.0 - step / 100} for step in range(10, 201, 10)]
    records.insert(10, {"kind": "valid", "step": 100, "nll_nats_per_token": 99.0})
    records += [{"kind": "valid", "step": step, "nll_nats_per_token": 8.0 - step / 100} for step in (100, 200)]
    text = "".join(json.dumps(record) + "\n" for record in sorted(records, key=lambda record: record["step"]))
    (folder / "metrics.jsonl").write_text(text + '{"kind": "tr', encoding="utf-8")
    return folder


def test_a_run_and_another_programs_curve_stand_side_by_side(capsys: pytest.CaptureFixture[str], tmp_path: Path, run_folder: Path) -> None:
    import curves

    other = tmp_path / "other.csv"
    with open(other, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train_loss", "valid_nll"])
        writer.writerows([step, 9.5 - step / 100, 8.0 - step / 100 + 0.1 if step in (100, 150, 200) else ""] for step in range(1, 201))

    assert curves.main([f"ours={run_folder}", "--other", f"theirs={other}", "--out", str(tmp_path / "picture.png")]) == 0

    assert capsys.readouterr().out.split() == [str(tmp_path / "picture.png"), str(tmp_path / "picture.md")]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "picture.md").read_text(encoding="utf-8")
    assert "| step | ours: training loss | theirs: training loss | difference | ours: validation perplexity |" in table
    ours, theirs = 9.0 - np.mean(range(10, 101, 10)) / 100, 9.5 - np.mean(range(1, 101)) / 100
    assert rows_of(table) == [
        ["100", f"{ours:.4f}", f"{theirs:.4f}", f"{theirs - ours:+.4f}", f"{np.exp(7):,.2f}", f"{np.exp(7.1):,.2f}", "+10.52%"],
        ["200", f"{ours - 1:.4f}", f"{theirs - 1:.4f}", f"{theirs - ours:+.4f}", f"{np.exp(6):,.2f}", f"{np.exp(6.1):,.2f}", "+10.52%"],
    ]


def test_curves_of_json_without_evaluations_are_compared_by_their_training_loss(tmp_path: Path, run_folder: Path) -> None:
    import curves

    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"step": step, "train_loss": 7.0} for step in (20, 40)]), encoding="utf-8")
    assert curves.main([str(run_folder), "--other", str(other), "--out", str(tmp_path / "picture")]) == 0
    assert [row[:3] for row in rows_of((tmp_path / "picture.md").read_text(encoding="utf-8"))] == [
        ["20", "8.8500", "7.0000"],
        ["40", "8.6500", "7.0000"],
    ]


def test_smoothing_takes_noise_and_keeps_level_and_slope() -> None:
    import curves

    noise = np.random.default_rng(0).normal(0, 0.1, 200)
    points = [(10 * i, 5.0 - i / 100 + float(noise[i])) for i in range(200)]
    smooth = curves.smoothed(points, half_life=100)
    assert [step for step, _ in smooth] == [step for step, _ in points]
    middle = np.array([value - (5.0 - i / 100) for i, (_, value) in enumerate(smooth)])[40:160]
    assert np.abs(middle).max() < 0.06
    assert [value for _, value in curves.smoothed([(1, 3.0), (2, 3.0), (30, 3.0)], 5)] == pytest.approx([3.0] * 3)
    assert curves.smoothed([], 5) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("step,loss\n1,2\n", "has the column loss"),
        ("train_loss\n2\n", "is no curve"),
        ("step,train_loss\n1,two\n", "is no curve"),
        ("step,train_loss,valid_nll\n1,,\n", "holds no losses"),
    ],
)
def test_a_file_that_is_no_curve_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run_folder: Path, content: str, message: str
) -> None:
    import curves

    other = tmp_path / "other.csv"
    other.write_text(content, encoding="utf-8")
    assert curves.main([str(run_folder), "--other", str(other), "--out", str(tmp_path / "picture")]) == 2
    assert f"{other} {message}" in capsys.readouterr().err
    assert not (tmp_path / "picture.png").exists()


def test_words_and_characters_are_not_compared_and_nothing_of_anothers_is_written_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run_folder: Path
) -> None:
    import curves

    characters = tmp_path / "characters.jsonl"
    characters.write_text('{"kind": "train", "step": 10, "loss_nats_per_token": 1.0, "bits_per_char": 1.4427}\n', encoding="utf-8")
    assert curves.main([str(run_folder), str(characters), "--out", str(tmp_path / "picture")]) == 2
    assert "Some runs count in characters" in capsys.readouterr().err

    (tmp_path / "notes.md").write_text("Notes of somebody\n", encoding="utf-8")
    assert curves.main([str(run_folder), "--out", str(tmp_path / "notes.md")]) == 2
    assert (tmp_path / "notes.md").read_text(encoding="utf-8") == "Notes of somebody\n"
