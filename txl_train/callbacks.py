"""What happens around the training steps: log lines, metrics, evaluation, checkpoints, a progress bar, stopping.

Each callback knows one of these and reaches the trainer through the small `Run` protocol. Where several processes train together, each
has the same callbacks and calls them in the same order, and the first one alone writes. How a step is computed stands in `trainer`,
what a record looks like in `records`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from txl_train.checkpoint import Checkpoint, save_checkpoint
from txl_train.distributed import World
from txl_train.errors import EnvironmentUnfitError
from txl_train.evaluate import EvalResult
from txl_train.records import RunRecord, eval_line, nll_figure, peak_memory_bytes, result_figures, train_line
from txl_train.rising import RisingLoss
from txl_train.unfinished import name_beside

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

log = logging.getLogger(__name__)

Ending = Literal["finished", "max_minutes", "sigint", "sigterm"]
"""Why training ended: all steps done, the time limit, Ctrl-C, or a request to terminate."""

LAST_NAME = "checkpoint_last.pt"
BEST_NAME = "checkpoint_best.pt"
_KEPT_NAME = re.compile(r"checkpoint_([0-9]+)\.pt")


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
    skipped_steps: int = 0
    """Steps that left the weights as they were, because gradients overflowed fp16 and the loss scale was too large."""
    evaluated_step: int = 0
    """The step of the latest complete evaluation; 0 before the first."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. The tensors are on the device: reading them waits for it."""

    step: int
    lr: float
    loss: Tensor
    """Mean loss of the batch's targets, nats; of several processes, this one's part of it."""
    grad_norm: Tensor
    """Norm of all gradients that are clipped together, before that."""
    n_tokens: int
    """Target tokens in the batch, of all processes."""


class Run(Protocol):
    """The trainer as callbacks see it."""

    progress: Progress
    world: World

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

    def agree(self) -> Ending | None:
        """The same as `ending`, equal in all processes; all must call it."""
        ...

    def stop(self, ending: Ending) -> None:
        """End the run after the step under way."""
        ...

    def observe(self, valid_nll: float) -> None:
        """Tell the schedule of the learning rate how valid.txt was scored, nats per token."""
        ...

    def train_seconds(self) -> float:
        """Time spent in steps since the first start."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Time spent within does not count as training."""
        ...

    def checkpoint(self, *, training: bool) -> Checkpoint:
        """The run as it is now, with or without what continuing needs; all processes must call it."""
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


@dataclass(frozen=True)
class Work:
    """How much arithmetic a token takes, and how much the devices together can do."""

    flops_per_token: float
    """Floating-point operations of forward and backward pass."""
    peak_flops: float
    """Operations per second, measured on matrix products."""

    def utilisation(self, tokens_per_s: float) -> float:
        """The share of the peak that training makes use of."""
        return tokens_per_s * self.flops_per_token / self.peak_flops


class LogProgress(Callback):
    """A line and a record of metrics every `interval` steps, and after the last one, averaged over the steps since the one before.

    A loss that rises and stays there is warned of.
    """

    def __init__(self, record: RunRecord, interval: int, *, char: bool, work: Work | None = None) -> None:
        self._record = record
        self._interval = interval
        self._char = char
        self._work = work
        self._window: list[StepReport] = []
        self._seconds = 0.0
        self._rising = RisingLoss()
        self.latest: dict[str, Any] = {}
        """What was recorded last."""

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
        own_sum = sum(float(report.loss) * report.n_tokens for report in window)  # waits for the device
        loss = run.world.sum([own_sum])[0] / n_tokens
        now = run.train_seconds()
        seconds, self._seconds = max(now - self._seconds, 1e-9), now
        ms_per_step = 1000 * seconds / len(window)
        lr, tokens_per_s = window[-1].lr, n_tokens / seconds
        self._record.say(train_line(run.progress, run.batches_per_epoch, lr, ms_per_step, tokens_per_s, loss, char=self._char))
        if (warning := self._rising.add(run.progress.step, loss)) and run.world.is_main:
            self._record.warn(warning)
        self.latest = {
            "epoch": run.progress.epoch,
            "batch": run.progress.batch,
            "tokens": run.progress.tokens,
            "train_seconds": now,
            "loss_nats_per_token": loss,
            **nll_figure(loss, self._char),
            "lr": lr,
            "grad_norm": float(window[-1].grad_norm),
            "loss_scale": run.loss_scale,
            "skipped_steps": run.progress.skipped_steps,
            "ms_per_step": ms_per_step,
            "tokens_per_s": tokens_per_s,
            "model_flops_utilisation": None if self._work is None else self._work.utilisation(tokens_per_s),
            "peak_memory_bytes": peak_memory_bytes(run.device),
        }
        self._record.measure("train", step=run.progress.step, **self.latest)


class StopRequestedError(Exception):
    """Raised within an evaluation that a signal cut short."""


class EvaluateAndSave(Callback):
    """Every `interval` steps, and after the last: write checkpoint_last.pt, score valid.txt, write checkpoint_best.pt if it is the best.

    Whatever ends an evaluation, the steps before it are saved; its outcome is written into checkpoint_last.pt afterwards. A signal skips
    the evaluation or cuts it short; it is made up for when the run is continued.

    Args:
        record: where the outcomes are noted.
        folder: of the checkpoints; None saves nothing.
        interval: steps between two evaluations.
        score: scores valid.txt, calling its argument after each segment.
        char: tokens are characters or bytes.
        keep: how many checkpoints of evaluations are kept as checkpoint_<step>.pt; None keeps all.
    """

    def __init__(
        self,
        record: RunRecord,
        folder: Path | None,
        interval: int,
        score: Callable[[Callable[[int], None]], EvalResult],
        *,
        char: bool,
        keep: int | None = 0,
    ) -> None:
        self._record = record
        self._folder = folder
        self._interval = interval
        self._score = score
        self._char = char
        self._keep = keep
        self._saved_step: int | None = None
        self.result: EvalResult | None = None
        """Of the latest evaluation."""

    def start(self, run: Run) -> None:
        step = run.progress.step
        if step and step % self._interval == 0 and run.progress.evaluated_step != step:
            self._evaluate_and_save(run)
        elif step and run.progress.evaluated_step == step:
            self._keep_last(run)

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
            if by_signal(run.agree()):
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
            if progress.evaluated_step != progress.step:  # a finished run that is continued is scored again
                run.observe(nll)
            progress.evaluated_step = progress.step
            self._record.measure("valid", step=progress.step, epoch=progress.epoch, best=is_best, **result_figures(result, self._char))
            if is_best:
                self._save(run, BEST_NAME, training=False)
            self._save_last(run)
            self._keep_last(run)

    def _save_last(self, run: Run) -> None:
        self._save(run, LAST_NAME, training=True)
        self._saved_step = run.progress.step

    def _save(self, run: Run, name: str, *, training: bool) -> None:
        if self._folder is None:
            return
        checkpoint = run.checkpoint(training=training)
        if run.world.is_main:
            save_checkpoint(self._folder / name, checkpoint)

    def _keep_last(self, run: Run) -> None:
        """Give checkpoint_last.pt, which is only ever replaced as a whole, a second name that stays."""
        if self._folder is None or self._keep == 0 or not run.world.is_main:
            return
        last, kept = self._folder / LAST_NAME, self._folder / f"checkpoint_{run.progress.step}.pt"
        if not last.exists():
            return
        if not kept.exists():
            self._name_again(last, kept)
        if self._keep is not None:
            for path in kept_checkpoints(self._folder)[: -self._keep]:
                path.unlink(missing_ok=True)

    def _name_again(self, last: Path, kept: Path) -> None:
        unfinished = name_beside(kept)
        try:
            try:
                os.link(last, unfinished)
            except OSError:  # a file system without links
                shutil.copyfile(last, unfinished)
            os.replace(unfinished, kept)
        except OSError as error:
            raise EnvironmentUnfitError(
                f"The checkpoint {kept} cannot be written: {error.strerror or error}.", remedy="Free some space, or keep fewer."
            ) from error


def kept_checkpoints(folder: Path, *, after_step: int = -1) -> list[Path]:
    """The files checkpoint_<step>.pt in `folder` of later steps than `after_step`, by their steps."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _KEPT_NAME.fullmatch(path.name))]
    return [path for step, path in sorted(found) if step > after_step]


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
    """Lets Ctrl-C (SIGINT) and SIGTERM end the run after the step under way; the second signal has its usual effect, at once.

    Among several processes only Ctrl-C counts as the second signal: torchrun passes SIGTERM on to all of them after the first, and kills
    them half a minute later.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def start(self, run: Run) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers

        def handle(number: int, frame: FrameType | None) -> None:
            if run.world.size == 1:
                self._restore()
            else:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGINT, signal.default_int_handler)
            run.stop("sigint" if number == signal.SIGINT else "sigterm")
            if run.world.is_main:
                with contextlib.suppress(OSError):  # nobody may be listening any more; logging is not safe within a handler
                    os.write(2, b"\nStopping after this step. Once more stops at once.\n")

        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, handle)

    def close(self) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)


class ProgressBar(Callback):
    """A bar on standard error with the time left, tokens/s, loss, memory and utilisation. Only for a terminal: see `is_wanted`."""

    def __init__(self, progress: LogProgress) -> None:
        self._progress = progress
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
        self._bar.update(self._task, completed=report.step, speed=bar_text(speed, self._progress.latest))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def bar_text(tokens_per_s: float, latest: Mapping[str, Any]) -> str:
    """What the bar says of speed, and of what was logged last: loss, share of the device's arithmetic, most memory held."""
    parts = [f"{tokens_per_s:,.0f} tokens/s"]
    if latest:
        parts.append(f"loss {latest['loss_nats_per_token']:.2f}")
        if latest["model_flops_utilisation"] is not None:
            parts.append(f"{latest['model_flops_utilisation']:.0%} of peak")
        if latest["peak_memory_bytes"] is not None:
            parts.append(f"{latest['peak_memory_bytes'] / 2**30:.1f} GiB")
    return " · ".join(parts)


def by_signal(ending: Ending | None) -> bool:
    """True if a signal ended the run: then nothing more is computed, only saved."""
    return ending in ("sigint", "sigterm")
