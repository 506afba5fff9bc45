"""Windows move over tensors that stay where they are; what a memory shows is never written again."""

from __future__ import annotations

import torch

from txl_deploy.runtimes.window import Windows
from txl_train.model.memory import Memory

M, T = 6, 2


def empty() -> Memory:
    return Memory([torch.zeros(1, 1, M, 1) for _ in range(2)], torch.zeros(1, dtype=torch.int64))


def step(windows: Windows, memory: Memory, value: float) -> Memory:
    """Write `value` behind the memory, as a step does with its keys and values."""
    store, start, states = windows.with_room(memory)
    for state in states:
        assert state.shape[2] == M + T
        state[:, :, M:] = value
    kept = Memory([state[:, :, T:] for state in states], memory.length_B)
    windows.keep(store, start, kept.states)
    return kept


def shown(memory: Memory) -> list[float]:
    assert torch.equal(memory.states[0], memory.states[1])
    return memory.states[0].flatten().tolist()


def test_a_memory_holds_the_last_positions_over_many_steps() -> None:
    windows, memory, expected = Windows(M, T, T), empty(), [0.0] * M
    for value in range(1, 20):
        memory = step(windows, memory, value)
        expected = [*expected, value, value][-M:]
        assert shown(memory) == expected


def test_nothing_is_moved_until_there_is_no_room_left() -> None:
    windows, memory = Windows(M, T, T), empty()
    stores = set()
    for value in range(12):
        memory = step(windows, memory, value)
        stores.add(memory.states[0].untyped_storage().data_ptr())
    steps_per_store = M // T
    assert len(stores) <= 12 // steps_per_store


def test_two_sets_of_tensors_take_turns_when_nobody_holds_what_was_in_them() -> None:
    windows, memory = Windows(M, T, T), empty()
    stores = set()
    for value in range(60):
        memory = step(windows, memory, value)
        stores.add(memory.states[0].untyped_storage().data_ptr())
    assert len(stores) == 2


def test_tensors_that_somebody_holds_a_part_of_are_not_taken_again() -> None:
    windows, memory, held = Windows(M, T, T), empty(), []
    for value in range(1, 40):
        memory = step(windows, memory, value)
        part = memory.states[1][0, 0, -1:]  # a view of a view: the memory itself is gone when the next one is there
        held.append((part, value))
    assert all(part.tolist() == [[value]] for part, value in held)


def test_another_batch_size_takes_tensors_of_its_own() -> None:
    windows, memory = Windows(M, T, T), empty()
    for value in range(1, 9):
        memory = step(windows, memory, value)
    other = Memory([torch.zeros(3, 1, M, 1) for _ in range(2)], torch.zeros(3, dtype=torch.int64))
    for value in range(1, 9):
        other = step(windows, other, value)
    assert other.states[0].shape == (3, 1, M, 1)
    assert shown(memory)[-T:] == [8.0] * T


def test_earlier_memories_keep_what_they_show_and_may_be_continued_again() -> None:
    windows, memory = Windows(M, T, T), empty()
    past = []
    for value in range(1, 10):
        memory = step(windows, memory, value)
        past.append((memory, shown(memory)))
    for before, expected in past:
        assert shown(before) == expected
        again = step(windows, before, 99.0)
        assert shown(again) == [*expected, 99.0, 99.0][-M:]
    for before, expected in past:
        assert shown(before) == expected


def test_a_memory_with_a_tensor_from_elsewhere_is_copied_and_not_written() -> None:
    windows = Windows(M, T, T)
    memory = step(windows, empty(), 1.0)
    stranger = torch.full((1, 1, M, 1), 5.0)
    mixed = Memory([memory.states[0], stranger], memory.length_B)
    store, start, states = windows.with_room(mixed)
    assert start == 0
    assert torch.equal(states[1][:, :, :M], stranger)
    for state in states:
        state[:, :, M:] = 7.0
    assert shown(memory) == [0.0] * (M - T) + [1.0] * T
    assert bool((stranger == 5.0).all())
    assert store.tensors[0].data_ptr() != memory.states[0].untyped_storage().data_ptr()


def test_what_is_read_once_more_lies_behind_the_memory_and_is_written_anew() -> None:
    windows, memory = Windows(M, T + 3, T), empty()
    for value in range(1, 8):
        store, start, states = windows.with_room(memory)
        assert states[0].shape[2] == M + 3 + T
        for state in states:
            state[:, :, M:] = float(value)
        memory = Memory([state[:, :, T : T + M] for state in states], memory.length_B)
        windows.keep(store, start, memory.states)
        assert store.end == start + T + M
        assert memory.states[0].flatten().tolist()[-T:] == [float(value)] * T
