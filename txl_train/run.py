"""A training run as a whole: opens the text, builds or restores the model, trains it, and scores the best checkpoint on test.txt.

Knows which files a work folder holds and what may change when a run is continued. How a step is computed stands in `trainer`, what
happens around the steps in `callbacks`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from txl_train.callbacks import (
    BEST_NAME,
    LAST_NAME,
    Ending,
    EvaluateAndSave,
    LogProgress,
    Progress,
    ProgressBar,
    StopOnSignal,
    TimeLimit,
    Work,
    by_signal,
    kept_checkpoints,
)
from txl_train.checkpoint import Checkpoint, load_checkpoint, load_model
from txl_train.config import Compat, DataConfig, ModelConfig, RunConfig, SameLengthRule, TrainConfig, to_dict
from txl_train.data import pydoc
from txl_train.data.corpus import Corpus, load_corpus
from txl_train.data.datasets import default_cutoffs, default_tie_projections, get_dataset
from txl_train.data.layouts import NEWLINE_TOKEN
from txl_train.data.vocabulary import Vocabulary
from txl_train.device import devices_of
from txl_train.distributed import World, join
from txl_train.errors import ConfigError, DataError, UsageError, ValidationError
from txl_train.evaluate import EvalResult
from txl_train.exhaustion import TRAINING, told_when_memory_runs_out
from txl_train.flops import forward_flops_per_token, measured_peak_flops, training_flops_per_token
from txl_train.metrics import perplexity
from txl_train.model.transformer_xl import TransformerXL
from txl_train.protocols import own_streams
from txl_train.records import LOG_NAME, METRICS_NAME, RunRecord, end_line, nll_figure, result_figures
from txl_train.settings import Resolved
from txl_train.trainer import Trainer, seed_process
from txl_train.validation import Scorer, evaluation_config
from txl_train.work_folder import work_folder

log = logging.getLogger(__name__)

SETTINGS_NAME = "config.yaml"

_FIXED_ON_RESTART = (
    "data.dataset",
    "data.vocab",
    "data.min_count",
    "optim.optim",
    "train.batch_size",
    "train.tgt_len",
    "train.roll",
    "train.varlen",
    "train.compat",
    "train.seed",
)
"""Settings that the kept optimizer state, memory and position in the data depend on; so do all of the model's."""

_RULE_OF: dict[Compat, SameLengthRule] = {"nvidia-2019": "mem_len", "nvidia-2023": "mem_len+1"}

_SHAPING = (
    *("vocab_size", "n_layer", "n_head", "d_head", "d_model", "d_embed", "d_inner", "attn_type", "position_rows", "pre_lnorm"),
    *("tie_weights", "cutoffs", "div_val", "untie_biases"),
)
"""Settings of a model that its weights, or what they mean, depend on."""

_OF_A_MACHINE = ("train.work_dir", "train.init_from", "train.device", "train.threads", "data.data")
"""Settings that may differ from machine to machine: where files lie, and what computes."""

_SHORT_RUN = 200
"""Steps below which measuring the device's peak is not worth its part of a second on a CPU."""


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
    work_dir: Path | None
    """None in debug mode, which writes no files."""
    data_folder: Path
    processes: int

    @property
    def tokens_per_s(self) -> float | None:
        """Target tokens per second of training, evaluations left out."""
        progress = self.progress
        return progress.tokens / progress.train_seconds if progress.train_seconds else None

    def check_targets(self, train: TrainConfig) -> None:
        """Compare what was reached with `target_throughput` and `target_perplexity`.

        Raises:
            ValidationError: a target was missed, or there is nothing to compare it with.
        """
        missed = []
        if train.target_throughput is not None and (self.tokens_per_s or 0.0) < train.target_throughput:
            missed.append(f"throughput achieved: {self.tokens_per_s or 0.0:.2f} tok/s, target: {train.target_throughput:.2f}")
        if train.target_perplexity is not None:
            best = self.progress.best_valid_nll
            reached = None if best is None else perplexity(best)
            if reached is None or reached > train.target_perplexity:
                said = "none, as there was no evaluation" if reached is None else f"{reached:.2f}"
                missed.append(f"validation perplexity achieved: {said}, target: {train.target_perplexity:.2f}")
        if missed:
            raise ValidationError(f"A target was missed: {'; '.join(missed)}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        progress = self.progress
        best = progress.best_valid_nll

        def path(name: str) -> str | None:
            return str(self.work_dir / name) if self.work_dir is not None and (self.work_dir / name).exists() else None

        return {
            "ending": self.ending,
            "steps": progress.step,
            "skipped_steps": progress.skipped_steps,
            "epoch": progress.epoch,
            "tokens": progress.tokens,
            "train_seconds": progress.train_seconds,
            "tokens_per_s": self.tokens_per_s,
            "processes": self.processes,
            "dataset": self.dataset,
            "data": str(self.data_folder),
            "vocab_size": self.vocab_size,
            "parameters": self.n_parameters,
            "eval_tgt_len": self.eval_tgt_len,
            "eval_mem_len": self.eval_mem_len,
            "best": None if best is None else {"step": progress.best_step, "nll_nats_per_token": best, **nll_figure(best, self.char)},
            "valid": None if self.valid is None else result_figures(self.valid, self.char),
            "test": None if self.test is None else result_figures(self.test, self.char),
            "work_dir": None if self.work_dir is None else str(self.work_dir),
            "checkpoint_best": path(BEST_NAME),
            "checkpoint_last": path(LAST_NAME),
            "metrics": path(METRICS_NAME),
            "log": path(LOG_NAME),
            "settings": path(SETTINGS_NAME),
        }


@told_when_memory_runs_out(TRAINING)
def train(
    resolved: Resolved,
    *,
    continue_from: Checkpoint | None = None,
    in_place: bool = True,
    overwrite: bool = False,
    show_progress: bool = True,
    world: World | None = None,
) -> TrainResult:
    """Do all of `txl train`: open the text, build or restore the model, train, and score the best checkpoint on test.txt.

    Args:
        resolved: the settings; a `continue_from` must have been among their sources.
        continue_from: a checkpoint with training state.
        in_place: that checkpoint is the work folder's own, so the records there are continued; otherwise the folder must be new.
        overwrite: delete the run that the work folder holds.
        show_progress: draw a bar where standard error is a terminal.
        world: the processes that train together; each calls this with the same arguments.

    Raises:
        UsageError: the work folder holds a run already, or the settings contradict the checkpoint.
        DataError: the text is missing, empty or too short.
        EnvironmentUnfitError: there is no such device or precision here, a file cannot be written, or memory ran out.
        ValidationError: training diverged.
    """
    world = world or World()
    config = resolved.config
    if continue_from is not None:
        _check_unchanged(continue_from, config)
    devices = devices_of(config.train, world)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    in_place = in_place and continue_from is not None
    with contextlib.ExitStack() as held:
        held.enter_context(join(world, devices[0]))
        _check_alike(config, continue_from, world)
        folder = held.enter_context(work_folder(config, world, may_hold_a_run=in_place or overwrite))
        return _train(
            resolved,
            continue_from=continue_from,
            in_place=in_place,
            show_progress=show_progress,
            world=world,
            devices=devices,
            folder=folder,
        )


def _train(
    resolved: Resolved,
    *,
    continue_from: Checkpoint | None,
    in_place: bool,
    show_progress: bool,
    world: World,
    devices: list[torch.device],
    folder: Path,
) -> TrainResult:
    config = resolved.config
    kept_folder = None if config.train.debug else folder
    corpus = _open_corpus_once(config, folder, world)
    model_config = complete_model_config(config, corpus)
    valid_ids, test_ids = (_evaluation_ids(corpus, split, config.train) for split in ("valid", "test"))
    own_streams(config.train.compat or "exact", config.train.eval_batch_size, world)
    torch.manual_seed(config.train.seed)
    model = TransformerXL(model_config)
    if config.train.init_from is not None and continue_from is None:
        _take_weights(model, corpus, Path(config.train.init_from))
    if world.rank or len(devices) > 1:  # each process drops other values
        seed_process(config.train, world, devices)
    trainer = Trainer(
        config,
        model,
        corpus.ids("train"),
        vocabulary=corpus.vocabulary,
        run=resolved.to_dict() | {"data_folder": str(corpus.directory.resolve())},
        device=devices,
        world=world,
        sentence_end=corpus.vocabulary.eos_id if corpus.spec.shuffles_sentences else None,
    )
    if continue_from is not None:
        trainer.restore(continue_from)
        if trainer.progress.step > trainer.max_step:
            raise UsageError(
                f"The run has {trainer.progress.step} steps, more than `max_step` {trainer.max_step}.",
                remedy="Give a larger `--max-step`, or train anew in another `--work-dir`.",
            )

    # All that was asked for fits: from here on, what is in the folder is changed.
    if world.is_main and kept_folder is not None:
        if not in_place:
            for path in (folder / LAST_NAME, folder / BEST_NAME):
                path.unlink(missing_ok=True)
        for path in kept_checkpoints(folder, after_step=trainer.progress.step if in_place else -1):
            path.unlink(missing_ok=True)
        resolved.save(folder / SETTINGS_NAME)
    world.wait()
    if kept_folder is not None and not _holds_best(folder / BEST_NAME, trainer.progress.best_step):
        trainer.progress.best_valid_nll = trainer.progress.best_step = None
    score = Scorer(evaluation_config(model_config, config.train), config.train, devices[0], world)
    char = corpus.vocabulary.unit in ("char", "byte")
    record = RunRecord(
        kept_folder,
        append=in_place,
        rank=world.rank,
        silent=not (world.is_main or config.train.log_all_ranks),
        tensorboard=config.train.tensorboard and world.is_main,
        first_step=trainer.progress.step,
    )
    with contextlib.closing(record):
        for line in resolved.table().splitlines():
            record.say(line)
        work = _work(trainer, corpus, len(devices))
        _record_start(record, trainer, corpus, work, folder=kept_folder, continuing=continue_from is not None)
        for line in resolved.differences:
            record.say(line)
        evaluation = EvaluateAndSave(
            record,
            kept_folder,
            config.train.eval_interval,
            lambda on_step: score(trainer.model, valid_ids, max_segments=config.train.eval_max_steps, on_step=on_step),
            char=char,
            keep=None if config.train.save_all else config.train.keep_last or 0,
        )
        progress_log = LogProgress(record, config.train.log_interval, char=char, work=work)
        trainer.callbacks = [StopOnSignal(), progress_log]
        if config.train.max_minutes is not None:
            trainer.callbacks.append(TimeLimit(config.train.max_minutes))
        trainer.callbacks.append(evaluation)
        if show_progress and world.is_main and ProgressBar.is_wanted():
            trainer.callbacks.append(ProgressBar(progress_log))
        ending = trainer.run()

        progress, test = trainer.progress, None
        if by_signal(ending):
            saved = "" if kept_folder is None else f"; the run is saved in {folder / LAST_NAME}. Continue with `--resume`"
            record.say(f"Stopped at step {progress.step}{saved}.")
        else:
            world.wait()  # until the best checkpoint is written
            best = trainer.model if kept_folder is None else load_model(folder / BEST_NAME)[0].to(devices[0])
            test = score(best, test_ids)
            record.say("=" * 100)
            record.say(end_line(test.seconds, test.nll_nats_per_token, char=char))
            record.say("=" * 100)
            record.measure("test", step=progress.best_step or progress.step, **result_figures(test, char))
        if progress.skipped_steps:
            record.say(f"fp16 overflowed at {progress.skipped_steps} of {progress.step} steps, which left the weights as they were")
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
        work_dir=kept_folder,
        data_folder=corpus.directory,
        processes=world.size,
    )


def open_corpus(config: DataConfig, work_dir: Path, compat: Compat | None = None) -> Corpus:
    """Open the text `config` names; a built-in one is written into `work_dir`/data first. The token cache is in `work_dir`/cache.

    With `compat`, the line breaks of enwik8 are no tokens, as in NVIDIA's code.

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
    _check_prepared_for(folder, spec.name)
    corpus = load_corpus(folder, spec, cache_dir=cache_dir, min_count=config.min_count, vocab=config.vocab)
    if compat is not None and NEWLINE_TOKEN in corpus.vocabulary and spec.line_end == "byte":  # there, line breaks separate tokens only
        others = [symbol for symbol in corpus.vocabulary.symbols if symbol != NEWLINE_TOKEN]
        corpus = load_corpus(folder, spec, cache_dir=cache_dir, vocabulary=Vocabulary(others, unit=corpus.vocabulary.unit))
    return corpus


def _check_prepared_for(folder: Path, dataset: str) -> None:
    """Note where `txl data prepare` made the folder for another data set than the one it is read as."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        made_for = json.loads((folder / "corpus.json").read_text(encoding="utf-8")).get("dataset")
        if isinstance(made_for, str) and made_for != dataset:
            log.warning("%s was prepared as data set %s, and is read as %s.", folder, made_for, dataset)


def _open_corpus_once(config: RunConfig, folder: Path, world: World) -> Corpus:
    """Open the text, in the first process before the others, which then find it prepared."""
    if not world.is_main:
        world.wait()
    corpus = open_corpus(config.data, folder, config.train.compat)
    for split in ("train", "valid", "test"):
        corpus.ids(split)
    if world.is_main:
        world.wait()
    text = " ".join([corpus.vocabulary.sha256, *(corpus.sha256(split) for split in ("train", "valid", "test"))])
    world.agree("The text", text, "Every machine must have the same files in `--data`, prepared alike.")
    return corpus


def _check_alike(config: RunConfig, continue_from: Checkpoint | None, world: World) -> None:
    """See to it that all processes have begun the same run: each has settings, and a checkpoint, of its machine.

    Raises:
        UsageError: they differ.
    """
    given = {name: value for name, value in _flat(to_dict(config)).items() if name not in _OF_A_MACHINE}
    settings = json.dumps(given, sort_keys=True, default=str)
    world.agree("What was set", settings, "Start the same command with the same TXL_ variables on every machine.")
    begun = "anew" if continue_from is None else json.dumps(continue_from.progress, sort_keys=True, default=str)
    world.agree(
        "What it continues from",
        begun,
        "Every machine must see the same checkpoint: `--work-dir` and `--restart` name files in a file system that all of them share.",
    )


def complete_model_config(run: RunConfig, corpus: Corpus) -> ModelConfig:
    """Fill in what depends on the text and on training: the vocabulary's size, the data set's cutoffs if `adaptive` is set without
    any, the number of learned positions, and under `compat` the lineage's rule of `same_length`.

    Raises:
        ConfigError: the settings contradict the text or each other.
    """
    config, vocab_size = run.model, len(corpus.vocabulary)
    if config.vocab_size not in (0, vocab_size):
        raise ConfigError(f"`vocab_size` must be 0 or the vocabulary's size {vocab_size}, but is {config.vocab_size} instead.")
    if config.cutoffs and not config.adaptive:
        log.info("The cutoffs %s are not used: they belong to the adaptive softmax (`--adaptive`).", list(config.cutoffs))
    cutoffs = config.cutoffs if config.adaptive else ()
    if config.adaptive and not cutoffs:
        cutoffs = default_cutoffs(corpus.spec, vocab_size)
        if not cutoffs:
            log.info("A vocabulary of %d tokens gains nothing from the adaptive softmax: using a plain one.", vocab_size)
    if run.train.sample_softmax is not None and cutoffs:
        raise ConfigError(
            "`sample_softmax` and `adaptive` are two ways to train with many words: they cannot be combined.",
            remedy="Add `--no-adaptive`, or leave `--sample-softmax` out.",
        )
    rows = config.position_rows
    if config.attn_type in ("shaw", "learned") and not rows:
        rows = run.train.tgt_len + config.ext_len + config.mem_len
    tied = config.tie_projections
    if tied is None and cutoffs:
        tied = default_tie_projections(corpus.spec, len(cutoffs))
    rule = config.same_length_rule if run.train.compat is None else _RULE_OF[run.train.compat]
    return dataclasses.replace(
        config,
        vocab_size=vocab_size,
        cutoffs=cutoffs,
        adaptive=bool(cutoffs),
        tie_projections=tied,
        position_rows=rows,
        same_length_rule=rule,
    )


def n_parameters(model: TransformerXL) -> int:
    """Number of weights; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _holds_best(path: Path, step: int | None) -> bool:
    """True if the best checkpoint there is that of `step`: a best score without its weights is worth nothing."""
    return step is not None and path.exists() and load_checkpoint(path).progress.get("step") == step


def _take_weights(model: TransformerXL, corpus: Corpus, path: Path) -> None:
    """Begin with the weights of a checkpoint of the same model and vocabulary."""
    checkpoint = load_checkpoint(path)
    if checkpoint.vocabulary.sha256 != corpus.vocabulary.sha256:
        raise UsageError(
            f"{path} has another vocabulary ({len(checkpoint.vocabulary)} tokens) than this text ({len(corpus.vocabulary)}).",
            remedy="Begin with a checkpoint that was trained on the same train.txt.",
        )
    theirs, ours = (to_dict(config) | {"d_embed": config.embed_size} for config in (checkpoint.model_config, model.config))
    other = [f"{name} is {theirs[name]} there and {ours[name]} here" for name in _SHAPING if theirs[name] != ours[name]]
    if other:
        raise UsageError(f"{path} is of another model: {', '.join(other)}.", remedy="Give the settings that it was trained with.")
    model.load_parameters(checkpoint.model)


def _work(trainer: Trainer, corpus: Corpus, n_devices: int) -> Work | None:
    """How much arithmetic a token takes and the devices can do; None in a run too short for measuring that."""
    train, config = trainer.config.train, trainer.model.config
    if trainer.max_step - trainer.progress.step < _SHORT_RUN and trainer.device.type == "cpu":
        return None
    ids = np.asarray(corpus.ids("train")[: 1 << 20])
    counts = np.histogram(ids, bins=[*config.cluster_ends])[0]
    shares = (counts[1:] / len(ids)).tolist()
    flops = training_flops_per_token(forward_flops_per_token(config, train.tgt_len, train.batch_size, shares))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[train.dtype]
    (peak,) = trainer.world.sum([n_devices * measured_peak_flops(trainer.device, dtype)])
    return Work(flops, peak)


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


def _record_start(record: RunRecord, trainer: Trainer, corpus: Corpus, work: Work | None, *, folder: Path | None, continuing: bool) -> None:
    config, model_config = trainer.config, trainer.model.config
    n_all, n_layers = n_parameters(trainer.model), sum(parameter.numel() for parameter in trainer.model.layers.parameters())
    counts = {split: corpus.n_tokens(split) for split in ("train", "valid", "test")}
    tokens = " / ".join(f"{count:,}" for count in counts.values())
    progress = trainer.progress
    arithmetic = config.train.dtype + (" with TF32 products" if config.train.tf32 else "")
    together = f", {trainer.world.size} processes" if trainer.world.size > 1 else ""
    record.say(f"{'Continuing' if continuing else 'Training'} in {folder or 'no folder'} on {trainer.device} in {arithmetic}{together}")
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
        tf32=config.train.tf32,
        processes=trainer.world.size,
        flops_per_token=None if work is None else work.flops_per_token,
        peak_flops=None if work is None else work.peak_flops,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        seed=config.train.seed,
    )


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
