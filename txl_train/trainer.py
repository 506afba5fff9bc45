"""Training: the optimizer step, its counters and its state.

`Trainer` knows one step and how to continue exactly where a checkpoint left off; what happens around the steps is done by callbacks,
and what a whole run is made of stands in `run`.

Memory starts empty at each epoch, and each of the `batch_chunk` parts of a batch carries its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from txl_train.callbacks import LAST_NAME, Callback, Ending, Progress, StepReport, by_signal
from txl_train.checkpoint import Checkpoint
from txl_train.config import RunConfig
from txl_train.data.segments import Segment, SegmentIterator
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import CheckpointError, UsageError, ValidationError
from txl_train.model.memory import Memory
from txl_train.model.transformer_xl import TransformerXL
from txl_train.optim.build import build_optimizer
from txl_train.optim.schedules import learning_rate
from txl_train.precision import Precision

_CONTINUE_SLOWER = f"{LAST_NAME} is as it was: continue from it with `--resume` and a smaller `--lr`."


class Trainer:
    """Trains a model on one sequence of tokens.

    Args:
        config: the settings; those of `optim` and `train` are used here.
        model: is moved to `device` and trained in place.
        train_ids: the training text, [N].
        vocabulary: of the text; kept in checkpoints.
        run: what checkpoints keep as their `run`.
        device: where to compute.
        callbacks: called in this order.

    Raises:
        EnvironmentUnfitError: the device cannot compute in the precision asked for.
    """

    def __init__(
        self,
        config: RunConfig,
        model: TransformerXL,
        train_ids: npt.NDArray[Any],
        *,
        vocabulary: Vocabulary,
        run: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.vocabulary = vocabulary
        self.callbacks = list(callbacks)
        self.progress = Progress()
        self.segments = SegmentIterator(train_ids, batch_size=config.train.batch_size, tgt_len=config.train.tgt_len)
        self.precision = Precision(config.train.dtype, self.device)
        self.optimizer = build_optimizer(config.optim, self.model.parameters())
        self.memories = self._cold_memories()
        self._signal: Ending | None = None
        self._other_ending: Ending | None = None
        self._run = dict(run or {})
        self._train_ids_crc32 = _crc32(train_ids)
        self._unchecked: list[StepReport] = []
        self._clock_start: float | None = None

    @property
    def max_step(self) -> int:
        return self.config.train.max_step

    @property
    def batches_per_epoch(self) -> int:
        return len(self.segments)

    @property
    def loss_scale(self) -> float | None:
        return self.precision.loss_scale

    @property
    def ending(self) -> Ending | None:
        """Why the run is to end; None while it goes on. A signal goes before every other reason, also one that was given earlier."""
        return self._signal or self._other_ending

    def run(self) -> Ending:
        """Train until `max_step`, or until a callback stops the run, and return why it ended.

        A signal counts until the callbacks' `end` is over, for what they do there may take long.

        Raises:
            ValidationError: the loss or the gradients are not finite.
        """
        try:
            for callback in self.callbacks:
                callback.start(self)
            self._start_clock()
            while self.progress.step < self.max_step and self.ending is None:
                report = self.step()
                for callback in self.callbacks:
                    callback.after_step(self, report)
            for callback in self.callbacks:
                callback.end(self, self.ending or "finished")
            return self.ending or "finished"
        finally:
            self._stop_clock()
            for callback in reversed(self.callbacks):
                callback.close()

    def step(self) -> StepReport:
        """Take one optimizer step on the next batch; the loss is the mean over the batch's tokens.

        Raises:
            ValidationError: the loss or the gradients of this step, or of one of the last `log_interval` on a GPU, are not finite.
        """
        progress, optim = self.progress, self.config.optim
        if progress.batch == len(self.segments):
            progress.epoch, progress.batch = progress.epoch + 1, 0
            self.memories = self._cold_memories()
        segment = self.segments.segment(progress.batch)
        n_tokens = int(segment.counted_BT.sum())
        lr = learning_rate(optim, progress.step + 1, self.max_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        parts = (self._parts(array) for array in (segment.input_ids_BT, segment.target_ids_BT, segment.counted_BT))
        for i, (input_ids_BT, target_ids_BT, counted_BT) in enumerate(zip(*parts, strict=True)):
            with self.precision.autocast():
                hidden_BTD, self.memories[i] = self.model(input_ids_BT, self.memories[i])
                nll_BT = self.model.nll(hidden_BTD, target_ids_BT)
                part_of_loss = (nll_BT * counted_BT).sum() / n_tokens
            self.precision.backward(part_of_loss)
            loss += part_of_loss.detach()
        self._forget_unused_clusters(segment)
        grad_norm = self.precision.clip(self.optimizer, self.model.parameters(), optim.clip)
        self.precision.step(self.optimizer)

        progress.step += 1
        progress.batch += 1
        progress.tokens += n_tokens
        report = StepReport(progress.step, lr, loss, grad_norm, n_tokens)
        self._unchecked.append(report)
        if self.device.type == "cpu" or len(self._unchecked) >= self.config.train.log_interval:
            self._check_finite()
        return report

    def stop(self, ending: Ending) -> None:
        """End the run after the step under way. The first signal stays, else the first reason given."""
        if by_signal(ending):  # kept apart: called within a signal handler, perhaps between the test and the assignment below
            self._signal = self._signal or ending
        else:
            self._other_ending = self._other_ending or ending

    def train_seconds(self) -> float:
        """Time spent in steps since the first start, without what happened in `paused`."""
        return self.progress.train_seconds + (0.0 if self._clock_start is None else time.perf_counter() - self._clock_start)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within does not count as training."""
        self._stop_clock()
        try:
            yield
        finally:
            self._start_clock()

    def _start_clock(self) -> None:
        self._clock_start = time.perf_counter()

    def _stop_clock(self) -> None:
        self.progress.train_seconds, self._clock_start = self.train_seconds(), None

    def checkpoint(self, *, training: bool) -> Checkpoint:
        """Return the run as it is now, with or without what continuing needs.

        Raises:
            ValidationError: the loss or the gradients of one of the last steps are not finite, or the weights after it.
        """
        self._check_finite()
        model = self.model.parameters_by_name()
        if spoiled := [name for name, weight in model.items() if not bool(weight.isfinite().all())]:
            raise ValidationError(
                f"Training diverged: after step {self.progress.step} the weights {spoiled[0]} are not finite.",
                remedy=_CONTINUE_SLOWER,
            )
        state: dict[str, Any] | None = None
        if training:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.precision.state_dict(),
                "rng": self._rng_state(),
                "memory": [{"states": memory.states, "length_B": memory.length_B} for memory in self.memories],
                "train_ids_crc32": self._train_ids_crc32,
            }
        return Checkpoint(
            model_config=self.model.config,
            model=model,
            vocabulary=self.vocabulary,
            dataset=self.config.data.dataset,
            run=self._run,
            progress=dataclasses.asdict(dataclasses.replace(self.progress, train_seconds=self.train_seconds())),
            training=state,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` left off: weights, optimizer, random generators, memory, position in the data.

        The optimizer's hyper-parameters are those of the settings, not of the checkpoint.

        Raises:
            UsageError: it holds no training state, or belongs to another text, model or batch.
            CheckpointError: its training state is not what this program writes.
        """
        state = checkpoint.training
        if state is None:
            raise UsageError("This checkpoint is for use only and holds no training state.", remedy=f"Continue from {LAST_NAME} instead.")
        if checkpoint.vocabulary.sha256 != self.vocabulary.sha256 or state.get("train_ids_crc32") != self._train_ids_crc32:
            raise UsageError("The text is not the one this checkpoint was trained on.", remedy="Give the same `--data`, or train anew.")
        if checkpoint.model_config != self.model.config or len(state.get("memory", [])) != len(self.memories):
            raise UsageError(
                "The model or the parts of its batch are not those of this checkpoint.", remedy="Leave such settings out, or train anew."
            )
        self.model.load_parameters(checkpoint.model)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:  # loading brought the checkpoint's; `lr` is set before each step
                group["weight_decay"] = self.config.optim.weight_decay
            self.precision.load_state_dict(state["scaler"])
            self.progress = Progress(**checkpoint.progress)
            self.memories = [
                Memory([tensor.to(self.device) for tensor in memory["states"]], memory["length_B"].to(self.device))
                for memory in state["memory"]
            ]
            self._restore_rng(state["rng"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"The checkpoint's training state is not understood: {error}.", remedy="Train anew.") from error

    def _cold_memories(self) -> list[Memory]:
        train = self.config.train
        return [self.model.initial_memory(train.batch_size // train.batch_chunk) for _ in range(train.batch_chunk)]

    def _forget_unused_clusters(self, segment: Segment) -> None:
        """Drop the gradients, all 0, of tail clusters that no token of the batch belongs to, so that the optimizer leaves them alone.

        Otherwise LAMB would go on moving them at full speed along their last gradient, since the trust ratio undoes its decay.
        """
        config, model = self.model.config, self.model
        if config.n_cluster == 0 or config.div_val == 1:  # one table for all words
            return
        used: set[int] = set()
        for ids_BT, lists in (
            (segment.input_ids_BT, (model.embedding.weights, model.embedding.projections)),
            (segment.target_ids_BT, (model.head.weights, model.head.biases, model.head.projections)),
        ):
            for cluster in np.unique(np.searchsorted(config.cutoffs, ids_BT, side="right")):
                used |= {id(parameters[cluster]) for parameters in lists}
        for parameters in (
            model.embedding.weights,
            model.embedding.projections,
            model.head.weights,
            model.head.biases,
            model.head.projections,
        ):
            for parameter in parameters:
                if id(parameter) not in used:
                    parameter.grad = None

    def _parts(self, array_BT: npt.NDArray[Any]) -> tuple[Tensor, ...]:
        return torch.from_numpy(np.ascontiguousarray(array_BT)).to(self.device, non_blocking=True).chunk(self.config.train.batch_chunk)

    def _check_finite(self) -> None:
        reports, self._unchecked = self._unchecked, []
        for report in reports:
            loss, grad_norm = float(report.loss), float(report.grad_norm)
            overflow = self.precision.dtype == "fp16" and np.isfinite(loss)  # the loss scale takes care of that
            if not (np.isfinite(loss) and (np.isfinite(grad_norm) or overflow)):
                raise ValidationError(
                    f"Training diverged: at step {report.step} the loss is {loss}, its gradient's norm {grad_norm}, lr {report.lr:.3e}.",
                    remedy=_CONTINUE_SLOWER,
                )

    def _rng_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _restore_rng(self, state: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


def _crc32(ids: npt.NDArray[Any]) -> int:
    checksum = 0
    for start in range(0, len(ids), 1 << 20):
        checksum = zlib.crc32(np.ascontiguousarray(ids[start : start + (1 << 20)]).tobytes(), checksum)
    return checksum
