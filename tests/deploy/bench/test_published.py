"""The tables that NVIDIA published: every cell as the specification prints it."""

from __future__ import annotations

import pytest

from txl_deploy.bench import published
from txl_deploy.bench.published import number, published_tables
from txl_train.errors import ArtifactError


def tables_of(text):
    """Yield (section, heading or None, columns, rows) of each table below "### Results"."""
    lines = iter(text[text.index("\n### Results\n") :].splitlines())
    section, heading = "", None
    columns: list[str] = []
    rows: list[tuple[str, ...]] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            cells = tuple(cell.strip().strip("*") for cell in line.strip().strip("|").split("|"))
            if not columns:
                columns = list(cells)
            elif not set("".join(cells)) <= set("-:"):
                rows.append(cells)
            continue
        if rows:
            yield section, heading, tuple(columns), tuple(rows)
        columns, rows = [], []
        if line.startswith("##### "):
            section, heading = line[6:], None
        elif line.startswith("**"):
            heading = line.strip().strip("*")


def test_every_cell_is_the_specifications(shared_dir):
    printed = list(tables_of((shared_dir / "SPEC-nvidia-transformer-xl-readme.md").read_text(encoding="utf-8")))
    ours = {(t.section, t.columns, t.rows) for t in published_tables()}
    assert len(printed) == len(ours) == 14
    assert {(section, columns, rows) for section, _, columns, rows in printed} == ours
    headings = {(rows, heading) for _, heading, _, rows in printed if heading}
    assert {(t.rows, t.heading) for t in published_tables() if t.key.startswith("inference")} == headings


def test_a_gpu_is_chosen():
    assert [t.heading for t in published_tables("t4")] == [
        "FP16, pure Python",
        "FP16, TorchScript",
        "FP32, pure Python",
        "FP32, TorchScript",
    ]
    assert {t.gpu for t in published_tables("v100")} == {"v100"}


def test_each_says_whose_it_is_and_how_it_was_measured():
    for table in published_tables():
        assert table.publisher == "NVIDIA"
        assert "github.com/NVIDIA" in table.source
        assert table.conditions


def test_speedups_and_latencies_fit_the_throughputs_beside_them():
    for table in published_tables():
        if table.key.startswith("inference"):
            for size, length, _, rate, latency, *_ in table.rows:
                tokens = number(size) * number(length)
                assert tokens / number(rate) * 1e3 == pytest.approx(number(latency), rel=0.01)


def test_what_was_not_measured_is_no_number():
    assert number("3,346.3") == 3346.3
    assert number("N/A") is None


@pytest.mark.parametrize("text", ["{}", "[]", '{"schema": "txl.published", "schema_version": 2, "tables": []}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"broken\.json"):
        published._tables(tmp_path)
