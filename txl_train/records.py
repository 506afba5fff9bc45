"""The records a run leaves: train_log.log for people, metrics.jsonl (one JSON object a line) for programs, both for TensorBoard if wanted.

The lines are those of the specification, which other programs read. Knows nothing of when something is recorded.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from txl_train import metrics
from txl_train.errors import EnvironmentUnfitError
from txl_train.evaluate import EvalResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from txl_train.callbacks import Progress

log = logging.getLogger(__name__)

LOG_NAME = "train_log.log"
METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"


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
    """What a run records, while it runs.

    Args:
        folder: an existing folder; None writes no files.
        append: continue the records there are rather than begin new ones.
        rank: of this process; others than the first write files of their own, named by their rank.
        silent: record nothing at all, in a process that is not to log.
        tensorboard: write the measurements for TensorBoard too.
        first_step: the step the record begins at; what TensorBoard has of later ones is hidden.

    Raises:
        EnvironmentUnfitError: a record cannot be written, or TensorBoard is not installed.
    """

    def __init__(
        self, folder: Path | None, *, append: bool, rank: int = 0, silent: bool = False, tensorboard: bool = False, first_step: int = 0
    ) -> None:
        self._silent = silent
        self._prefix = f"[process {rank}] " if rank else ""
        self._metrics: TextIO | None = None
        self._log: logging.Handler | None = None
        self._board: SummaryWriter | None = None
        if silent or folder is None:
            return
        self._metrics_path = folder / _of_rank(METRICS_NAME, rank)
        if tensorboard:
            self._board = _open_board(folder / TENSORBOARD_NAME, first_step)
        try:
            if append:
                _drop_unfinished_line(self._metrics_path)
            self._metrics = open(self._metrics_path, "a" if append else "w", encoding="utf-8")  # noqa: SIM115  # closed in close()
            try:
                self._log = logging.FileHandler(folder / _of_rank(LOG_NAME, rank), "a" if append else "w", encoding="utf-8")
            except OSError:
                self._metrics.close()
                raise
        except OSError as error:
            raise _unwritable(folder, error) from error
        self._log.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))

    def say(self, text: str) -> None:
        """Write a line to train_log.log, and to standard error unless it is to be quiet."""
        self._write(logging.INFO, text)

    def warn(self, text: str) -> None:
        """Write a warning to train_log.log and to standard error."""
        self._write(logging.WARNING, text)

    def _write(self, level: int, text: str) -> None:
        if self._silent:
            return
        record = log.makeRecord("txl_train", level, __file__, 0, self._prefix + text, (), None)
        if self._log is not None:
            self._log.handle(record)
        if log.isEnabledFor(level):
            log.handle(record)

    def measure(self, kind: str, *, step: int, **values: Any) -> None:
        """Add an object to metrics.jsonl; a number that is not finite becomes null, for JSON has none."""
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{key}", value, step)
        if self._metrics is None:
            return
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        try:
            self._metrics.write(json.dumps({"kind": kind, "step": step, **finite}, allow_nan=False) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise _unwritable(self._metrics_path, error) from error

    def close(self) -> None:
        """Close the files."""
        if self._board is not None:
            self._board.close()
        if self._log is not None:
            self._log.close()
        if self._metrics is not None:
            try:
                self._metrics.close()
            except OSError as error:
                raise _unwritable(self._metrics_path, error) from error


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


def nll_figure(nll: float, char: bool) -> dict[str, float]:
    """The figure people quote for a mean nll: bits per character, or perplexity."""
    return {"bits_per_char": metrics.bits_per_char(nll)} if char else {"perplexity": metrics.perplexity(nll)}


def _of_rank(name: str, rank: int) -> str:
    """Name the file of a process: the first one's has the plain name."""
    stem, _, suffix = name.partition(".")
    return f"{stem}.rank{rank}.{suffix}" if rank else name


def _open_board(folder: Path, first_step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EnvironmentUnfitError("TensorBoard is not installed.", remedy="Install it with `pip install 'txl[tensorboard]'`.") from error
    return SummaryWriter(str(folder), purge_step=first_step + 1)


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
