"""Several processes read a text to the same last bit as one, in little memory, and say what went wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from txl_train.data import scan as scan_module
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.layouts import rule_of
from txl_train.data.scan import DROPPED, PORTION_BYTES, n_processes, scan_text
from txl_train.errors import DataError, EnvironmentUnfitError

Ids = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 400 KB in which words become rarer, and some appear late."""
    numbers = np.random.default_rng(0).zipf(1.3, 70_000).clip(max=5_000)
    words = [f"w{n}" if n % 7 else f"\u00fc{n}" for n in numbers.tolist()]
    path = tmp_path_factory.mktemp("scan") / "train.txt"
    path.write_text("\n".join(" ".join(words[i : i + 23]) for i in range(0, len(words), 23)), encoding="utf-8")
    return path


def scanned(
    path: Path, folder: Path, processes: int, *, dataset: str = "text", subwords: bool = False
) -> tuple[list[str], Ids, bytes, int]:
    """Read a text and write it with its symbols' numbers as ids."""
    rule = rule_of(path, get_dataset(dataset), subwords=subwords)
    target = folder / "ids"
    target.write_bytes(b"header")
    with scan_text(path, rule, spool_dir=folder / "spool", processes=processes) as scan:
        ids = None if subwords else np.arange(len(scan.symbols), dtype=np.int64)
        n_tokens = scan.write(target, 6, ids, np.dtype("<i4"))
        assert n_tokens == scan.n_tokens
        return scan.symbols, scan.counts, target.read_bytes(), scan.n_words


@pytest.mark.parametrize("subwords", [False, True])
def test_three_processes_find_what_one_finds(text: Path, tmp_path: Path, subwords: bool) -> None:
    if subwords:
        pytest.importorskip("tiktoken")
    one, three = (scanned(text, tmp_path, n, subwords=subwords) for n in (1, 3))
    assert one[0] == three[0]
    assert (one[1] == three[1]).all()
    assert one[2:] == three[2:]
    assert one[2].startswith(b"header")
    if not subwords:
        words = [token for line in text.read_text(encoding="utf-8").split("\n") for token in [*line.split(), "<eos>"]]
        assert one[0] == list(dict.fromkeys(words))
        assert [one[0][i] for i in np.frombuffer(one[2][6:], dtype="<i4")] == words
        assert not os.listdir(tmp_path / "spool")


def test_a_vocabulary_counted_by_several_is_that_of_one(text: Path, tmp_path: Path) -> None:
    for name in ("valid.txt", "test.txt"):
        (text.parent / name).write_text("w1 unseen\n")
    corpora = [load_corpus(text.parent, get_dataset("text"), cache_dir=tmp_path / str(n), processes=n) for n in (1, 4)]
    assert corpora[0].vocabulary == corpora[1].vocabulary
    entries = [sorted(path for path in (tmp_path / str(n)).iterdir() if path.suffix == ".ids") for n in (1, 4)]
    assert [path.read_bytes() for path in entries[0]] == [path.read_bytes() for path in entries[1]]
    assert (corpora[0].ids("train") == corpora[1].ids("train")).all()


def test_symbols_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("97 98\n99 98\n97\n")
    with scan_text(path, rule_of(path, get_dataset("enwik8")), spool_dir=tmp_path, processes=2) as scan:
        assert scan.symbols == ["97", "98", "10", "99"]
        target = tmp_path / "ids"
        target.write_bytes(b"")
        assert scan.write(target, 0, np.array([5, 6, DROPPED, 7]), np.dtype("<u2")) == 5
    assert np.frombuffer(target.read_bytes(), dtype="<u2").tolist() == [5, 6, 7, 6, 5]


def test_small_texts_are_read_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("small")
    assert n_processes(path, None) == 1
    assert n_processes(path, 3) == 3
    os.truncate(path, 2 * PORTION_BYTES)
    assert n_processes(path, None) == min(2, len(os.sched_getaffinity(0)))


def test_what_another_process_cannot_read_is_named_here(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"good words\n" * 1000 + b"na\xefve\n")
    with (
        pytest.raises(DataError, match="line 1001: not UTF-8"),
        scan_text(path, rule_of(path, get_dataset("text")), spool_dir=tmp_path, processes=2),
    ):
        pass


def test_a_process_that_is_killed_is_an_error_and_leaves_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_START", f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    with (
        pytest.raises(EnvironmentUnfitError, match="ended with -9 without an answer"),
        scan_text(text, rule_of(text, get_dataset("text")), spool_dir=tmp_path, processes=2),
    ):
        pass
    assert not os.listdir(tmp_path)


def test_a_full_disk_in_another_process_is_an_error_of_the_cache(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("valid.txt", "test.txt"):
        (text.parent / name).write_text("w1\n")
    monkeypatch.setattr(
        scan_module,
        "_START",
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); " + scan_module._START,
    )
    with pytest.raises(EnvironmentUnfitError, match="cannot be used"):
        load_corpus(text.parent, get_dataset("text"), cache_dir=tmp_path / "cache", processes=2)
    assert not list((tmp_path / "cache").iterdir())


def test_a_program_without_a_main_guard_may_read_with_several_processes(text: Path, tmp_path: Path) -> None:
    """The other processes do not run the program's own main module again, as multiprocessing's would."""
    for name in ("valid.txt", "test.txt"):
        (text.parent / name).write_text("w1\n")
    program = tmp_path / "program.py"
    program.write_text(
        "from txl_train.data.corpus import load_corpus\nfrom txl_train.data.datasets import get_dataset\n"
        f"corpus = load_corpus({str(text.parent)!r}, get_dataset('text'), cache_dir={str(tmp_path / 'cache')!r}, processes=3)\n"
        "print(corpus.n_tokens('train'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{70_000 + 3_044}\n", "")


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    line = b" ".join(b"word%d" % (i % 500) for i in range(1000)) + b"\n"
    path.write_bytes(line * 800)  # 6 MB, of which a list of its words would take 50
    rule = rule_of(path, get_dataset("text"))
    target = tmp_path / "ids"
    target.write_bytes(b"")
    tracemalloc.start()
    with scan_text(path, rule, spool_dir=tmp_path, processes=1) as scan:
        scan.write(target, 0, np.arange(len(scan.symbols), dtype=np.int64), np.dtype("<u2"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert target.stat().st_size == 2 * 800 * 1001
    assert peak < 10e6


@pytest.mark.slow
def test_a_text_larger_than_the_memory_allowed_can_be_read(tmp_path: Path) -> None:
    """A process that may have 80 MB more than it starts with encodes a text of 120 MB."""
    folder = tmp_path / "text"
    folder.mkdir()
    block = b" ".join(b"word%d" % (i % 5000) for i in range(100_000)) + b"\n"
    with (folder / "train.txt").open("wb") as file:
        while file.tell() < 120e6:
            file.write(block)
    for name in ("valid.txt", "test.txt"):
        (folder / name).write_text("word1\n")
    program = (
        "import resource, sys\nfrom txl_train.data.corpus import load_corpus\nfrom txl_train.data.datasets import get_dataset\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 80_000_000,) * 2)\n"
        "corpus = load_corpus(sys.argv[1], get_dataset('text'), cache_dir=sys.argv[2], processes=1)\nprint(corpus.n_tokens('test'))\n"
    )
    command: list[Any] = [sys.executable, "-c", program, folder, tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2\n", "")
