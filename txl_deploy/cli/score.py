"""`txl score`: the perplexity of each line, document or file of a text."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from txl_deploy.cli.lengths import memory_option
from txl_deploy.cli.options import command_line, device_option, dtype_option, threads_option, verbosity_options
from txl_train.data.datasets import DATASETS
from txl_train.errors import UsageError, ValidationError

if TYPE_CHECKING:
    from txl_deploy.manifest import Dtype
    from txl_deploy.opening import Opened
    from txl_deploy.score import Scored
    from txl_deploy.texts import Context, Per, TextUnit
    from txl_train.config import MemoryKind

log = logging.getLogger(__name__)


@click.command("score")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, allow_dash=True), metavar="FILE...")
@click.option("--checkpoint", "--model", type=click.Path(path_type=Path), metavar="FILE", help="A checkpoint that `txl train` wrote.")
@click.option("--artifact", type=click.Path(path_type=Path), metavar="DIR", help="A folder that `txl export` wrote, with --head nll.")
@click.option(
    "--runtime",
    "--type",
    type=click.Choice(["pytorch", "compiled", "torchscript", "onnx"]),
    help="What to run a checkpoint with.  [default: pytorch]",
)
@click.option(
    "--per",
    type=click.Choice(["line", "document", "file"]),
    default="line",
    show_default=True,
    help="What is scored from a cold start: each line, each document (blank lines stand between them), or each file.",
)
@click.option(
    "--context",
    type=click.Choice(["eos", "none"]),
    default="eos",
    show_default=True,
    help="What stands before a text: the end of a line, so that its first token is scored too (where the vocabulary has one), or nothing.",
)
@click.option(
    "--tokenized", is_flag=True, help="The text is written as the data set's own files are.  [default: raw text, which is tokenised]"
)
@click.option("--tokens", "with_tokens", is_flag=True, help="Add the nll of every token.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Texts side by side.  [default: 16, or what an exported model is fixed to]",
)
@click.option("--tgt-len", type=click.IntRange(min=1), metavar="N", help="Tokens per stream and step.  [default: as evaluated in training]")
@click.option("--mem-len", type=click.IntRange(min=0), metavar="N", help="Past positions kept per layer, in tokens.  [default: as trained]")
@click.option(
    "--clamp-len", type=int, metavar="N", help="Distances above it share one encoding, in tokens; -1: no limit.  [default: as trained]"
)
@click.option("--same-length/--no-same-length", default=None, help="Every token attends to the same number of keys.  [default: as trained]")
@memory_option
@click.option("--dataset", type=click.Choice(list(DATASETS)), help="How text becomes tokens.  [default: the checkpoint's]")
@dtype_option("of a checkpoint; an exported model has its own.  [default: fp32]")
@click.option("--summary", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the totals as JSON.")
@device_option
@threads_option
@verbosity_options
def command(
    files: tuple[Path, ...],
    checkpoint: Path | None,
    artifact: Path | None,
    runtime: str | None,
    per: str,
    context: str,
    tokenized: bool,
    with_tokens: bool,
    batch_size: int | None,
    tgt_len: int | None,
    mem_len: int | None,
    clamp_len: int | None,
    same_length: bool | None,
    memory: str | None,
    dataset: str | None,
    dtype: str | None,
    summary: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Score each line (or document, or file) of texts, and print one JSON object per line in their order.

    FILE may be - for standard input: results come as soon as they are there.
    """
    if (checkpoint is None) == (artifact is None):
        raise UsageError("Give either `--checkpoint` or `--artifact`.")
    if artifact is not None and runtime is not None:
        raise UsageError("`--runtime` is fixed in an exported model.", remedy="Leave it out, or give the checkpoint.")
    from txl_deploy.opening import Lengths, open_checkpoint, open_exported
    from txl_deploy.score import Scorer
    from txl_deploy.texts import Texts
    from txl_train.files import check_replaceable, write_json

    if summary is not None:
        check_replaceable(summary, b"{")
    lengths = Lengths(
        tgt_len=tgt_len, mem_len=mem_len, ext_len=0 if artifact is None else None, clamp_len=clamp_len, same_length=same_length
    )
    given: dict[str, Any] = {
        "lengths": lengths,
        "memory": cast("MemoryKind | None", memory),
        "dtype": cast("Dtype | None", dtype),
        "head": "nll",
        "device": device,
        "threads": threads,
    }
    with contextlib.ExitStack() as stack:
        opened: Opened
        if artifact is not None:
            opened = open_exported(artifact, **given)
        else:
            assert checkpoint is not None
            opened = stack.enter_context(open_checkpoint(checkpoint, runtime=runtime or "pytorch", **given))
        info = opened.runtime.info
        if batch_size is None:
            batch_size = min(max(16, info.min_batch), info.max_batch or 16)
        texts = Texts(opened.model_data, dataset=dataset, per=cast("Per", per), context=cast("Context", context), tokenized=tokenized)
        scorer = Scorer(opened.runtime, batch_size)
        if info.mixes_streams and batch_size > 1:
            log.warning(
                "An int8 graph rounds all streams of a batch by one scale, so what stands beside a text changes what it scores a little; "
                "with `--batch-size 1` nothing does."
            )
        total = _Total(opened.model_data.vocabulary.counts_characters)
        try:
            for scored in scorer.scores(texts.units(files)):
                click.echo(json.dumps(total.add(scored, with_tokens=with_tokens), allow_nan=False, ensure_ascii=False))
        finally:
            document = total.document() | {
                "command": command_line(),
                "context": texts.context,
                "per": per,
                "runtime": info.name,
                "provider": info.provider,
                "dtype": info.dtype,
                "batch_size": batch_size,
                "tgt_len": info.tgt_len,
                "mem_len": info.mem_len,
                "clamp_len": info.config.clamp_len,
                "same_length": info.config.same_length,
                "checkpoint_sha256": info.checkpoint_sha256,
                "manifest_sha256": info.manifest_sha256,
                "occupancy": scorer.occupancy.scored / max(1, scorer.occupancy.computed),
            }
            log.info("%s", total.sentence())
        if summary is not None:
            write_json(summary, document)


class _Total:
    """Puts each result into plain values, and adds them up."""

    def __init__(self, counts_characters: bool) -> None:
        self._char = counts_characters
        self._units = self._tokens = self._oov = self._words = 0
        self._nll: list[float] = []

    def add(self, scored: Scored[TextUnit], *, with_tokens: bool) -> dict[str, Any]:
        """Return one line of the output."""
        unit, n = scored.unit, len(scored.nll_N)
        nll = math.fsum(scored.nll_N.tolist())
        if not math.isfinite(nll):
            raise ValidationError(
                f"The nll of {unit.file}, line {unit.line}, is no finite number.",
                remedy="The weights hold numbers that are not finite, or the precision cannot hold them: try `--dtype fp32`.",
            )
        self._units += 1
        self._tokens += n
        self._oov += unit.n_oov
        self._words += unit.n_words
        self._nll.append(nll)
        if len(self._nll) > 1000:
            self._nll = [math.fsum(self._nll)]
        line = {"file": unit.file, "index": unit.index, "line": unit.line, **self._figures(n, nll, unit.n_oov, unit.n_words)}
        if not n:
            line["reason"] = "no token has a predecessor"
        if with_tokens:
            line["token_nll_nats"] = [float(value) for value in scored.nll_N]
        return line

    def document(self) -> dict[str, Any]:
        """Return the totals."""
        return {"units": self._units, **self._figures(self._tokens, math.fsum(self._nll), self._oov, self._words)}

    def sentence(self) -> str:
        """Return the totals for people."""
        figures = self.document()
        mean = figures["bits_per_char" if self._char else "perplexity"]
        name = "bits per character" if self._char else "perplexity"
        shown = "none" if mean is None else f"{mean:.3f}"
        return f"{self._units:,} texts, {self._tokens:,} tokens, {name} {shown}, {self._oov:,} of {self._words:,} words unknown"

    def _figures(self, n: int, nll: float, oov: int, words: int) -> dict[str, Any]:
        from txl_train.metrics import bits_per_char, perplexity

        mean = nll / n if n else None
        power = math.inf if mean is None else perplexity(mean)
        return {
            "tokens": n,
            "oov": oov,
            "oov_share": oov / words if words else 0.0,
            "nll_nats": nll,
            "perplexity": power if math.isfinite(power) else None,
            **({"bits_per_char": None if mean is None else bits_per_char(mean)} if self._char else {}),
        }
