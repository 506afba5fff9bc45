"""A training run as a whole: opens the text, builds or restores the model, trains it, and scores the best checkpoint on test.txt.

Knows which files a work folder holds and what may change when a run is continued. How a step is computed stands in `trainer`, what
happens around the steps in `callbacks`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from txl_train.callbacks import (
    BEST_NAME,
    LAST_NAME,
    LOG_NAME,
    METRICS_NAME,
    Ending,
    EvaluateAndSave,
    LogProgress,
    Progress,
    ProgressBar,
    RunRecord,
    StopOnSignal,
    TimeLimit,
    by_signal,
    end_line,
    nll_figure,
    result_figures,
)
from txl_train.checkpoint import Checkpoint, load_model
from txl_train.config import DataConfig, ModelConfig, RunConfig, TrainConfig, to_dict
from txl_train.data import pydoc
from txl_train.data.corpus import Corpus, load_corpus
from txl_train.data.datasets import default_cutoffs, get_dataset
from txl_train.data.segments import SegmentIterator
from txl_train.device import resolve_device
from txl_train.errors import ConfigError, DataError, EnvironmentUnfitError, UsageError
from txl_train.evaluate import EvalResult, ModelStepper, evaluate
from txl_train.model.inference import with_lengths
from txl_train.model.transformer_xl import TransformerXL
from txl_train.settings import Resolved
from txl_train.trainer import Trainer

log = logging.getLogger(__name__)

SETTINGS_NAME = "config.yaml"

_FIXED_ON_RESTART = ("data.dataset", "data.min_count", "optim.optim", "train.batch_size", "train.batch_chunk", "train.tgt_len")
"""Settings that the kept optimizer state, memory and position in the data depend on; so do all of the model's."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came out of `train`: figures with their units in their names, and where the files are."""

    ending: Ending
    progress: Progress
    dataset: str
    vocab_size: int
    n_parameters: int
    char: bool
    valid: EvalResult | None
    """The last evaluation on valid.txt of this start; None if there was none."""
    test: EvalResult | None
    """The best checkpoint on test.txt; None where a signal ended the run."""
    eval_tgt_len: int
    eval_mem_len: int
    work_dir: Path
    data_folder: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        progress, folder = self.progress, self.work_dir
        best = progress.best_valid_nll
        return {
            "ending": self.ending,
            "steps": progress.step,
            "epoch": progress.epoch,
            "tokens": progress.tokens,
            "train_seconds": progress.train_seconds,
            "tokens_per_s": progress.tokens / progress.train_seconds if progress.train_seconds else None,
            "dataset": self.dataset,
            "data": str(self.data_folder),
            "vocab_size": self.vocab_size,
            "parameters": self.n_parameters,
            "eval_tgt_len": self.eval_tgt_len,
            "eval_mem_len": self.eval_mem_len,
            "best": None if best is None else {"step": progress.best_step, "nll_nats_per_token": best, **nll_figure(best, self.char)},
            "valid": None if self.valid is None else result_figures(self.valid, self.char),
            "test": None if self.test is None else result_figures(self.test, self.char),
            "work_dir": str(folder),
            "checkpoint_best": str(folder / BEST_NAME) if (folder / BEST_NAME).exists() else None,
            "checkpoint_last": str(folder / LAST_NAME) if (folder / LAST_NAME).exists() else None,
            "metrics": str(folder / METRICS_NAME),
            "log": str(folder / LOG_NAME),
            "settings": str(folder / SETTINGS_NAME),
        }


def train(
    resolved: Resolved,
    *,
    continue_from: Checkpoint | None = None,
    in_place: bool = True,
    overwrite: bool = False,
    show_progress: bool = True,
) -> TrainResult:
    """Do all of `txl train`: open the text, build or restore the model, train, and score the best checkpoint on test.txt.

    Args:
        resolved: the settings; a `continue_from` must have been among their sources.
        continue_from: a checkpoint with training state.
        in_place: that checkpoint is the work folder's own, so the records there are continued; otherwise the folder must be new.
        overwrite: delete the run that the work folder holds.
        show_progress: draw a bar where standard error is a terminal.

    Raises:
        UsageError: the work folder holds a run already, or the settings contradict the checkpoint.
        DataError: the text is missing, empty or too short.
        EnvironmentUnfitError: there is no such device or precision here, or a file cannot be written.
        ValidationError: training diverged.
    """
    config = resolved.config
    if continue_from is not None:
        _check_unchanged(continue_from, config)
    in_place = in_place and continue_from is not None
    folder = Path(config.train.work_dir)
    device = torch.device(resolve_device(config.train.device))
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    _make_folder(folder, may_hold_a_run=in_place or overwrite)
    corpus = open_corpus(config.data, folder)
    model_config = complete_model_config(config.model, corpus)
    valid_ids, test_ids = (_evaluation_ids(corpus, split, config.train) for split in ("valid", "test"))
    torch.manual_seed(config.train.seed)
    run = resolved.to_dict() | {"data_folder": str(corpus.directory.resolve())}
    trainer = Trainer(config, TransformerXL(model_config), corpus.ids("train"), vocabulary=corpus.vocabulary, run=run, device=device)
    if continue_from is not None:
        trainer.restore(continue_from)

    # All that was asked for fits: from here on, what is in the folder is changed.
    if not in_place:
        for name in (LAST_NAME, BEST_NAME):
            (folder / name).unlink(missing_ok=True)
    if not (folder / BEST_NAME).exists():  # a best score without its weights is worth nothing
        trainer.progress.best_valid_nll = trainer.progress.best_step = None
    resolved.save(folder / SETTINGS_NAME)
    score = _Scorer(evaluation_config(model_config, config.train), config.train, device)
    char = corpus.vocabulary.unit != "word"
    with contextlib.closing(RunRecord(folder, append=in_place)) as record:
        _record_start(record, trainer, corpus, continuing=continue_from is not None)
        for line in resolved.differences:
            record.say(line)
        evaluation = EvaluateAndSave(
            record,
            folder,
            config.train.eval_interval,
            lambda on_step: score(trainer.model, valid_ids, max_segments=config.train.eval_max_steps, on_step=on_step),
            char=char,
        )
        trainer.callbacks = [StopOnSignal(), LogProgress(record, config.train.log_interval, char=char)]
        if config.train.max_minutes is not None:
            trainer.callbacks.append(TimeLimit(config.train.max_minutes))
        trainer.callbacks.append(evaluation)
        if show_progress and ProgressBar.is_wanted():
            trainer.callbacks.append(ProgressBar())
        ending = trainer.run()

        progress, test = trainer.progress, None
        if by_signal(ending):
            record.say(f"Stopped at step {progress.step}; the run is saved in {folder / LAST_NAME}. Continue with `--resume`.")
        else:
            test = score(load_model(folder / BEST_NAME)[0].to(device), test_ids)
            record.say("=" * 100)
            record.say(end_line(test.seconds, test.nll_nats_per_token, char=char))
            record.say("=" * 100)
            record.measure("test", step=progress.best_step, **result_figures(test, char))
        record.say(f"Training time: {progress.train_seconds / 60:.2f} minutes")
        record.say(f"Training throughput: {progress.tokens / max(progress.train_seconds, 1e-9):.2f} tok/s")
    return TrainResult(
        ending=ending,
        progress=progress,
        dataset=config.data.dataset,
        vocab_size=model_config.vocab_size,
        n_parameters=n_parameters(trainer.model),
        char=char,
        valid=evaluation.result,
        test=test,
        eval_tgt_len=config.train.eval_tgt_len,
        eval_mem_len=score.config.mem_len,
        work_dir=folder,
        data_folder=corpus.directory,
    )


@dataclass(frozen=True)
class _Scorer:
    """Scores a text the way evaluation during training does, in fp32."""

    config: ModelConfig
    train: TrainConfig
    device: torch.device

    def __call__(
        self,
        model: TransformerXL,
        ids: npt.NDArray[Any],
        *,
        max_segments: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> EvalResult:
        batch_size, tgt_len = self.train.eval_batch_size, self.train.eval_tgt_len
        segments = SegmentIterator(ids, batch_size=batch_size, tgt_len=tgt_len)
        stepper = ModelStepper(model.eval(), tgt_len=tgt_len, config=self.config)
        return evaluate(stepper, segments, batch_size=batch_size, device=self.device, max_segments=max_segments, on_step=on_step)


def open_corpus(config: DataConfig, work_dir: Path) -> Corpus:
    """Open the text `config` names; a built-in one is written into `work_dir`/data first. The token cache is in `work_dir`/cache.

    Raises:
        DataError: the folder or a file is missing, empty or not as the data set promises.
        ConfigError: there is no such data set, or it needs a folder and none is given.
    """
    spec = get_dataset(config.dataset)
    if config.data is not None:
        folder = Path(config.data)
    elif spec.built_in:
        folder = pydoc.build(work_dir / "data" / spec.name).directory
    else:
        raise ConfigError(
            f"Data set `{spec.name}` is read from a folder, but none is given.",
            remedy="Give it with `--data DIR`; `--dataset pydoc` needs none.",
        )
    cache_dir = None if os.environ.get("TXL_CACHE_DIR") else work_dir / "cache"
    return load_corpus(folder, spec, cache_dir=cache_dir, min_count=config.min_count)


def complete_model_config(config: ModelConfig, corpus: Corpus) -> ModelConfig:
    """Fill in what depends on the text: the vocabulary's size, and the data set's cutoffs if `adaptive` is set without any.

    Raises:
        ConfigError: the settings contradict the text or each other.
    """
    vocab_size = len(corpus.vocabulary)
    if config.vocab_size not in (0, vocab_size):
        raise ConfigError(f"`vocab_size` must be 0 or the vocabulary's size {vocab_size}, but is {config.vocab_size} instead.")
    if config.cutoffs and not config.adaptive:
        log.info("The cutoffs %s are not used: they belong to the adaptive softmax (`--adaptive`).", list(config.cutoffs))
    cutoffs = config.cutoffs if config.adaptive else ()
    if config.adaptive and not cutoffs:
        cutoffs = default_cutoffs(corpus.spec, vocab_size)
        if not cutoffs:
            log.info("A vocabulary of %d tokens gains nothing from the adaptive softmax: using a plain one.", vocab_size)
    return dataclasses.replace(config, vocab_size=vocab_size, cutoffs=cutoffs, adaptive=bool(cutoffs))


def evaluation_config(config: ModelConfig, train: TrainConfig) -> ModelConfig:
    """Return the model's configuration for evaluation during training: as in NVIDIA's code, the reach stays that of training.

    Memory and segment together are as long as in training: mem_len + tgt_len - eval_tgt_len positions of memory; without memory, none.
    """
    mem_len = max(0, config.mem_len + train.tgt_len - train.eval_tgt_len) if config.mem_len else 0
    return with_lengths(config, mem_len=mem_len)


def n_parameters(model: TransformerXL) -> int:
    """Number of weights; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _make_folder(folder: Path, *, may_hold_a_run: bool) -> None:
    """Make the work folder, or see to it that no run in it is lost by mistake."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"The work folder {folder} is a file.", remedy="Choose another with `--work-dir`.") from None
    except OSError as error:
        raise EnvironmentUnfitError(
            f"The work folder {folder} cannot be made: {error.strerror}.", remedy="Choose another with `--work-dir`."
        ) from error
    if not may_hold_a_run and any((folder / name).exists() for name in (LAST_NAME, BEST_NAME)):
        raise UsageError(
            f"{folder} holds a trained model already.",
            remedy="Continue it with `--resume`, train in another `--work-dir`, or begin anew with `--overwrite`, which deletes it.",
        )


def _check_unchanged(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Raise unless the settings agree with the checkpoint's where they must."""
    before, now = _flat(checkpoint.settings), _flat(to_dict(config))
    changed = [
        name for name in before if name in now and before[name] != now[name] and (name.startswith("model.") or name in _FIXED_ON_RESTART)
    ]
    if changed:
        listed = ", ".join(f"{name} was {before[name]} and would be {now[name]}" for name in changed)
        raise UsageError(
            f"A run is continued as it was, but {listed}.", remedy="Leave these settings out, or train anew in another `--work-dir`."
        )


def _evaluation_ids(corpus: Corpus, split: str, train: TrainConfig) -> npt.NDArray[Any]:
    """The ids of `split`; evaluation's own limits are checked before training, not after."""
    ids = corpus.ids(split)
    if len(ids) - 1 < train.eval_batch_size:
        raise DataError(
            f"The {split} split of {corpus.directory} has {len(ids)} tokens, too few for {train.eval_batch_size} streams.",
            remedy=f"Give `--eval-batch-size {max(1, len(ids) - 1)}` or smaller, or a longer text.",
        )
    return ids


def _record_start(record: RunRecord, trainer: Trainer, corpus: Corpus, *, continuing: bool) -> None:
    config, model_config = trainer.config, trainer.model.config
    n_all, n_layers = n_parameters(trainer.model), sum(parameter.numel() for parameter in trainer.model.layers.parameters())
    counts = {split: corpus.n_tokens(split) for split in ("train", "valid", "test")}
    tokens = " / ".join(f"{count:,}" for count in counts.values())
    progress = trainer.progress
    record.say(f"{'Continuing' if continuing else 'Training'} in {config.train.work_dir} on {trainer.device} in {config.train.dtype}")
    record.say(
        f"Data set {corpus.spec.name} in {corpus.directory}: {tokens} tokens to train / validate / test, "
        f"{model_config.vocab_size:,} types, cutoffs {list(model_config.cutoffs) or 'none'}"
    )
    record.say(f"Parameters: {n_all:,}, of which {n_layers:,} in the layers. Batches per epoch: {trainer.batches_per_epoch:,}")
    if continuing:
        record.say(f"Continuing after step {progress.step} of {trainer.max_step} (epoch {progress.epoch}, batch {progress.batch})")
    record.measure(
        "start",
        step=trainer.progress.step,
        continuing=continuing,
        dataset=corpus.spec.name,
        train_tokens=counts["train"],
        valid_tokens=counts["valid"],
        test_tokens=counts["test"],
        vocab_size=model_config.vocab_size,
        cutoffs=list(model_config.cutoffs),
        parameters=n_all,
        device=str(trainer.device),
        dtype=config.train.dtype,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        seed=config.train.seed,
    )


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
