"""NVIDIA's two ways to evaluate, against a restatement of them that computes one number at a time and cuts the text as their code does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.naive_txl import naive_forward, naive_nll, random_parameters
from tests.support import build_model, small_config
from txl_train.config import MemoryKind, ModelConfig
from txl_train.distributed import World
from txl_train.errors import DataError, UsageError
from txl_train.evaluate import EvalResult, ModelStepper, ProcessScore, evaluate
from txl_train.model.inference import with_lengths
from txl_train.protocols import (
    NVIDIA,
    NvidiaSegments,
    ProtocolName,
    UnevenStepper,
    clock_warm_up,
    mean_nll,
    nvidia_words,
    own_streams,
)

LOSS_TOLERANCE = 2e-6
"""Nats per token: float32 against float64."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated, and how."""

    protocol: ProtocolName = "nvidia-2023"
    n_tokens: int = 41
    batch_size: int = 3
    tgt_len: int = 4
    mem_len: int = 6
    ext_len: int = 0
    max_size: int | None = None
    repeat: int = 1
    processes: int = 1
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return small_config(
            mem_len=self.mem_len, ext_len=self.ext_len, same_length_rule=NVIDIA[self.protocol].same_length_rule, **self.model
        )

    @property
    def ids(self) -> np.ndarray:
        return np.random.default_rng(7).integers(0, 23, self.n_tokens)

    @property
    def warm_up_len(self) -> int:
        return -(-self.mem_len // self.tgt_len) * self.tgt_len if self.protocol == "nvidia-2023" else 0


def restated(case: Evaluation) -> tuple[float, int, int]:
    """Return loss, tokens scored and segments as NVIDIA's code would: tensors with the rows first, lists of what is kept."""
    config = case.config
    parameters = random_parameters(config, 0)
    rows = case.n_tokens // case.batch_size
    data = case.ids[: rows * case.batch_size].reshape(case.batch_size, rows).T
    w = case.warm_up_len
    if w:
        data = np.concatenate([np.roll(data, (w, 1), (0, 1))[:w], data])
    losses, n_scored, n_segments = [], 0, 0
    for part in torch.from_numpy(data).chunk(case.processes, dim=1):
        columns = part.numpy()
        total, weight, memory, n_segments = 0.0, 0, None, 0
        for _ in range(case.repeat):
            for index, i in enumerate(range(0, len(columns) - 1, case.tgt_len)):
                if case.max_size is not None and index >= case.max_size:
                    break
                seq_len = min(case.tgt_len, len(columns) - 1 - i)
                inputs = columns[max(0, i - case.ext_len) : i + seq_len].T
                targets = columns[i + 1 : i + 1 + seq_len].T
                hidden, memory = naive_forward(config, parameters, inputs, memory, tgt_len=seq_len)
                n_segments += 1
                if i >= w:
                    total += seq_len * float(naive_nll(config, parameters, hidden, targets).mean())
                    weight += seq_len
                    n_scored += targets.size
        losses.append(total / weight)
    return float(np.mean(losses)), n_scored, n_segments


def ours(case: Evaluation) -> tuple[float, int, int]:
    """Return the same by this toolkit, all processes one after the other."""
    config = case.config
    model = build_model(config)
    results = []
    for rank in range(case.processes):
        segments = NvidiaSegments(
            case.ids,
            batch_size=case.batch_size,
            tgt_len=case.tgt_len,
            ext_len=case.ext_len,
            warm_up_len=case.warm_up_len,
            columns=own_streams(case.protocol, case.batch_size, World(rank, case.processes)),
            max_segments=case.max_size,
        )
        plain = with_lengths(config, ext_len=0)
        from_end = config.attn_type in ("sinusoidal", "learned")
        memory: MemoryKind = "hidden" if from_end else "kv"
        lengths = segments.lengths_to_continue() if from_end or (case.repeat > 1 and case.mem_len) else set()
        others = {length: ModelStepper(model, tgt_len=length, memory=memory, config=plain) for length in lengths}
        first = ModelStepper(model, tgt_len=case.tgt_len, memory=memory)
        stepper = UnevenStepper(first, others, tgt_len=case.tgt_len, ext_len=case.ext_len)
        passes = itertools.chain.from_iterable([segments] * case.repeat)
        results.append(evaluate(stepper, passes, batch_size=segments.batch_size))
        assert results[-1].n_segments == case.repeat * len(segments)
    parts = tuple(ProcessScore(result.nll_nats_sum, result.n_tokens) for result in results)
    whole = EvalResult(
        nll_nats_sum=sum(part.nll_nats_sum for part in parts),
        n_tokens=sum(part.n_tokens for part in parts),
        n_segments=results[0].n_segments,
        seconds=1.0,
        by_process=parts,
    )
    return mean_nll(case.protocol, whole), whole.n_tokens, whole.n_segments


CASES = {
    "2023": Evaluation(),
    "2019": Evaluation(protocol="nvidia-2019"),
    "same length as in 2023": Evaluation(model={"same_length": True}),
    "same length as in 2019": Evaluation(protocol="nvidia-2019", model={"same_length": True}),
    "clamped": Evaluation(model={"clamp_len": 3}),
    "one column, whose end precedes its beginning": Evaluation(batch_size=1, n_tokens=23),
    "no memory": Evaluation(mem_len=0),
    "one token at a time": Evaluation(tgt_len=1, n_tokens=31),
    "memory shorter than a segment": Evaluation(mem_len=2, tgt_len=5),
    "memory as long as a segment": Evaluation(mem_len=4, tgt_len=4, repeat=2),
    "a last segment of full length": Evaluation(n_tokens=39, repeat=2),
    "columns shorter than the warm-up": Evaluation(mem_len=16, tgt_len=2, n_tokens=40),
    "a text shorter than a segment": Evaluation(protocol="nvidia-2019", n_tokens=14, tgt_len=9),
    "extension": Evaluation(ext_len=3),
    "extension in 2019": Evaluation(protocol="nvidia-2019", ext_len=3),
    "extension longer than segments": Evaluation(ext_len=9),
    "extension longer than segments and columns": Evaluation(protocol="nvidia-2019", ext_len=19, n_tokens=41),
    "extension without memory": Evaluation(ext_len=5, mem_len=0),
    "extension with same length": Evaluation(ext_len=5, model={"same_length": True}),
    "ended early": Evaluation(max_size=4),
    "ended early, twice": Evaluation(max_size=4, repeat=2),
    "twice": Evaluation(repeat=2),
    "three times in 2019": Evaluation(protocol="nvidia-2019", repeat=3, n_tokens=34),
    "twice with a memory shorter than a segment": Evaluation(protocol="nvidia-2019", repeat=2, mem_len=2, tgt_len=5),
    "twice with a last segment longer than the memory": Evaluation(protocol="nvidia-2019", repeat=2, mem_len=2, tgt_len=8, n_tokens=44),
    "twice with extension": Evaluation(repeat=2, ext_len=3),
    "twice with extension in 2019": Evaluation(protocol="nvidia-2019", repeat=2, ext_len=3),
    "twice with extension longer than segments": Evaluation(protocol="nvidia-2019", repeat=2, ext_len=7, tgt_len=3),
    "twice with extension as long as segments": Evaluation(protocol="nvidia-2019", repeat=2, ext_len=4),
    "twice with extension and same length": Evaluation(protocol="nvidia-2019", repeat=2, ext_len=6, model={"same_length": True}),
    "twice with extension and without memory": Evaluation(protocol="nvidia-2019", repeat=2, ext_len=6, mem_len=0),
    "distances learned": Evaluation(model={"attn_type": "shaw", "position_rows": 9}, ext_len=3, repeat=2),
    "positions from the end": Evaluation(protocol="nvidia-2019", model={"attn_type": "sinusoidal"}, n_tokens=34, repeat=2),
    "positions from the end, learned, once": Evaluation(model={"attn_type": "learned", "position_rows": 9}, n_tokens=34),
    "two processes with equal parts": Evaluation(processes=2, batch_size=4, n_tokens=43),
    "two processes with three columns and two": Evaluation(processes=2, batch_size=5, n_tokens=43),
    "three processes, twice, with extension": Evaluation(processes=3, batch_size=5, n_tokens=43, repeat=2, ext_len=2),
}


@pytest.mark.parametrize("name", CASES)
def test_an_evaluation_has_the_loss_and_the_tokens_of_the_restatement(name: str) -> None:
    loss, n_tokens, n_segments = ours(CASES[name])
    expected_loss, expected_tokens, expected_segments = restated(CASES[name])
    assert (n_tokens, n_segments) == (expected_tokens, expected_segments)
    assert loss == pytest.approx(expected_loss, abs=LOSS_TOLERANCE)


def test_what_repeats_remember_is_seen_in_the_loss() -> None:
    """Otherwise the cases above would prove nothing about it."""
    once, twice = (ours(Evaluation(protocol="nvidia-2019", ext_len=3, repeat=repeat))[0] for repeat in (1, 2))
    assert abs(once - twice) > 100 * LOSS_TOLERANCE


def rows_read(segments: NvidiaSegments) -> list[list[int]]:
    """Return the rows of each column in order, from inputs without extension and the last target."""
    inputs, targets = zip(*((segment.input_ids_BT, segment.target_ids_BT[:, -1:]) for segment in segments))
    rows: list[list[int]] = np.concatenate([*inputs, targets[-1]], axis=1).tolist()
    return rows


def test_the_rest_of_the_text_is_dropped_and_the_warm_up_is_the_end_of_the_column_before() -> None:
    ids = np.arange(14)
    assert rows_read(NvidiaSegments(ids, batch_size=3, tgt_len=3)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    segments = NvidiaSegments(ids, batch_size=3, tgt_len=2, warm_up_len=2)
    assert rows_read(segments) == [[10, 11, 0, 1, 2, 3], [2, 3, 4, 5, 6, 7], [6, 7, 8, 9, 10, 11]]
    assert [segment.counted_BT.tolist()[0] for segment in segments] == [[False, False], [True, True], [True]]
    assert (segments.n_trimmed, segments.n_lost, segments.n_warm_up, len(segments)) == (2, 0, 1, 3)


def test_a_column_shorter_than_the_warm_up_comes_whole_and_costs_its_neighbour_tokens() -> None:
    segments = NvidiaSegments(np.arange(8), batch_size=2, tgt_len=3, warm_up_len=6)
    assert rows_read(segments) == [[6, 7, 4, 5, 0, 1, 2, 3], [2, 3, 0, 1, 4, 5, 6, 7]]
    assert sum(int(segment.counted_BT.sum()) for segment in segments) == 2
    assert segments.n_lost == 4


@given(
    n_tokens=st.integers(2, 120),
    batch_size=st.integers(1, 9),
    tgt_len=st.integers(1, 9),
    ext_len=st.integers(0, 12),
    warm_ups=st.integers(0, 5),
)
@settings(max_examples=300)
def test_inputs_stand_before_their_targets_and_every_column_is_scored_but_for_what_is_told(
    n_tokens: int, batch_size: int, tgt_len: int, ext_len: int, warm_ups: int
) -> None:
    ids = np.arange(n_tokens)
    try:
        segments = NvidiaSegments(ids, batch_size=batch_size, tgt_len=tgt_len, ext_len=ext_len, warm_up_len=warm_ups * tgt_len)
    except DataError:
        rows = n_tokens // batch_size
        assert rows < 2 or min(warm_ups * tgt_len, rows) + rows - 1 <= warm_ups * tgt_len
        return
    scored = []
    for segment in segments:
        T, before = segment.target_ids_BT.shape[1], segment.input_ids_BT.shape[1] - segment.target_ids_BT.shape[1]
        assert before == min(segment.index * tgt_len, ext_len)
        inputs = np.concatenate([segment.input_ids_BT, segment.target_ids_BT[:, -1:]], axis=1)
        assert (inputs[:, before + 1 :] == segment.target_ids_BT).all()
        assert tgt_len == T or segment.index == len(segments) - 1
        scored += segment.target_ids_BT[segment.counted_BT].tolist()
    rows = n_tokens // batch_size
    first_tokens = {column * rows for column in range(batch_size)}
    everything = set(range(rows * batch_size)) - first_tokens
    assert len(scored) == len(set(scored)) == len(everything) - segments.n_lost
    assert set(scored) <= everything
    assert segments.n_trimmed == n_tokens - rows * batch_size


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"batch_size": 11}, ("11 columns nothing to predict", "--batch-size 10")),
        ({"batch_size": 4, "tgt_len": 5, "warm_up_len": 10}, ("all 2 segments belong to the warm-up", "columns of 5 tokens")),
        ({"batch_size": 2, "warm_up_len": 6, "max_segments": 3}, ("--max-size` 3 ends before a warm-up of 3", "a larger `--max-size`")),
    ],
)
def test_an_evaluation_that_would_score_nothing_says_why(arguments: dict[str, int], fragments: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        NvidiaSegments(np.arange(20), **{"tgt_len": 2, **arguments})
    assert all(fragment in str(caught.value) for fragment in fragments)


@pytest.mark.parametrize(
    ("protocol", "batch_size", "processes", "sizes"),
    [
        ("nvidia-2019", 5, 2, [3, 2]),
        ("nvidia-2023", 7, 3, [3, 3, 1]),
        ("nvidia-2023", 4, 4, [1, 1, 1, 1]),
        ("exact", 7, 3, [2, 2, 3]),
        ("exact", 6, 3, [2, 2, 2]),
    ],
)
def test_every_stream_is_read_by_one_process(protocol: ProtocolName, batch_size: int, processes: int, sizes: list[int]) -> None:
    parts = [range(batch_size)[own_streams(protocol, batch_size, World(rank, processes))] for rank in range(processes)]
    assert [len(part) for part in parts] == sizes
    assert list(itertools.chain(*parts)) == list(range(batch_size))


@pytest.mark.parametrize(("protocol", "batch_size", "processes"), [("exact", 1, 2), ("nvidia-2019", 1, 2), ("nvidia-2023", 6, 4)])
def test_a_process_without_a_stream_is_refused_in_all(protocol: ProtocolName, batch_size: int, processes: int) -> None:
    for rank in range(processes):
        with pytest.raises(UsageError, match="too few to give each"):
            own_streams(protocol, batch_size, World(rank, processes))


def test_the_mean_over_processes_ignores_their_sizes_in_nvidias_protocols_alone() -> None:
    result = EvalResult(nll_nats_sum=40.0, n_tokens=8, n_segments=1, seconds=1.0, by_process=(ProcessScore(10.0, 5), ProcessScore(30.0, 3)))
    assert mean_nll("exact", result) == 5.0
    assert mean_nll("nvidia-2019", result) == mean_nll("nvidia-2023", result) == 6.0
    third = EvalResult(nll_nats_sum=1.0, n_tokens=3, n_segments=1, seconds=1.0, by_process=(ProcessScore(1.0, 3), ProcessScore(1.0, 3)))
    assert mean_nll("nvidia-2023", third) == float(np.float32(1 / 3)) != 1 / 3
    alone = EvalResult(nll_nats_sum=1.0, n_tokens=3, n_segments=1, seconds=1.0)
    assert mean_nll("nvidia-2023", alone) == 1 / 3


def test_the_clock_starts_when_the_memory_is_full_and_a_step_or_two_later() -> None:
    assert clock_warm_up("nvidia-2019", tgt_len=64, mem_len=640) == 11
    assert clock_warm_up("nvidia-2023", tgt_len=64, mem_len=640) == clock_warm_up("exact", tgt_len=64, mem_len=640) == 12


RAW = {
    'The game , released in 2011 , sold 1,000,000 copies & "won" 3.5 stars in a well-known state-of-the-art review': (
        'The game , released in 2011 , sold 1 @,@ 000 @,@ 000 copies &amp; " won " 3 @.@ 5 stars in a well @-@ known '
        "state @-@ of @-@ the @-@ art review"
    ),
    "He said : 'it 's not zzzqqq' ; <unk> @-@ done 1,2,3,4 (really) [no] a|b": (
        "He said : ' it ' s not zzzqqq ' ; &lt; unk &gt; @ - @ done 1 @,@ 2,3 @,@ 4 ( really ) &#91; no &#93; a &#124; b"
    ),
    "": "",
}
"""Raw text and what NVIDIA's code made of it."""


@pytest.mark.parametrize("text", RAW)
def test_raw_text_becomes_the_words_that_nvidias_code_made_of_it(text: str) -> None:
    assert " ".join(nvidia_words(text)) == RAW[text]
