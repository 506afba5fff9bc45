"""`txl eval` in several processes: the result of one, said by one, and one reason where it cannot be."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import Exports
from tests.processes import in_processes
from txl_deploy.cli.main import main

Capture = pytest.CaptureFixture[str]

ROUNDING = 5e-8
"""Relative: the sums are float64 (tests/train/test_evaluate.py), but float32 kernels may round single tokens otherwise in another batch."""


def run_eval(cache: str, arguments: list[str]) -> tuple[int, str, str]:
    """What each process of a group runs: exit code, standard output, standard error."""
    os.environ["TXL_CACHE_DIR"] = cache
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["eval", *arguments])
    return code, out.getvalue(), err.getvalue()


def together(tmp_path: Path, processes: int, exports: Exports, *arguments: object) -> list[tuple[int, str, str]]:
    return in_processes(processes, run_eval, str(tmp_path / "cache"), ["--checkpoint", str(exports.checkpoint), *map(str, arguments)])


def alone(capsys: Capture, exports: Exports, *arguments: object) -> dict[str, Any]:
    assert main(["eval", "--checkpoint", str(exports.checkpoint), *map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 4), (3, 5)])
def test_every_token_is_scored_once_by_some_process(
    exports: Exports, capsys: Capture, tmp_path: Path, processes: int, batch_size: int
) -> None:
    expected = alone(capsys, exports, "--batch-size", batch_size)
    (code, out, _), *others = together(tmp_path, processes, exports, "--batch-size", batch_size, "--json")
    assert code == 0
    assert [(code, out) for code, out, _ in others] == [(0, "")] * (processes - 1)
    document = json.loads(out)
    assert document["n_tokens"] == expected["n_tokens"]
    assert document["nll_nats_sum"] == pytest.approx(expected["nll_nats_sum"], rel=ROUNDING)
    assert document["processes"] == processes
    assert [part["n_tokens"] > 0 for part in document["by_process"]] == [True] * processes


def test_nvidias_mean_is_that_of_three_columns_and_of_two(exports: Exports, capsys: Capture, tmp_path: Path) -> None:
    options = ["--protocol", "nvidia-2023", "--batch-size", 5, "--tgt-len", 4, "--mem-len", 6]
    whole = alone(capsys, exports, *options)
    document = json.loads(together(tmp_path, 2, exports, *options, "--json")[0][1])
    sizes = [part["n_tokens"] for part in document["by_process"]]
    assert sizes == [3 * whole["n_tokens"] // 5, 2 * whole["n_tokens"] // 5]
    means = [part["nll_nats_per_token"] for part in document["by_process"]]
    assert document["nll_nats_per_token"] == pytest.approx(sum(means) / 2, rel=1e-7)
    assert document["nll_nats_sum"] == pytest.approx(whole["nll_nats_sum"], rel=ROUNDING)
    assert document["nll_nats_per_token"] != pytest.approx(whole["nll_nats_per_token"], rel=1e-6)


def test_only_the_first_process_says_something_unless_all_are_to_log(exports: Exports, tmp_path: Path) -> None:
    options = ["--batch-size", 4, "--work-dir", tmp_path / "W"]
    (_, out, _), (_, other, log) = together(tmp_path, 2, exports, *options)
    assert "| test loss" in out
    assert (other, log) == ("", "")
    assert [path.name for path in (tmp_path / "W").iterdir()] == ["eval_log.log"]
    (_, out, _), (_, other, log) = together(tmp_path, 2, exports, *options, "--log-all-ranks")
    assert other == ""
    assert "1: | test loss" in log
    assert sorted(path.name for path in (tmp_path / "W").iterdir()) == ["eval_log.log", "eval_log.rank1.log"]


@pytest.mark.parametrize(
    ("arguments", "expected", "fragment"),
    [
        (["--fp16", "--dtype", "fp32"], 2, "contradict each other"),
        (["--data", "nowhere"], 2, "no folder nowhere"),
        (["--batch-size", "1"], 2, "too few to give each of 2 processes one"),
        (["--manual", "word3 word4"], 2, "too few to give each of 2 processes one"),
        (["--target-perplexity", "1"], 1, "above the target 1"),
    ],
)
def test_an_error_is_reported_once(exports: Exports, tmp_path: Path, arguments: list[str], expected: int, fragment: str) -> None:
    (code, _, err), (other_code, _, other_err) = together(tmp_path, 2, exports, *arguments)
    assert code == expected
    assert other_code == (0 if expected == 1 else expected), "the other one has done its part where only the target is missed"
    assert err.count("Error:") == 1
    assert fragment in err
    assert "Error" not in other_err


def fail_in_one(rank: int) -> tuple[int, str]:
    """What each process of a group runs: `all_or_none` over something that fails in one of them."""
    import click
    import torch

    from txl_deploy.cli.together import all_or_none, first_alone_reports
    from txl_train.distributed import join, world_of
    from txl_train.errors import EnvironmentUnfitError

    world = world_of()

    def action() -> int:
        if world.rank == rank:
            raise EnvironmentUnfitError("The disk of this machine is full.")
        return world.rank

    try:
        with first_alone_reports(world), join(world, torch.device("cpu")):
            assert all_or_none(world, lambda: world.rank) == world.rank
            all_or_none(world, action)
    except EnvironmentUnfitError as error:
        return error.exit_code, error.message
    except click.exceptions.Exit as stop:
        return stop.exit_code, ""
    return 0, "nothing happened"


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_in_one_process_is_reported_by_it_and_ends_all(rank: int) -> None:
    results = in_processes(2, fail_in_one, rank)
    assert results[rank] == (3, "The disk of this machine is full.")
    assert results[1 - rank] == (3, "")


@pytest.mark.slow
def test_torchrun_starts_the_processes(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    txl = [sys.executable, "-c", "import sys; from txl_deploy.cli.main import main; sys.exit(main())"]
    options = ["eval", "--checkpoint", str(exports.checkpoint), "--batch-size", "4", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TXL_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([*torchrun, *txl, *options], capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["processes"] == 2
    assert document["nll_nats_sum"] == pytest.approx(alone(capsys, exports, "--batch-size", 4)["nll_nats_sum"], rel=ROUNDING)
