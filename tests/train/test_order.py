"""The order in which training reads its text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from txl_train.order import TrainingOrder

IDS = np.arange(1000)


def targets_of(order: TrainingOrder, epoch: int) -> list[list[int]]:
    """The counted targets of each stream, in order."""
    segments = list(order.epoch(epoch))
    return [
        [int(t) for segment in segments for t, counted in zip(segment.target_ids_BT[stream], segment.counted_BT[stream]) if counted]
        for stream in range(order.epoch(epoch).batch_size)
    ]


def test_an_epoch_reads_every_target_once_in_order() -> None:
    order = TrainingOrder(ids_N=IDS, batch_size=7, tgt_len=9)
    assert [target for stream in targets_of(order, 1) for target in stream] == list(range(1, 1000))


def test_rolling_rotates_each_stream_by_an_amount_of_its_own_and_of_each_epoch() -> None:
    plain = targets_of(TrainingOrder(ids_N=IDS, batch_size=4, tgt_len=9), 1)
    order = TrainingOrder(ids_N=IDS, batch_size=4, tgt_len=9, roll=True, seed=3)
    seen = set()
    for epoch in (1, 2):
        for before, after in zip(plain, targets_of(order, epoch), strict=True):
            shift = before.index(after[0])
            assert after == before[shift:] + before[:shift]
            seen.add(shift)
    assert len(seen) == 8
    assert targets_of(order, 2) == targets_of(order, 2)


def test_a_rolled_target_keeps_its_predecessor() -> None:
    order = TrainingOrder(ids_N=IDS, batch_size=4, tgt_len=9, roll=True, ext_len=2, seed=3)
    for segment in order.epoch(1):
        inputs = segment.input_ids_BT[:, 2:]
        assert (inputs[segment.counted_BT] == segment.target_ids_BT[segment.counted_BT] - 1).all()


def test_random_lengths_read_every_target_once_around_tgt_len() -> None:
    order = TrainingOrder(ids_N=np.arange(40_000), batch_size=2, tgt_len=40, varlen=True, seed=1)
    lengths = [segment.target_ids_BT.shape[1] for segment in order.epoch(1)]
    assert [target for stream in targets_of(order, 1) for target in stream] == list(range(1, 40_000))
    assert np.median(lengths) == pytest.approx(40, abs=2)
    assert 5 <= min(lengths) < 30
    assert 45 < max(lengths) <= 55
    assert sum(length < 28 for length in lengths) / len(lengths) == pytest.approx(0.05, abs=0.04)
    assert lengths != [segment.target_ids_BT.shape[1] for segment in order.epoch(2)]


@pytest.mark.parametrize("settings", [{}, {"roll": True}, {"varlen": True}, {"roll": True, "varlen": True, "ext_len": 3}])
def test_processes_read_together_what_one_reads_alone(settings: dict[str, bool]) -> None:
    whole = TrainingOrder(ids_N=IDS, batch_size=6, tgt_len=9, seed=5, **settings).epoch(2)
    parts = [TrainingOrder(ids_N=IDS, batch_size=6, tgt_len=9, seed=5, streams=slice(i, i + 2), **settings).epoch(2) for i in (0, 2, 4)]
    for index, segment in enumerate(whole):
        together = np.concatenate([part.segment(index).target_ids_BT for part in parts])
        assert (together == segment.target_ids_BT).all()
        assert {part.n_counted_in(index) for part in parts} == {int(segment.counted_BT.sum())}


def test_sentences_are_shuffled_anew_in_each_epoch_and_stay_whole() -> None:
    sentences = [[number, number, 0] for number in range(1, 100)]
    ids = np.array([token for sentence in sentences for token in sentence])
    order = TrainingOrder(ids_N=ids, batch_size=1, tgt_len=9, sentence_end=0)
    epochs = [targets_of(order, epoch)[0] for epoch in (1, 2)]
    for targets in epochs:
        lacking = sorted(ids.tolist())
        lacking.remove(targets[0])  # the first token of all, whose sentence goes on with the same number, has no predecessor
        assert sorted(targets) == lacking
        inner = targets[2:]  # the first sentence lacks the token that nothing comes before
        assert all(inner[i] == inner[i + 1] and inner[i + 2] == 0 for i in range(0, len(inner) - 2, 3))
    assert epochs[0] != epochs[1]


def nvidia_columns(epochs: int, seed: int, n_columns: int) -> np.ndarray:
    """Columns as NVIDIA's code of 2023 has them after so many epochs' rolls, written from its description."""
    rows = len(IDS) // n_columns
    columns = [IDS[i * rows : (i + 1) * rows].copy() for i in range(n_columns)]
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed(seed + epoch)
        for i in range(n_columns):
            shift = int(torch.randint(0, rows, (1,), generator=generator))
            columns[i] = np.concatenate([columns[i][shift:], columns[i][:shift]])
    return np.stack(columns)


@pytest.mark.parametrize("epoch", [1, 3])
def test_in_compatible_mode_columns_are_trimmed_and_rolled_as_nvidias(epoch: int) -> None:
    columns = nvidia_columns(epoch, 11, 7)
    order = TrainingOrder(ids_N=IDS, batch_size=7, tgt_len=9, roll=True, compat="nvidia-2023", seed=11)
    segments = list(order.epoch(epoch))
    inputs, targets = (np.concatenate([getattr(s, name) for s in segments], axis=1) for name in ("input_ids_BT", "target_ids_BT"))
    assert (inputs == columns[:, :-1]).all()
    assert (targets == columns[:, 1:]).all()
    assert segments[-1].target_ids_BT.shape[1] == (columns.shape[1] - 1) % 9
