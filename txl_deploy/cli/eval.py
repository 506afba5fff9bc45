"""`txl eval`: the perplexity of a checkpoint or an exported model on a corpus or on a piece of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from txl_deploy.cli.lengths import length_options, memory_option
from txl_deploy.cli.options import data_options, device_option, echo_json, json_option, threads_option, verbosity_options
from txl_deploy.cli.progress import progress
from txl_train.errors import UsageError, ValidationError

if TYPE_CHECKING:
    from txl_deploy.opening import Opened
    from txl_deploy.runtimes.base import RuntimeInfo
    from txl_train.data.corpus import IdArray
    from txl_train.data.segments import Segment, SegmentIterator
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
    memory: str,
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
    from txl_train.model.memory import MemoryKind

    lengths = Lengths(tgt_len=tgt_len, mem_len=mem_len, clamp_len=clamp_len, same_length=same_length)
    request = _Request(dataset, data, split, manual, 1 if manual else batch_size, max_size, repeat)
    if (checkpoint is None) == (artifact is None):
        raise UsageError("Give either `--checkpoint FILE` or `--artifact DIR`.")
    if artifact is not None:
        if runtime is not None:
            raise UsageError("`--runtime` goes with `--checkpoint`: an artifact knows what runs it.")
        document = _evaluate(open_exported(artifact, lengths=lengths, device=device, threads=threads), request, as_json)
    else:
        assert checkpoint is not None
        with open_checkpoint(
            checkpoint, runtime=runtime or "pytorch", lengths=lengths, memory=cast(MemoryKind, memory), device=device, threads=threads
        ) as opened:
            document = _evaluate(opened, request, as_json)
    if out is not None:
        from txl_train.files import write_json

        write_json(out, document)
    if as_json:
        echo_json(document)
    if target_perplexity is not None and not document["perplexity"] <= target_perplexity:
        raise ValidationError(f"The perplexity {document['perplexity']:.3f} is above the target {target_perplexity:g}.")


class _Request:
    """What to score, and how much of it."""

    def __init__(
        self,
        dataset: str | None,
        data: Path | None,
        split: str,
        manual: tuple[str, ...],
        batch_size: int,
        max_size: int | None,
        repeat: int,
    ) -> None:
        self.dataset, self.data, self.split, self.manual = dataset, data, split, manual
        self.batch_size, self.max_size, self.repeat = batch_size, max_size, repeat


def _evaluate(opened: Opened, request: _Request, as_json: bool) -> dict[str, Any]:
    from txl_deploy.corpora import encode_manual, open_corpus
    from txl_train.data.datasets import get_dataset
    from txl_train.data.segments import SegmentIterator
    from txl_train.evaluate import evaluate

    info = opened.runtime.info
    spec = get_dataset(request.dataset or opened.model_data.dataset)
    corpus_facts: dict[str, Any] = {"split": request.split}
    if request.manual:
        ids: IdArray = encode_manual(opened.model_data, request.manual, dataset=request.dataset)
        corpus_facts = {"split": "manual", "manual": list(request.manual)}
    else:
        corpus = open_corpus(opened.model_data, dataset=request.dataset, data=request.data)
        ids = corpus.ids(request.split)
        corpus_facts |= {"corpus_sha256": corpus.sha256(request.split), "n_oov": corpus.oov(request.split), "data": str(corpus.directory)}
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
            results.append(
                evaluate(
                    opened.runtime,
                    _limited(segments, per_pass),
                    batch_size=request.batch_size,
                    device=info.device,
                    on_step=lambda done, before=number * per_pass: advance(before + done),  # type: ignore[misc]
                )
            )
    document = _document(
        info, results, request, corpus_facts | {"dataset": spec.name, "vocabulary_sha256": opened.model_data.vocabulary.sha256}
    )
    if not as_json:
        _print_summary(document, per_character=spec.unit != "word")
    return document


def _limited(segments: SegmentIterator, count: int) -> Iterator[Segment]:
    return (segment for _, segment in zip(range(count), segments))


def _document(info: RuntimeInfo, results: list[EvalResult], request: _Request, corpus_facts: dict[str, Any]) -> dict[str, Any]:
    from txl_train.evaluate import EvalResult

    total = EvalResult(
        nll_nats_sum=sum(result.nll_nats_sum for result in results),
        n_tokens=sum(result.n_tokens for result in results),
        n_segments=sum(result.n_segments for result in results),
        seconds=sum(result.seconds for result in results),
    )
    return {
        "nll_nats_per_token": total.nll_nats_per_token,
        "perplexity": total.perplexity,
        "bits_per_char": total.bits_per_char,
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
        "max_size": request.max_size,
        **corpus_facts,
        "origin": info.origin,
        "checkpoint_sha256": info.checkpoint_sha256,
        "manifest_sha256": info.manifest_sha256,
        "n_segments": total.n_segments,
        "seconds": total.seconds,
        "ms_per_segment": total.ms_per_segment,
        "tokens_per_s": total.tokens_per_s,
    }


def _print_summary(document: dict[str, Any], *, per_character: bool) -> None:
    split = "test" if document["split"] == "manual" else document["split"]
    figure = f"bpc {document['bits_per_char']:9.5f}" if per_character else f"ppl {document['perplexity']:9.3f}"
    click.echo(f"Time : {document['seconds']:.2f}s, {document['ms_per_segment']:.2f}ms/segment")
    click.echo(RULE)
    click.echo(f"| {split} loss {document['nll_nats_per_token']:5.2f} | {split} {figure} ")
    click.echo(RULE)
    click.echo(f"Tokens scored: {document['n_tokens']:,}")
