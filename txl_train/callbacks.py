"""What happens around the training steps: log lines, metrics, evaluation, checkpoints, a progress bar, stopping.

Each callback knows one of these and reaches the trainer through the small `Run` protocol. The log lines are those of the
specification, which other programs read. How a step is computed stands in `trainer`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from txl_train import metrics
from txl_train.checkpoint import Checkpoint, save_checkpoint
from txl_train.errors import EnvironmentUnfitError
from txl_train.evaluate import EvalResult

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

log = logging.getLogger(__name__)

Ending = Literal["finished", "max_minutes", "sigint", "sigterm"]
"""Why training ended: all steps done, the time limit, Ctrl-C, or a request to terminate."""

LAST_NAME = "checkpoint_last.pt"
BEST_NAME = "checkpoint_best.pt"
LOG_NAME = "train_log.log"
METRICS_NAME = "metrics.jsonl"


@dataclass
class Progress:
    """How far training has come; a checkpoint keeps it."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 1
    """The pass through the data that is under way, from 1."""
    batch: int = 0
    """Batches of this epoch done."""
    tokens: int = 0
    """Target tokens trained on."""
    train_seconds: float = 0.0
    """Time spent in steps, over all starts, without evaluation and saving."""
    best_valid_nll: float | None = None
    """Lowest mean nll on valid.txt so far, nats per token."""
    best_step: int | None = None
    """The step it was reached at."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. The tensors are on the device: reading them waits for it."""

    step: int
    lr: float
    loss: Tensor
    """Mean nll of the batch's tokens, nats."""
    grad_norm: Tensor
    """Norm of all gradients together before clipping."""
    n_tokens: int
    """Target tokens in the batch."""


class Run(Protocol):
    """The trainer as callbacks see it."""

    progress: Progress

    @property
    def max_step(self) -> int: ...

    @property
    def batches_per_epoch(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def loss_scale(self) -> float | None: ...

    @property
    def ending(self) -> Ending | None:
        """Why the run is to end after the step under way; None while it goes on. A signal goes before every other reason."""
        ...

    def stop(self, ending: Ending) -> None:
        """End the run after the step under way."""
        ...

    def train_seconds(self) -> float:
        """Time spent in steps since the first start."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Time spent within does not count as training."""
        ...

    def checkpoint(self, *, training: bool) -> Checkpoint:
        """The run as it is now, with or without what continuing needs."""
        ...


class Callback:
    """Does something around the steps; every method may be left out."""

    def start(self, run: Run) -> None:
        """Called once, before the first step."""

    def after_step(self, run: Run, report: StepReport) -> None:
        """Called after each step."""

    def end(self, run: Run, ending: Ending) -> None:
        """Called once, after the last step."""

    def close(self) -> None:
        """Called at the very end, also after an error: release files and handlers."""


def train_line(
    progress: Progress, batches_per_epoch: int, lr: float, ms_per_batch: float, tokens_per_s: float, loss: float, *, char: bool
) -> str:
    """The specification's line of training progress; `loss` in nats per token."""
    line = (
        f"| epoch {progress.epoch:3d} step {progress.step:>8d} | batches {progress.batch:>6d} / {batches_per_epoch:d} | lr {lr:.3e} "
        f"| ms/batch {ms_per_batch:5.1f} | tok/s {tokens_per_s:7.0f} | loss {loss:5.2f}"
    )
    return f"{line} | bpc {metrics.bits_per_char(loss):9.5f}" if char else f"{line} | ppl {metrics.perplexity(loss):9.2f}"


def eval_line(number: int, step: int, seconds: float, nll: float, *, char: bool) -> str:
    """The specification's line of an evaluation on valid.txt; `nll` in nats per token."""
    line = f"| Eval {number:3d} at step {step:>8d} | time: {seconds:5.2f}s | valid loss {nll:5.2f}"
    return f"{line} | bpc {metrics.bits_per_char(nll):9.5f}" if char else f"{line} | valid ppl {metrics.perplexity(nll):9.3f}"


def end_line(seconds: float, nll: float, *, char: bool) -> str:
    """The specification's line of the final evaluation on test.txt; `nll` in nats per token."""
    line = f"| End of training | test time: {seconds:5.2f}s | test loss {nll:5.2f}"
    return f"{line} | test bpc {metrics.bits_per_char(nll):9.5f}" if char else f"{line} | test ppl {metrics.perplexity(nll):9.3f}"


class RunRecord:
    """The two records a run leaves in its folder: train_log.log for people, metrics.jsonl (one JSON object a line) for programs.

    Args:
        folder: an existing folder.
        append: continue the records there are rather than begin new ones.

    Raises:
        EnvironmentUnfitError: a record cannot be written.
    """

    def __init__(self, folder: Path, *, append: bool) -> None:
        self.log_path, self.metrics_path = folder / LOG_NAME, folder / METRICS_NAME
        try:
            if append:
                _drop_unfinished_line(self.metrics_path)
            self._metrics = open(self.metrics_path, "a" if append else "w", encoding="utf-8")  # noqa: SIM115  # closed in close()
            try:
                self._log = logging.FileHandler(self.log_path, "a" if append else "w", encoding="utf-8")
            except OSError:
                self._metrics.close()
                raise
        except OSError as error:
            raise _unwritable(folder, error) from error
        self._log.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))

    def say(self, text: str) -> None:
        """Write a line to train_log.log, and to standard error unless it is to be quiet."""
        record = log.makeRecord("txl_train", logging.INFO, __file__, 0, text, (), None)
        self._log.handle(record)
        if log.isEnabledFor(logging.INFO):
            log.handle(record)

    def measure(self, kind: str, **values: Any) -> None:
        """Add an object to metrics.jsonl; a number that is not finite becomes null, for JSON has none."""
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        try:
            self._metrics.write(json.dumps({"kind": kind, **finite}, allow_nan=False) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise _unwritable(self.metrics_path, error) from error

    def close(self) -> None:
        """Close both files."""
        self._log.close()
        try:
            self._metrics.close()
        except OSError as error:
            raise _unwritable(self.metrics_path, error) from error


class LogProgress(Callback):
    """A line and a record of metrics every `interval` steps, and after the last one, averaged over the steps since the one before."""

    def __init__(self, record: RunRecord, interval: int, *, char: bool) -> None:
        self._record = record
        self._interval = interval
        self._char = char
        self._window: list[StepReport] = []
        self._seconds = 0.0

    def start(self, run: Run) -> None:
        self._seconds = run.train_seconds()

    def after_step(self, run: Run, report: StepReport) -> None:
        self._window.append(report)
        if report.step % self._interval == 0 or report.step == run.max_step:
            self._write(run)

    def end(self, run: Run, ending: Ending) -> None:
        if self._window:
            self._write(run)

    def _write(self, run: Run) -> None:
        window, self._window = self._window, []
        n_tokens = sum(report.n_tokens for report in window)
        loss = sum(float(report.loss) * report.n_tokens for report in window) / n_tokens  # waits for the device
        now = run.train_seconds()
        seconds, self._seconds = max(now - self._seconds, 1e-9), now
        ms_per_step = 1000 * seconds / len(window)
        lr = window[-1].lr
        self._record.say(train_line(run.progress, run.batches_per_epoch, lr, ms_per_step, n_tokens / seconds, loss, char=self._char))
        self._record.measure(
            "train",
            step=run.progress.step,
            epoch=run.progress.epoch,
            batch=run.progress.batch,
            tokens=run.progress.tokens,
            train_seconds=now,
            loss_nats_per_token=loss,
            **nll_figure(loss, self._char),
            lr=lr,
            grad_norm=float(window[-1].grad_norm),
            loss_scale=run.loss_scale,
            ms_per_step=ms_per_step,
            tokens_per_s=n_tokens / seconds,
            peak_memory_bytes=peak_memory_bytes(run.device),
        )


class StopRequestedError(Exception):
    """Raised within an evaluation that a signal cut short."""


class EvaluateAndSave(Callback):
    """Every `interval` steps, and after the last: write checkpoint_last.pt, score valid.txt, write checkpoint_best.pt if it is the best.

    Whatever ends an evaluation, the steps before it are saved; a best score is written into checkpoint_last.pt afterwards. A signal skips
    the evaluation or cuts it short. `score` scores valid.txt, calling its argument after each segment.
    """

    def __init__(
        self, record: RunRecord, folder: Path, interval: int, score: Callable[[Callable[[int], None]], EvalResult], *, char: bool
    ) -> None:
        self._record = record
        self._best, self._last = folder / BEST_NAME, folder / LAST_NAME
        self._interval = interval
        self._score = score
        self._char = char
        self._saved_step: int | None = None
        self.result: EvalResult | None = None
        """Of the latest evaluation."""

    def after_step(self, run: Run, report: StepReport) -> None:
        if (report.step % self._interval == 0 or report.step == run.max_step) and not by_signal(run.ending):
            self._evaluate_and_save(run)

    def end(self, run: Run, ending: Ending) -> None:
        if self._saved_step == run.progress.step:
            return
        if by_signal(ending):
            with run.paused():
                self._save_last(run)
        else:
            self._evaluate_and_save(run)

    def _evaluate_and_save(self, run: Run) -> None:
        progress = run.progress

        def check(n_segments: int) -> None:
            if by_signal(run.ending):
                raise StopRequestedError

        with run.paused():
            self._save_last(run)
            try:
                result = self._score(check)
            except StopRequestedError:
                return
            self.result = result
            nll = result.nll_nats_per_token
            self._record.say("-" * 100)
            self._record.say(eval_line(-(-progress.step // self._interval), progress.step, result.seconds, nll, char=self._char))
            self._record.say("-" * 100)
            is_best = progress.best_valid_nll is None or nll < progress.best_valid_nll
            if is_best:
                progress.best_valid_nll, progress.best_step = nll, progress.step
            self._record.measure("valid", step=progress.step, epoch=progress.epoch, best=is_best, **result_figures(result, self._char))
            if is_best:
                save_checkpoint(self._best, run.checkpoint(training=False))
                self._save_last(run)

    def _save_last(self, run: Run) -> None:
        save_checkpoint(self._last, run.checkpoint(training=True))
        self._saved_step = run.progress.step


class TimeLimit(Callback):
    """Ends the run after so many minutes from its start, evaluations included."""

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._deadline = math.inf

    def start(self, run: Run) -> None:
        self._deadline = time.monotonic() + self._seconds

    def after_step(self, run: Run, report: StepReport) -> None:
        if time.monotonic() >= self._deadline:
            run.stop("max_minutes")


class StopOnSignal(Callback):
    """Lets Ctrl-C (SIGINT) and SIGTERM end the run after the step under way; the second signal has its usual effect, at once."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def start(self, run: Run) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers

        def handle(number: int, frame: FrameType | None) -> None:
            self._restore()
            run.stop("sigint" if number == signal.SIGINT else "sigterm")
            os.write(2, b"\nStopping after this step. Once more stops at once.\n")  # logging is not safe within a handler

        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, handle)

    def close(self) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)


class ProgressBar(Callback):
    """A bar on standard error with loss, tokens/s and the time left. Only for a terminal: see `is_wanted`."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._tokens, self._seconds = 0, 0.0

    @staticmethod
    def is_wanted() -> bool:
        """True if standard error is a terminal that can show a bar, nobody asked for quiet, and this is no CI job."""
        terminal = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        return terminal and not os.environ.get("CI") and log.isEnabledFor(logging.INFO)

    def start(self, run: Run) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True, soft_wrap=True), transient=True, redirect_stdout=False)
        self._task = self._bar.add_task("training", total=run.max_step, completed=run.progress.step, speed="")
        self._tokens, self._seconds = run.progress.tokens, run.train_seconds()
        self._bar.start()

    def after_step(self, run: Run, report: StepReport) -> None:
        assert self._bar is not None
        assert self._task is not None
        speed = (run.progress.tokens - self._tokens) / max(run.train_seconds() - self._seconds, 1e-9)
        self._bar.update(self._task, completed=report.step, speed=f"{speed:,.0f} tokens/s")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def result_figures(result: EvalResult, char: bool) -> dict[str, Any]:
    """The figures of an evaluation as plain values with their units in their names."""
    nll = result.nll_nats_per_token
    return {"nll_nats_per_token": nll, **nll_figure(nll, char), "n_tokens": result.n_tokens, "seconds": result.seconds}


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory held so far: of the GPU by PyTorch, or of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def by_signal(ending: Ending | None) -> bool:
    """True if a signal ended the run: then nothing more is computed, only saved."""
    return ending in ("sigint", "sigterm")


def nll_figure(nll: float, char: bool) -> dict[str, float]:
    """The figure people quote for a mean nll: bits per character, or perplexity."""
    return {"bits_per_char": metrics.bits_per_char(nll)} if char else {"perplexity": metrics.perplexity(nll)}


def _drop_unfinished_line(path: Path) -> None:
    """Cut off a last line that a killed run left without its end."""
    if path.exists():
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)


def _unwritable(path: Path, error: OSError) -> EnvironmentUnfitError:
    return EnvironmentUnfitError(
        f"{path} cannot be written: {error.strerror or error}.", remedy="Free some space, or choose another folder with `--work-dir`."
    )
