"""Stand-ins that obey the contracts and nothing else: a runtime whose results and times are known beforehand, and the clock it moves.

`FakeRuntime` keeps every promise of `txl_deploy.runtimes.base.Runtime` as strictly as it may: it overwrites its outputs at the next step,
and refuses a memory that it did not hand out last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from txl_deploy.runtimes.base import RuntimeInfo
from txl_train.config import MemoryKind, ModelConfig
from txl_train.evaluate import StepOutput
from txl_train.model.memory import Memory

_SERIALS = itertools.count()
"""Every memory of every runtime has its own."""


class FakeClock:
    """A clock that stands still until somebody moves it; calling it reads it, in nanoseconds."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def advance_ms(self, ms: float) -> None:
        """Let time pass."""
        self.now_ns += round(ms * 1e6)


class FakeRuntime:
    """A runtime whose nll is a known function of the tokens and of how much of the past it remembers.

    The nll of a token is `base_nll + nll_offset + (input + 2 target) % 7 / 10 - 0.01 valid length`, in nats. A step takes
    `latency_ms`, a number or a function of the count of steps so far; half of it passes in `step`, half in the next `synchronize`.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        clock: FakeClock | None = None,
        latency_ms: float | Callable[[int], float] = 1.0,
        tgt_len: int = 4,
        mem_len: int = 8,
        clamp_len: int | None = None,
        dtype: str = "fp32",
        memory: MemoryKind = "kv",
        base_nll: float = 3.0,
        nll_offset: float = 0.0,
        origin: str = "",
        manifest_sha256: str | None = None,
        checkpoint_sha256: str | None = None,
        journal: list[str] | None = None,
    ) -> None:
        self.clock = clock or FakeClock()
        self.latency_ms = latency_ms
        self.nll = base_nll + nll_offset
        self.journal: list[str] = [] if journal is None else journal
        """Names of the runtimes in the order of their steps; shared by those that are given the same list."""
        self.inputs: list[list[list[int]]] = []
        """Input ids of every step."""
        self.lengths: list[list[int]] = []
        """Valid memory length of every stream before every step."""
        self._info = RuntimeInfo(
            name=name,
            provider="fake",
            device="cpu",
            dtype=dtype,
            memory=memory,
            tgt_len=tgt_len,
            config=ModelConfig(vocab_size=100, mem_len=mem_len, clamp_len=clamp_len),
            origin=origin,
            manifest_sha256=manifest_sha256,
            checkpoint_sha256=checkpoint_sha256,
        )
        self._handed_out: set[int] = set()
        self._nll_BT: Tensor | None = None
        self._owed_ms = 0.0

    @property
    def info(self) -> RuntimeInfo:
        """What this is."""
        return self._info

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory of a cold start."""
        return self._hand_out(torch.zeros(batch_size, dtype=torch.int64))

    def step(self, input_ids_BT: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Score one segment, spoiling what the step before returned."""
        assert input_ids_BT.shape[1] == self._info.tgt_len
        if int(memory.states[0]) not in self._handed_out:
            raise AssertionError(f"{self._info.name} was given a memory that is another runtime's, or no longer valid")
        latency_ms = self.latency_ms(len(self.inputs)) if callable(self.latency_ms) else self.latency_ms
        self.clock.advance_ms(latency_ms / 2)
        self._owed_ms += latency_ms / 2
        self.journal.append(self._info.name)
        self.inputs.append(input_ids_BT.tolist())
        self.lengths.append(memory.length_B.tolist())
        nll_BT = self.nll + (input_ids_BT + 2 * target_ids_BT) % 7 / 10 - 0.01 * memory.length_B[:, None]
        if self._nll_BT is not None:
            self._nll_BT.fill_(float("nan"))
        self._nll_BT = nll_BT
        self._handed_out.clear()
        return StepOutput(nll_BT, self._hand_out((memory.length_B + self._info.tgt_len).clamp(max=self._info.mem_len)))

    def synchronize(self) -> None:
        """Let the rest of the step's time pass."""
        self.clock.advance_ms(self._owed_ms)
        self._owed_ms = 0.0

    def _hand_out(self, length_B: Tensor) -> Memory:
        serial = next(_SERIALS)
        self._handed_out.add(serial)
        return Memory([torch.tensor(serial)], length_B)
