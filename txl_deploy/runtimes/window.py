"""Keys and values that are never moved: a step writes its own behind those of the memory, and the memory's window moves on.

Keeping the last M positions of M + T means copying nearly all of the memory at each step, which at one token a step is most of the work.
Here the states lie in tensors with room for more positions than a memory has. The memory is a view of M of them, the next one a view that
begins T later, and only when there is no room left are M positions copied to other tensors. What a memory shows is never written again,
so any memory may be continued, at any time and more than once.

There are two sets of such tensors that take turns: one that is new to the process costs more in page faults than in copying.
One is taken again only if nothing refers to what is in it, which PyTorch counts.
"""

# Shape suffixes: B batch, H heads, M mem_len, Q tokens that a step reads, C positions that there is room for, E d_head

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from txl_train.model.memory import Memory


class _Store:
    """The tensors [B, H, C, E] that some memories are views of, and how many positions the newest of them reaches."""

    def __init__(self, states: Sequence[Tensor], capacity: int) -> None:
        B, H, M, E = states[0].shape
        self.tensors = [torch.empty(B, H, capacity, E, dtype=state.dtype, device=state.device) for state in states]
        for tensor, state in zip(self.tensors, states):
            tensor[:, :, :M] = state
        self.end = M

    def take(self, states: Sequence[Tensor], capacity: int) -> bool:
        """Start over with other states and return True, if they fit and nobody else holds a tensor that lies in these."""
        B, H, M, E = states[0].shape
        same = all(
            tensor.shape == (B, H, capacity, E) and tensor.dtype == state.dtype and tensor.device == state.device
            for tensor, state in zip(self.tensors, states)
        )
        if not same or any(holders(tensor) > 1 for tensor in self.tensors):
            return False
        for tensor, state in zip(self.tensors, states):
            tensor[:, :, :M] = state
        self.end = M
        return True


class Windows:
    """Knows of each memory that it has handed out where it lies.

    Args:
        mem_len: positions of a memory, M.
        n_input: tokens that a step reads, Q: segment and extension.
        tgt_len: positions by which a memory moves at each step.
    """

    def __init__(self, mem_len: int, n_input: int, tgt_len: int) -> None:
        self._mem_len, self._n_input, self._tgt_len = mem_len, n_input, tgt_len
        self._known = WeakTensorKeyDictionary()
        self._resting: _Store | None = None
        self._newest: _Store | None = None

    def with_room(self, memory: Memory) -> tuple[_Store, int, list[Tensor]]:
        """Return where the memory lies, from which position on, and its states [B, H, M + Q, E] with room for a step at their end.

        A memory that came from elsewhere, was continued before, or has no room behind it is copied; the copy takes its place.
        """
        M, Q = self._mem_len, self._n_input
        found: tuple[_Store, int] | None = self._known.get(memory.states[0])  # type: ignore[no-untyped-call]
        if found is not None:
            store, start = found
            views = [tensor[:, :, start : start + M] for tensor in store.tensors]
            is_newest, has_room = store.end == start + M, start + M + Q <= store.tensors[0].shape[2]
            if is_newest and has_room and all(_is_same(state, view) for state, view in zip(memory.states, views)):
                return store, start, [tensor[:, :, start : start + M + Q] for tensor in store.tensors]
        store = self._store(memory.states, M + max(M, Q))
        return store, 0, [tensor[:, :, : M + Q] for tensor in store.tensors]

    def _store(self, states: Sequence[Tensor], capacity: int) -> _Store:
        store = self._resting
        if store is None or not store.take(states, capacity):
            store = _Store(states, capacity)
        self._resting, self._newest = self._newest, store
        return store

    def keep(self, store: _Store, start: int, states: list[Tensor]) -> None:
        """Remember where the states that a step has returned lie: `tgt_len` behind those it was given."""
        store.end = start + self._tgt_len + self._mem_len
        self._known[states[0]] = (store, start + self._tgt_len)


def holders(tensor: Tensor) -> int:
    """Return how many tensors lie in the memory of this one, itself included; many, if this PyTorch does not say."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return 2
    storage = tensor.untyped_storage()
    return int(count(storage._cdata)) - 1  # `storage` itself is one


def _is_same(state: Tensor, view: Tensor) -> bool:
    return state.data_ptr() == view.data_ptr() and state.shape == view.shape and state.stride() == view.stride()
