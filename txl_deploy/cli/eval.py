"""`txl eval`: the perplexity of a checkpoint or an exported model on a corpus or on a piece of text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from txl_deploy.cli.lengths import length_options, memory_option
from txl_deploy.cli.options import data_options, device_option, echo_json, json_option, threads_option, verbosity_options
from txl_deploy.cli.progress import progress
from txl_train.errors import UsageError, ValidationError

if TYPE_CHECKING:
    from txl_deploy.opening import Opened
    from txl_train.data.corpus import IdArray
    from txl_train.evaluate import EvalResult

RULE = "=" * 100


@click.command("eval")
@click.option("--checkpoint", "--model", type=click.Path(path_type=Path), metavar="FILE", help="A checkpoint that `txl train` wrote.")
@click.option("--artifact", type=click.Path(path_type=Path), metavar="DIR", help="A folder that `txl export` wrote.")
@click.option(
    "--runtime",
    "--type",
    type=click.Choice(["pytorch", "torchscript", "onnx"]),
    help="What to run a checkpoint with; torchscript and onnx are exported on the way.  [default: pytorch]",
)
@memory_option
@data_options
@click.option("--manual", multiple=True, metavar="TEXT", help="Score this raw text instead of a corpus; may be given several times.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Streams read in parallel.")
@length_options
@click.option("--max-size", type=click.IntRange(min=1), metavar="N", help="Stop after N segments.  [default: the whole split]")
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Read the split N times, each time from a cold start.",
)
@click.option("--target-perplexity", type=float, metavar="X", help="Exit 1 if the perplexity is above X.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Also write the JSON document to FILE.")
@device_option
@threads_option
@json_option
@verbosity_options
def command(
    checkpoint: Path | None,
    artifact: Path | None,
    runtime: str | None,
    memory: str | None,
    dataset: str | None,
    data: Path | None,
    split: str,
    manual: tuple[str, ...],
    batch_size: int,
    tgt_len: int | None,
    mem_len: int | None,
    clamp_len: int | None,
    same_length: bool | None,
    max_size: int | None,
    repeat: int,
    target_perplexity: float | None,
    out: Path | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Score a corpus and print its perplexity.

    Every token that has a predecessor is scored exactly once, at every batch size, each stream from a cold start.
    """
    from typing import cast

    from txl_deploy.opening import Lengths, open_checkpoint, open_exported
    from txl_train.config import MemoryKind
    from txl_train.files import check_replaceable, write_json

    if out is not None:
        check_replaceable(out, b"{")
    lengths = Lengths(tgt_len=tgt_len, mem_len=mem_len, clamp_len=clamp_len, same_length=same_length)
    request = _Request(dataset, data, split, manual, 1 if manual else batch_size, max_size, repeat)
    if (checkpoint is None) == (artifact is None):
        raise UsageError("Give either `--checkpoint FILE` or `--artifact DIR`.")
    if artifact is not None:
        if runtime is not None:
            raise UsageError("`--runtime` goes with `--checkpoint`: an artifact knows what runs it.")
        kind = cast(MemoryKind | None, memory)
        document = _evaluate(open_exported(artifact, lengths=lengths, memory=kind, device=device, threads=threads), request, as_json)
    else:
        assert checkpoint is not None
        with open_checkpoint(
            checkpoint, runtime=runtime or "pytorch", lengths=lengths, memory=cast(MemoryKind, memory), device=device, threads=threads
        ) as opened:
            document = _evaluate(opened, request, as_json)
    if out is not None:
        write_json(out, document)
    if as_json:
        echo_json(document)
    if target_perplexity is not None and (document["perplexity"] is None or document["perplexity"] > target_perplexity):
        raise ValidationError(f"The perplexity {document['perplexity']} is above the target {target_perplexity:g}.")


@dataclass(frozen=True)
class _Request:
    """What to score, and how much of it."""

    dataset: str | None
    data: Path | None
    split: str
    manual: tuple[str, ...]
    batch_size: int
    max_size: int | None
    repeat: int


def _evaluate(opened: Opened, request: _Request, as_json: bool) -> dict[str, Any]:
    from txl_deploy.corpora import encode_manual, open_corpus
    from txl_train.data.datasets import get_dataset
    from txl_train.data.segments import SegmentIterator
    from txl_train.evaluate import evaluate

    info = opened.runtime.info
    spec = get_dataset(request.dataset or opened.model_data.dataset)
    facts: dict[str, Any] = {"dataset": spec.name, "unit": spec.unit, "vocabulary_sha256": opened.model_data.vocabulary.sha256}
    if request.manual:
        ids: IdArray
        ids, n_unknown = encode_manual(opened.model_data, request.manual, dataset=request.dataset)
        facts |= {"split": "manual", "manual": list(request.manual), "n_oov": n_unknown}
    else:
        corpus = open_corpus(opened.model_data, dataset=request.dataset, data=request.data)
        ids = corpus.ids(request.split)
        facts |= {"split": request.split, "corpus_sha256": corpus.sha256(request.split), "n_oov": corpus.oov(request.split)}
        facts["data"] = str(corpus.directory)
    facts["n_tokens_in_text"] = len(ids)
    segments = SegmentIterator(ids, batch_size=request.batch_size, tgt_len=info.tgt_len)
    per_pass = len(segments) if request.max_size is None else min(len(segments), request.max_size)
    if not as_json:
        clamp_len = -1 if info.config.clamp_len is None else info.config.clamp_len
        click.echo(
            f"Evaluating with: math {info.dtype} type {info.name} bsz {request.batch_size} tgt_len {info.tgt_len} ext_len 0 "
            f"mem_len {info.mem_len} clamp_len {clamp_len}"
        )
    results: list[EvalResult] = []
    with progress("evaluating", per_pass * request.repeat) as advance:
        for number in range(request.repeat):

            def tell(done: int, before: int = number * per_pass) -> None:
                advance(before + done)

            results.append(
                evaluate(opened.runtime, segments, batch_size=request.batch_size, device=info.device, max_segments=per_pass, on_step=tell)
            )
    document = _document(opened, results, request, facts)
    if not as_json:
        _print_summary(document)
    return document


def _document(opened: Opened, results: list[EvalResult], request: _Request, facts: dict[str, Any]) -> dict[str, Any]:
    from txl_train.evaluate import EvalResult
    from txl_train.files import finite

    info = opened.runtime.info
    total = EvalResult(
        nll_nats_sum=sum(result.nll_nats_sum for result in results),
        n_tokens=sum(result.n_tokens for result in results),
        n_segments=sum(result.n_segments for result in results),
        seconds=sum(result.seconds for result in results),
    )
    document: dict[str, Any] = finite(
        {
            "nll_nats_per_token": total.nll_nats_per_token,
            "perplexity": total.perplexity,
            "bits_per_char": total.bits_per_char,  # per token: a character only where `unit` says so
            "n_tokens": total.n_tokens,
            "nll_nats_sum": total.nll_nats_sum,
            "runtime": info.name,
            "provider": info.provider,
            "device": info.device,
            "dtype": info.dtype,
            "memory": info.memory,
            "batch_size": request.batch_size,
            "tgt_len": info.tgt_len,
            "mem_len": info.mem_len,
            "clamp_len": info.config.clamp_len,
            "same_length": info.config.same_length,
            "protocol": "exact",
            "repeat": request.repeat,
            "n_tokens_per_pass": results[0].n_tokens,
            "max_size": request.max_size,
            **facts,
            "origin": opened.origin,
            "checkpoint_sha256": info.checkpoint_sha256,
            "manifest_sha256": info.manifest_sha256,
            "n_segments": total.n_segments,
            "seconds": total.seconds,
            "ms_per_segment": total.ms_per_segment,
            "tokens_per_s": total.tokens_per_s,
        }
    )
    return document


def _print_summary(document: dict[str, Any]) -> None:
    split = "test" if document["split"] == "manual" else document["split"]
    perplexity = float("inf") if document["perplexity"] is None else document["perplexity"]
    figure = f"ppl {perplexity:9.3f}" if document["unit"] == "word" else f"bpc {document['bits_per_char']:9.5f}"
    click.echo(f"Time : {document['seconds']:.2f}s, {document['ms_per_segment']:.2f}ms/segment")
    click.echo(RULE)
    click.echo(f"| {split} loss {document['nll_nats_per_token']:5.2f} | {split} {figure} ")
    click.echo(RULE)
    click.echo(f"Tokens scored: {document['n_tokens']:,}")
    if document["n_oov"]:
        share = 100 * document["n_oov"] / document["n_tokens_in_text"]
        click.echo(
            f"{document['n_oov']:,} of the text's {document['n_tokens_in_text']:,} tokens ({share:.1f} %) are not in the vocabulary "
            "and are scored as <unk>: compare perplexities over the same vocabulary only."
        )
