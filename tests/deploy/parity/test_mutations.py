"""Every mistake of the field's history is found by the check that has to find it, none is flagged where it is switched off, and the table
in the docs is that of the code."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from txl_deploy.cli.main import cli
from txl_deploy.parity import self_test_table
from txl_deploy.parity.mutations import CHECKS, MUTATIONS, Check
from txl_deploy.parity.self_test import Finding, Row, SelfTest, run

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "mutations.md"

THE_FIELD = [
    "sum instead of product in the tail",
    "cluster order",
    "zero instead of empty memory",
    "off-by-one memory shift",
    "FP16 positions",
    "stale memory",
    "wrong clamp",
    "same_length off by one",
    "trimmed tail",
    "provider fallback",
    "mislabelled runtime",
    "aliased state buffers",
    "LayerNorm in FP16 with large inputs",
    "swapped layers",
]


def finding(check: Check = "parity", *, failed: bool = True, measured: float | None = 8.0) -> Finding:
    bound = None if measured is None else 2.0
    return Finding(check=check, failed=failed, quantity="a token's nll, nats", measured=measured, bound=bound, reason="it differs")


def row(found: Finding, control: Finding | None = None) -> Row:
    off = finding(failed=False, measured=0.2) if control is None else control
    return Row(mutation=MUTATIONS[0], example="a model", found={found.check: [found]}, control={"parity": [off]})


def test_all_mistakes_of_the_field_are_there() -> None:
    assert [mutation.name for mutation in MUTATIONS] == THE_FIELD
    assert {mutation.expected for mutation in MUTATIONS} <= set(CHECKS)


def test_what_a_check_measures_must_be_twice_its_bound_to_count() -> None:
    assert row(finding(measured=8.0)).passed
    assert not row(finding(measured=3.9)).passed
    assert not row(finding(failed=False, measured=8.0)).passed
    assert row(finding(measured=float("nan"))).passed, "what is not finite is beyond every bound"


def test_a_mistake_found_by_another_check_alone_is_not_found() -> None:
    assert not row(finding("receipt")).passed


def test_one_text_in_which_it_is_not_found_is_enough_to_fail() -> None:
    both = dataclasses.replace(row(finding()), found={"parity": [finding(), finding(measured=3.0)]})
    assert not both.passed


def test_a_check_that_flags_what_is_switched_off_fails() -> None:
    bad = row(finding(), control=finding(measured=2.1))
    assert not bad.passed
    told = list(self_test_table.faults(SelfTest(rows=(bad,), examples=())))
    assert told == [f"{THE_FIELD[0]}, switched off, was flagged by txl parity at 1.1 its bound: it differs"]


@pytest.mark.parametrize(
    ("ratio", "told"), [(None, "∞"), (float("inf"), "∞"), (0.0312, "0.031"), (7.49, "7.5"), (99.6, "100"), (318801.0, "320,000")]
)
def test_ratios_are_told_to_two_digits(ratio: float | None, told: str) -> None:
    assert self_test_table.times(ratio) == told


def table_rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins with `heading`."""
    lines = text[text.index(heading) :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_table_in_the_docs_has_all_mutations_found_and_none_flagged() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = table_rows(text, "| " + " | ".join(self_test_table.COLUMNS) + " |")
    assert [row[0] for row in rows] == THE_FIELD, f"write it anew: {self_test_table.COMMAND}"
    for mutation, cells in zip(MUTATIONS, rows):
        assert cells[1] == mutation.where
        expected = {"parity": "txl parity", "receipt": "receipt", "claims": "claim audit", "verify": "txl verify", "export": "txl export"}
        assert cells[2].split(", ")[0] == expected[mutation.expected]
        assert cells[5] == "exact" or float(cells[5].replace(",", "")) >= 2
        assert cells[6].startswith("not flagged")


def test_the_docs_tell_what_the_code_does() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert self_test_table.COMMAND in text
    assert [row[0] for row in table_rows(text, "| mutation | txl parity |")] == THE_FIELD
    for mutation in MUTATIONS:
        assert f"{mutation.what}. *Where it happened:* {mutation.history}." in text
    assert all(what in text for what in CHECKS.values())
    assert not re.search(r"/tmp|/home", text)


@pytest.mark.slow
def test_every_mutation_is_found_by_its_check_and_none_where_it_is_switched_off(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "mutations.md"
    result = CliRunner().invoke(cli, ["parity", "--self-test", "--json", "--out", str(out)], catch_exceptions=False)
    document = json.loads(result.stdout)
    assert {row["name"]: row.get("caught") for row in document["mutations"]} == dict.fromkeys(THE_FIELD, True)
    assert {row["name"]: row.get("control_passed") for row in document["mutations"]} == dict.fromkeys(THE_FIELD, True)
    assert result.exit_code == 0
    assert document["passed"]
    assert [row[0] for row in table_rows(out.read_text(encoding="utf-8"), "| mutation | made in |")] == THE_FIELD


@pytest.mark.slow
def test_a_users_model_is_told_which_mistakes_it_cannot_have(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from tests.support import small_config, write_checkpoint

    checkpoint = tmp_path / "checkpoint_best.pt"
    write_checkpoint(checkpoint, small_config())
    chosen = [mutation for mutation in MUTATIONS if mutation.name in ("cluster order", "same_length off by one", "off-by-one memory shift")]
    outcome = run(checkpoint, mutations=chosen)
    told = {row.mutation.name: row.skipped for row in outcome.rows}
    assert told == {
        "cluster order": "the model has no tail clusters",
        "off-by-one memory shift": None,
        "same_length off by one": "the model has no `same_length`",
    }
    assert outcome.passed
