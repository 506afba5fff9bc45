"""What `txl eval` says: the lines of the specification, on standard output and in eval_log.log, and whether targets were reached."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from txl_train.errors import EnvironmentUnfitError, ValidationError

if TYPE_CHECKING:
    from txl_deploy.runtimes.base import RuntimeInfo
    from txl_deploy.scoring import Plan, Request
    from txl_train.distributed import World

RULE = "=" * 100
LOG_NAME = "eval_log.log"

log = logging.getLogger(__name__)

_WHY_NONE = {
    "Perplexity": "is beyond all numbers: the loss is that high",
    "Throughput": "was not measured, as all steps belong to the clock's warm-up: give a longer text, or a larger `--max-size`",
}


def by_split(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the documents of all splits by name."""
    if document["split"] == "all":
        splits: dict[str, dict[str, Any]] = document["splits"]
        return splits
    return {document["split"]: document}


class Report:
    """Tells the lines of one evaluation to whoever is to have them.

    The first process prints. With `everyone` the others log theirs on standard error, their number before each; and each process has a
    file of its own in the work folder.
    """

    def __init__(self, world: World, *, echo: bool, everyone: bool) -> None:
        self._world = world
        self._echo = echo and world.is_main
        self._logs = everyone and not world.is_main
        self._writes = world.is_main or everyone
        self._file: logging.FileHandler | None = None

    @contextlib.contextmanager
    def written_to(self, folder: Path | None) -> Iterator[None]:
        """Continue the log in `folder` with what is said meanwhile. Raises EnvironmentUnfitError where it cannot be written."""
        if folder is None or not self._writes:
            yield
            return
        path = folder / (LOG_NAME if self._world.is_main else f"eval_log.rank{self._world.rank}.log")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = logging.FileHandler(path, "a", encoding="utf-8")
        except OSError as error:
            raise EnvironmentUnfitError(
                f"{path} cannot be written: {error.strerror or error}.",
                remedy="Choose another folder with `--work-dir`, or add `--debug`, which writes no files.",
            ) from error
        self._file.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
        try:
            yield
        finally:
            self._file.close()
            self._file = None

    def say(self, line: str) -> None:
        """Tell one line."""
        if self._echo:
            click.echo(line)
        if self._logs:
            log.info("%d: %s", self._world.rank, line)
        if self._file is not None:
            self._file.handle(log.makeRecord("txl", logging.INFO, __file__, 0, line, (), None))

    def start(self, info: RuntimeInfo, request: Request) -> None:
        """Say what is about to be done: as NVIDIA's code of 2019 and its README, or, with a colon, as that of 2023."""
        clamp_len = -1 if info.config.clamp_len is None else info.config.clamp_len
        self.say(
            f"Evaluating with{'' if request.protocol == 'nvidia-2019' else ':'} math {info.dtype} type {info.name} "
            f"bsz {request.batch_size} tgt_len {info.tgt_len} ext_len {info.config.ext_len} mem_len {info.mem_len} clamp_len {clamp_len}"
            + (f" computed in {info.compute}" if info.compute not in ("", info.dtype) else "")
        )

    def warn(self, plan: Plan) -> None:
        """Warn of what the protocol does not score though it seems to."""
        lost = plan.facts.get("n_tokens_lost_to_warm_up")
        if lost and self._world.is_main:
            log.warning(
                "The columns of the text are shorter than the warm-up of %s, which therefore takes %d tokens of their own: these are not "
                "scored, as in NVIDIA's code. `--protocol exact` scores every token.",
                plan.request.protocol,
                lost,
            )

    def finish(self, document: dict[str, Any], percentiles: Sequence[float] | None) -> None:
        """Say what came out of one split; with `percentiles`, also how fast."""
        split = "test" if document["split"] == "manual" else document["split"]
        perplexity = float("inf") if document["perplexity"] is None else document["perplexity"]
        figure = f"bpc {document['bits_per_char']:9.5f}" if document["unit"] in ("char", "byte") else f"ppl {perplexity:9.3f}"
        self.say(f"Time : {document['seconds']:.2f}s, {document['ms_per_segment']:.2f}ms/segment")
        self.say(RULE)
        self.say(f"| {split} loss {document['nll_nats_per_token']:5.2f} | {split} {figure} ")
        self.say(RULE)
        if percentiles is not None:
            self._say_speed(document["speed"], percentiles)
        self.say(f"Tokens scored: {document['n_tokens']:,}")
        if document["n_oov"]:
            share = 100 * document["n_oov"] / document["n_tokens_in_text"]
            self.say(
                f"{document['n_oov']:,} of the text's {document['n_tokens_in_text']:,} tokens ({share:.1f} %) are not in the vocabulary "
                "and are scored as <unk>: compare perplexities over the same vocabulary only."
            )

    def _say_speed(self, speed: dict[str, Any] | None, percentiles: Sequence[float]) -> None:
        if speed is None:
            self.say("Throughput and latency were not measured: all steps belong to the clock's warm-up.")
            return
        self.say(f"Throughput Avg: {speed['throughput_tokens_per_s']:.2f} tok/s")
        self.say(f"Latency Avg: {speed['latency_ms_mean']:.2f} ms")
        for p in percentiles:
            self.say(f"Latency {p:g}%: {speed[f'latency_ms_p{p:g}']:.2f} ms")
        self.say(RULE)
        if self._echo:
            for note in speed["notes"]:
                log.info("Latency: %s.", note)

    def check_targets(self, document: dict[str, Any], *, perplexity: float | None, throughput: float | None) -> None:
        """Compare every split with the targets, tokens per second for `throughput`.

        Raises:
            ValidationError: one is missed, or nothing was measured that could reach it.
        """
        splits = by_split(document)
        missed: list[str] = []
        for name, target, is_least in (("Perplexity", perplexity, False), ("Throughput", throughput, True)):
            if target is None:
                continue
            for split, part in splits.items():
                achieved = (part["speed"] or {}).get("throughput_tokens_per_s") if is_least else part["perplexity"]
                passed = achieved is not None and (achieved >= target if is_least else achieved <= target)
                self.say(f"{name} achieved: {'nothing' if achieved is None else f'{achieved:.2f}'} target: {target:.2f}")
                self.say(f"{name} test {'passed' if passed else 'failed'}")
                if not passed:
                    side = "below" if is_least else "above"
                    reason = _WHY_NONE[name] if achieved is None else f"is {achieved}, {side} the target {target:g}"
                    missed.append(f"The {name.lower()}{f' of {split}' if len(splits) > 1 else ''} {reason}.")
        if missed:
            raise ValidationError(" ".join(missed))

    def check_receipts(self, document: dict[str, Any]) -> None:
        """Raise ValidationError if a split's receipt says that the artifact is not equivalent to its checkpoint."""
        for split, part in by_split(document).items():
            receipt = part.get("receipt")
            if receipt is not None and receipt["reference_nll_nats_sum"] is not None and not receipt["passed"]:
                raise ValidationError(
                    f"The artifact is not proved on the {split} split: {receipt['reason']}.",
                    remedy="`txl parity` shows where it parts from its checkpoint; then export the checkpoint again.",
                )
