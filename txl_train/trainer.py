"""Training: the optimizer step, its counters and its state.

`Trainer` knows one step and how to continue exactly where a checkpoint left off. Which tokens a step reads stands in `order`, how
they are spread over parts, devices and processes in `parallel`; what happens around the steps is done by callbacks, and what a whole
run is made of stands in `run`.

Memory starts empty at each epoch (with `compat` nvidia-2023 only at the first), and each stream carries its own.
"""

# Shape suffixes: B streams, T tokens of a segment

from __future__ import annotations

import contextlib
import dataclasses
import math
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
from txl_train.config import RunConfig, TrainConfig
from txl_train.data.segments import Segment
from txl_train.data.vocabulary import Vocabulary
from txl_train.distributed import World
from txl_train.errors import CheckpointError, UsageError, ValidationError
from txl_train.exhaustion import what_ran_out
from txl_train.finite import spoiled_gradients
from txl_train.model.memory import Memory
from txl_train.model.sampled import SampledSoftmax
from txl_train.model.transformer_xl import TransformerXL
from txl_train.optim.build import build_optimizer
from txl_train.optim.schedules import Schedule
from txl_train.order import TrainingOrder
from txl_train.parallel import Engine
from txl_train.precision import Precision

_LOOK_CLOSER = "With `--log-interval 1` each step is looked at before it moves the weights, and the place is named."
_CONTINUE_SLOWER = (
    f"If there is a {LAST_NAME}, it is as it was: continue from it with `--resume` and a smaller `--lr`; otherwise begin with one."
)
_SMALLEST_LOSS_SCALE = 2.0**-14
"""A loss scale halved thirty times in fp16 means gradients that are never finite, not ones that are too large."""
_ENDINGS: tuple[Ending | None, ...] = (None, "finished", "max_minutes", "sigterm", "sigint")
"""Later ones go before earlier ones where processes have several."""


class Trainer:
    """Trains a model on one sequence of tokens.

    Args:
        config: the settings; those of `optim` and `train` are used here.
        model: is moved to the device and trained in place.
        train_ids: the training text, [N].
        vocabulary: of the text; kept in checkpoints.
        run: what checkpoints keep as their `run`.
        device: where to compute; several for data parallelism within the process.
        world: the processes that train together; every one makes its own trainer, with the same arguments but the device.
        sentence_end: id that ends each sentence, if training shuffles whole sentences.
        callbacks: called in this order.

    Raises:
        ConfigError: the batch cannot be divided into the parts asked for.
        UsageError: the streams cannot be divided equally among the processes.
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
        device: torch.device | str | Sequence[torch.device] = "cpu",
        world: World | None = None,
        sentence_end: int | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        train = config.train
        devices = [torch.device(device)] if isinstance(device, (str, torch.device)) else list(device)
        self.config = config
        self.device = devices[0]
        self.world = world or World()
        self.model = model.to(self.device)
        self.vocabulary = vocabulary
        self.callbacks = list(callbacks)
        self.progress = Progress()
        self.precision = Precision(train.dtype, self.device)
        sampled = None if train.sample_softmax is None else SampledSoftmax(model.config, train.sample_softmax)
        self.engine = Engine(self.model, train, devices=devices, world=self.world, sampled=sampled)
        self.order = TrainingOrder(
            ids_N=train_ids,
            batch_size=train.batch_size,
            tgt_len=train.tgt_len,
            ext_len=model.config.ext_len,
            streams=self.world.share(train.batch_size),
            roll=train.roll,
            varlen=train.varlen,
            sentence_end=sentence_end,
            compat=train.compat,
            seed=train.seed,
        )
        self.segments = self.order.epoch(1)
        self.schedule = Schedule(config.optim, train.max_step, train.compat)
        self.optimizer = build_optimizer(config.optim, self.model.parameters(), compat=train.compat)
        self.memories = self._cold_memories()
        self._signal: Ending | None = None
        self._other_ending: Ending | None = None
        self._agreed: Ending | None = None
        self._run = dict(run or {})
        self._train_ids_crc32 = _crc32(train_ids)
        self._unchecked: list[StepReport] = []
        self._clock_start: float | None = None
        embeddings = {id(parameter) for parameter in self.model.embedding.parameters()} if config.optim.clip_nonemb else set()
        self._clipped = [parameter for parameter in self.model.parameters() if id(parameter) not in embeddings]

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
        """Why the run is to end; None while it goes on. A signal goes before every other reason, also one that was given earlier.

        Of several processes, each has its own reasons until they `agree`.
        """
        return self._agreed if self.world.size > 1 else self._signal or self._other_ending

    def agree(self) -> Ending | None:
        """Return why the run is to end, the same in all processes, which must all call this."""
        own = self._signal or self._other_ending
        if self.world.size > 1:
            self._agreed = _ENDINGS[self.world.largest(_ENDINGS.index(own))]
        return self.ending

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
            while self.progress.step < self.max_step and self.agree() is None:
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
        """Take one optimizer step on the next batch; the loss is the mean over the batch's tokens (of several processes, a part of it).

        Raises:
            ValidationError: the loss or the gradients of this step are not finite, and the weights are as they were; or, on a GPU, those of
                one of the last `log_interval` steps.
        """
        progress, optim = self.progress, self.config.optim
        if progress.batch == len(self.segments):
            progress.epoch, progress.batch = progress.epoch + 1, 0
            self.segments = self.order.epoch(progress.epoch)
            if self.config.train.compat != "nvidia-2023" or self.model.config.ext_len:  # which cannot follow the memory there
                self.memories = self._cold_memories()
        segment = self.segments.segment(progress.batch)
        n_tokens = self.segments.n_counted_in(progress.batch)
        lr = self.schedule.learning_rate(progress.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        batch = (torch.from_numpy(segment.input_ids_BT), torch.from_numpy(segment.target_ids_BT), torch.from_numpy(segment.counted_BT))
        before = self.memories
        loss, self.memories = self.engine.run(batch, before, n_tokens, self.precision)
        self._forget_unused_clusters(segment)
        grad_norm = self.precision.norm(self.optimizer, self._clipped)
        report = StepReport(progress.step + 1, lr, loss, grad_norm, n_tokens)
        looks = self.device.type == "cpu" or self.config.train.log_interval == 1
        if looks and self._is_spoiled(report):
            raise self._diverged(report, self._place(report, batch, before))
        self.precision.clip(self._clipped, optim.clip, grad_norm)
        if not self.precision.step(self.optimizer):
            progress.skipped_steps += 1

        progress.step += 1
        progress.batch += 1
        progress.tokens += n_tokens
        self._unchecked.append(report)
        if looks or len(self._unchecked) >= self.config.train.log_interval:
            self._check_finite()
        return report

    def stop(self, ending: Ending) -> None:
        """End the run after the step under way. The first signal stays, else the first reason given."""
        if by_signal(ending):  # kept apart: called within a signal handler, perhaps between the test and the assignment below
            self._signal = self._signal or ending
        else:
            self._other_ending = self._other_ending or ending

    def observe(self, valid_nll: float) -> None:
        """Tell the schedule of the learning rate how valid.txt was scored, nats per token."""
        self.schedule.observe(valid_nll, self.progress.step)

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
        if self.device.type == "cuda" and self._clock_start is not None:
            for device in self.engine.devices:
                torch.cuda.synchronize(device)
        self.progress.train_seconds, self._clock_start = self.train_seconds(), None

    def checkpoint(self, *, training: bool) -> Checkpoint:
        """Return the run as it is now, with or without what continuing needs. All processes must call it together.

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
                "schedule": self.schedule.state_dict(),
                "rng": self._rng_states(),
                "memory": self._whole_memory()._asdict(),
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
        if checkpoint.model_config != self.model.config:
            raise UsageError("The model is not that of this checkpoint.", remedy="Leave such settings out, or train anew.")
        self.model.load_parameters(checkpoint.model)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:  # loading brought the checkpoint's; `lr` is set before each step
                group.update({key: value for key, value in self.optimizer.defaults.items() if key in ("weight_decay", "momentum")})
            self.precision.load_state_dict(state["scaler"])
            self.schedule.load_state_dict(state.get("schedule", {}))
            self.progress = Progress(**checkpoint.progress)
            self.segments = self.order.epoch(self.progress.epoch)
            self.memories = self.engine.split(self._own_memory(state["memory"]))
            self._restore_rng(state["rng"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if what_ran_out(error):
                raise
            raise CheckpointError(f"The checkpoint's training state is not understood: {error}.", remedy="Train anew.") from error

    def _cold_memories(self) -> list[Memory]:
        return self.engine.split(self.model.initial_memory(self.engine.n_streams))

    def _whole_memory(self) -> Memory:
        """The memory of all streams of all processes, in order, on the CPU."""
        parts = zip(*(memory.states for memory in self.memories))
        own = [torch.cat([state.cpu() for state in states]) for states in parts]
        length_B = torch.cat([memory.length_B.cpu() for memory in self.memories])
        return Memory([torch.cat(self.world.gather(state)) for state in own], torch.cat(self.world.gather(length_B)))

    def _own_memory(self, saved: Any) -> Memory:
        """This process' streams of a saved memory of all."""
        if isinstance(saved, list):  # as version 0.2 wrote it: one memory for each part of the batch
            states = [torch.cat(parts) for parts in zip(*(memory["states"] for memory in saved))]
            saved = {"states": states, "length_B": torch.cat([memory["length_B"] for memory in saved])}
        if len(saved["length_B"]) != self.config.train.batch_size:
            raise ValueError(f"its memory is of {len(saved['length_B'])} streams, not of {self.config.train.batch_size}")
        streams = self.world.share(self.config.train.batch_size)
        return Memory([state[streams] for state in saved["states"]], saved["length_B"][streams])

    def _forget_unused_clusters(self, segment: Segment) -> None:
        """Drop the gradients, all 0, of tail clusters that no token of the batch belongs to, so that the optimizer leaves them alone.

        Otherwise LAMB would go on moving them at full speed along their last gradient, since the trust ratio undoes its decay.
        """
        config, model = self.model.config, self.model
        if config.n_cluster == 0 or config.div_val == 1:  # one table for all words
            return
        if self.config.train.compat == "nvidia-2019":  # which sets gradients to zero rather than to none
            return
        counts = [
            np.bincount(np.searchsorted(config.cutoffs, ids_BT, side="right").ravel(), minlength=config.n_cluster + 1)
            for ids_BT in (segment.input_ids_BT, segment.target_ids_BT)
        ]
        total = np.array(self.world.sum(np.concatenate(counts).astype(float).tolist())).reshape(2, -1)
        used: set[int] = set()
        for count_of, lists in (
            (total[0], (model.embedding.weights, model.embedding.projections)),
            (total[1], (model.head.weights, model.head.biases, model.head.projections)),
        ):
            for cluster in np.flatnonzero(count_of):
                used |= {id(parameters[int(cluster)]) for parameters in lists}
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

    def _check_finite(self) -> None:
        reports, self._unchecked = self._unchecked, []
        for report in reports:
            if self._is_spoiled(report):
                raise self._diverged(report, None)
        scale = self.precision.loss_scale if reports else None
        if scale is not None and scale < _SMALLEST_LOSS_SCALE:
            raise ValidationError(
                f"Training diverged: up to step {reports[-1].step} gradients were so seldom finite that the loss scale fell to {scale:g}.",
                remedy=f"{_CONTINUE_SLOWER} Or use `--dtype bf16` or fp32.",
            )

    def _is_spoiled(self, report: StepReport) -> bool:
        """Whether a step is not to count: its loss is not finite, or its gradients, unless the loss scale takes care of them."""
        loss_is_finite = math.isfinite(float(report.loss))
        return not (loss_is_finite and (self.precision.dtype == "fp16" or math.isfinite(float(report.grad_norm))))

    def _place(self, report: StepReport, batch: tuple[Tensor, Tensor, Tensor], memories: list[Memory]) -> str:
        """Return what of the step under way is not finite first; the gradients are not clipped yet."""
        if math.isfinite(float(report.loss)):
            return spoiled_gradients(self.model.named_parameters())
        place = self.engine.first_not_finite(batch, memories, self.precision)
        return place or "not found, as with other values dropped out all is finite"

    def _diverged(self, report: StepReport, place: str | None) -> ValidationError:
        first = "" if place is None else f" First not finite: {place}."
        return ValidationError(
            f"Training diverged: at step {report.step} the loss is {float(report.loss)}, its gradient's norm {float(report.grad_norm)}, "
            f"lr {report.lr:.3e}.{first}",
            remedy=_CONTINUE_SLOWER if place is not None else f"{_CONTINUE_SLOWER} {_LOOK_CLOSER}",
        )

    def _rng_states(self) -> list[dict[str, Tensor]]:
        """Of each process."""
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own |= {f"cuda{number or ''}": torch.cuda.get_rng_state(device) for number, device in enumerate(self.engine.devices)}
        of_each = {name: self.world.gather(state) for name, state in own.items()}
        return [{name: states[rank] for name, states in of_each.items()} for rank in range(self.world.size)]

    def _restore_rng(self, saved: Any) -> None:
        states: list[Mapping[str, Tensor]] = saved if isinstance(saved, list) else [saved]  # version 0.2 wrote that of its one process
        if len(states) != self.world.size:  # no state continues exactly: each process gets random numbers of its own
            seed_process(self.config.train, self.world, self.engine.devices, self.progress.step * self.world.size)
            return
        state = states[self.world.rank]
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda":
            for number, device in enumerate(self.engine.devices):
                if (saved_state := state.get(f"cuda{number or ''}")) is not None:
                    torch.cuda.set_rng_state(saved_state, device)


def seed_process(train: TrainConfig, world: World, devices: Sequence[torch.device], offset: int = 0) -> None:
    """Give each process, and each of its devices, random numbers of its own; with `compat` nvidia-2023 all processes have the same."""
    torch.manual_seed(train.seed + offset + (0 if train.compat == "nvidia-2023" else world.rank))
    for number, device in enumerate(devices):
        if number:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(train.seed + offset + number)


def _crc32(ids: npt.NDArray[Any]) -> int:
    checksum = 0
    for start in range(0, len(ids), 1 << 20):
        checksum = zlib.crc32(np.ascontiguousarray(ids[start : start + (1 << 20)]).tobytes(), checksum)
    return checksum
