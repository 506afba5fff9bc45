"""Scores texts with a runtime by one of the protocols, in one process or several, and puts what came out into plain values for JSON.

Knows how runtime, text, protocol and processes come together. How a protocol cuts a text stands in `txl_train.protocols`, how token
losses add up in `txl_train.evaluate`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from txl_deploy import claims
from txl_deploy.bench.stats import LatencySummary
from txl_deploy.corpora import ModelData, encode_manual, open_corpus
from txl_deploy.opening import Opened
from txl_deploy.score import COUNTED_FROM_END
from txl_train import metrics
from txl_train.data.corpus import IdArray, check_vocabulary
from txl_train.data.datasets import EOS, get_dataset
from txl_train.data.segments import Segment, SegmentIterator
from txl_train.distributed import World
from txl_train.errors import DataError, UsageError
from txl_train.evaluate import EvalResult, ProcessScore, Stepper, evaluate
from txl_train.files import finite
from txl_train.protocols import (
    NVIDIA,
    NvidiaSegments,
    ProtocolName,
    UnevenStepper,
    clock_warm_up,
    mean_nll,
    nvidia_words,
    own_streams,
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """How a text is to be scored, and how much of it."""

    protocol: ProtocolName = "exact"
    batch_size: int = 16
    """Streams, of all processes."""
    max_size: int | None = None
    """Segments of a pass at most."""
    repeat: int = 1
    """Passes over the text."""
    timed: bool = False
    """Measure each step."""


@dataclass(frozen=True)
class Text:
    """Token ids, and where they are from."""

    ids: IdArray
    facts: dict[str, Any]


def read_split(model_data: ModelData, split: str, *, dataset: str | None, data: Path | None) -> Text:
    """Return one split of a corpus in the model's vocabulary. Raises what `open_corpus` raises."""
    corpus = open_corpus(model_data, dataset=dataset, data=data)
    ids = corpus.ids(split)
    facts = {"split": split, "corpus_sha256": corpus.sha256(split), "n_oov": corpus.oov(split), "data": str(corpus.directory)}
    return Text(ids, _facts_of_vocabulary(model_data, dataset) | facts | {"n_tokens_in_text": len(ids)})


def read_manual(model_data: ModelData, texts: Sequence[str], *, dataset: str | None, protocol: ProtocolName) -> Text:
    """Return raw text in the model's vocabulary: words as NVIDIA's code makes them in its protocols, else by the data set's rules.

    Raises:
        DataError: fewer than two tokens, or one that the vocabulary lacks and has no `<unk>` for.
    """
    spec = get_dataset(dataset or model_data.dataset)
    vocabulary = model_data.vocabulary
    if protocol in NVIDIA and vocabulary.unit == "word" and spec.line_end == "eos":
        check_vocabulary(vocabulary, spec)
        tokens = [*nvidia_words(" ".join(texts)), EOS]
        if len(tokens) < 2:
            raise DataError("The text has no words, so there is nothing to predict.", remedy="Give more text to `--manual`.")
        ids: IdArray = vocabulary.encode(tokens)
        n_unknown = sum(token not in vocabulary for token in tokens)
    else:
        ids, n_unknown = encode_manual(model_data, texts, dataset=dataset)
    facts = {"split": "manual", "manual": list(texts), "n_oov": n_unknown, "n_tokens_in_text": len(ids)}
    return Text(ids, _facts_of_vocabulary(model_data, dataset) | facts)


def _facts_of_vocabulary(model_data: ModelData, dataset: str | None) -> dict[str, Any]:
    spec = get_dataset(dataset or model_data.dataset)
    return {"dataset": spec.name, "unit": model_data.vocabulary.unit, "vocabulary_sha256": model_data.vocabulary.sha256}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A text, cut and ready to be scored by `opened`: all that can be refused has been."""

    opened: Opened
    request: Request
    text: Text
    world: World
    stepper: Stepper
    passes: Sequence[Iterable[Segment]]
    """What is scored from one cold start each; of NVIDIA's protocols all passes over the text are one."""
    streams: int
    """Those of this process."""
    steps: int
    """Of all passes."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What only this protocol has to tell."""

    def score(self, on_step: Callable[[int], None] = lambda done: None) -> EvalResult:
        """Score the text; all processes must call this together. `on_step` is called with the number of steps done.

        Raises:
            ValidationError: a token's nll is not finite, in any process.
        """
        runtime = self.opened.runtime
        results: list[EvalResult] = []
        for segments in self.passes:

            def tell(done: int, before: int = sum(result.n_segments for result in results)) -> None:
                on_step(before + done)

            result = evaluate(
                self.stepper,
                segments,
                batch_size=self.streams,
                device=runtime.info.device,
                max_segments=self.request.max_size if self.request.protocol == "exact" else None,
                on_step=tell,
                world=self.world,
                synchronize=runtime.synchronize if self.request.timed else None,
            )
            results.append(result)
        return _total(results)


def plan(opened: Opened, text: Text, request: Request, world: World) -> Plan:
    """Cut `text` by the request's protocol, and open what further runtimes that takes.

    Raises:
        DataError: the text is too short.
        UsageError: a process would have no stream, or an artifact is too short-sighted: see `Opened.of_length`.
    """
    info = opened.runtime.info
    tgt_len, ext_len, mem_len = info.tgt_len, info.config.ext_len, info.config.mem_len
    streams = own_streams(request.protocol, request.batch_size, world)
    if request.protocol == "exact":
        iterator = SegmentIterator(text.ids, batch_size=request.batch_size, tgt_len=tgt_len, ext_len=ext_len, streams=streams)
        per_pass = len(iterator) if request.max_size is None else min(len(iterator), request.max_size)
        return Plan(
            opened=opened,
            request=request,
            text=text,
            world=world,
            stepper=opened.runtime,
            passes=[iterator] * request.repeat,
            streams=iterator.batch_size,
            steps=per_pass * request.repeat,
        )
    warms_up = NVIDIA[request.protocol].warms_up and text.facts["split"] != "manual"
    segments = NvidiaSegments(
        text.ids,
        batch_size=request.batch_size,
        tgt_len=tgt_len,
        ext_len=ext_len,
        warm_up_len=-(-mem_len // tgt_len) * tgt_len if warms_up else 0,
        columns=streams,
        max_segments=request.max_size,
    )
    from_end = info.config.attn_type in COUNTED_FROM_END
    lengths = segments.lengths_to_continue() if from_end or (request.repeat > 1 and mem_len > 0) else set()
    if lengths and ext_len and from_end:
        raise UsageError(
            f"A model of `attn_type` {info.config.attn_type} counts positions from a segment's end, so that segments of other lengths with "
            f"`--ext-len` {ext_len} cannot be scored as {request.protocol} does.",
            remedy="Leave out `--ext-len`, or use `--protocol exact`.",
        )
    others = {length: opened.of_length(length) for length in sorted(lengths)}
    return Plan(
        opened=opened,
        request=request,
        text=text,
        world=world,
        stepper=UnevenStepper(opened.runtime, others, tgt_len=tgt_len, ext_len=ext_len),
        passes=[itertools.chain.from_iterable([segments] * request.repeat)],
        streams=segments.batch_size,
        steps=len(segments) * request.repeat,
        facts={
            "n_warm_up_segments": segments.n_warm_up,
            "n_tokens_trimmed": segments.n_trimmed,
            "n_tokens_lost_to_warm_up": segments.n_lost,
        },
    )


def describe(plan: Plan, result: EvalResult, percentiles: Sequence[float]) -> dict[str, Any]:
    """Return the outcome as plain values for JSON, with units in their names; `percentiles` of the latency if steps were timed."""
    info, request = plan.opened.runtime.info, plan.request
    nll = mean_nll(request.protocol, result)
    document: dict[str, Any] = {
        "nll_nats_per_token": nll,
        "perplexity": metrics.perplexity(nll),
        "bits_per_char": metrics.bits_per_char(nll),  # per token: a character only where `unit` says so
        "n_tokens": result.n_tokens,
        "nll_nats_sum": result.nll_nats_sum,
        "runtime": info.name,
        "provider": info.provider,
        "device": info.device,
        "dtype": info.dtype,
        "compute": info.compute or None,
        "memory": info.memory,
        "memory_dtype": info.memory_dtype,
        "head": info.head,
        "readback": claims.summary(info),
        "batch_size": request.batch_size,
        "tgt_len": info.tgt_len,
        "mem_len": info.mem_len,
        "ext_len": info.config.ext_len,
        "clamp_len": info.config.clamp_len,
        "same_length": info.config.same_length,
        "same_length_rule": info.config.same_length_rule,
        "protocol": request.protocol,
        "repeat": request.repeat,
        "n_tokens_per_pass": result.n_tokens // request.repeat,
        "max_size": request.max_size,
        "processes": plan.world.size,
        **plan.facts,
        **plan.text.facts,
        "origin": plan.opened.origin,
        "checkpoint_sha256": info.checkpoint_sha256,
        "manifest_sha256": info.manifest_sha256,
        "n_segments": result.n_segments,
        "seconds": result.seconds,
        "ms_per_segment": result.ms_per_segment,
        "tokens_per_s": result.tokens_per_s,
    }
    if result.by_process:
        document["by_process"] = [
            {"nll_nats_per_token": part.nll_nats_sum / part.n_tokens, "n_tokens": part.n_tokens} for part in result.by_process
        ]
    if request.timed:
        document["speed"] = speed(result, clock_warm_up(request.protocol, tgt_len=info.tgt_len, mem_len=info.mem_len), percentiles)
    finite_document: dict[str, Any] = finite(document)
    return finite_document


def speed(result: EvalResult, warm_up: int, percentiles: Sequence[float]) -> dict[str, Any] | None:
    """Return latencies (ms) and throughput (tokens/s) of the timed steps but the first `warm_up`; None if there are no others."""
    seconds, tokens = result.step_seconds[warm_up:], result.step_tokens[warm_up:]
    if not seconds:
        return None
    summary = LatencySummary.of([1000 * value for value in seconds], percentiles)
    return {
        "throughput_tokens_per_s": sum(tokens) / sum(seconds),
        **summary.to_row(),
        "timing_warmup_steps": warm_up,
        "notes": list(summary.notes),
    }


def _total(results: Sequence[EvalResult]) -> EvalResult:
    """Return the outcome of several passes together."""
    parts = zip(*(result.by_process for result in results))
    return EvalResult(
        nll_nats_sum=math.fsum(result.nll_nats_sum for result in results),
        n_tokens=sum(result.n_tokens for result in results),
        n_segments=sum(result.n_segments for result in results),
        seconds=sum(result.seconds for result in results),
        by_process=tuple(ProcessScore(math.fsum(p.nll_nats_sum for p in part), sum(p.n_tokens for p in part)) for part in parts),
        step_seconds=tuple(value for result in results for value in result.step_seconds),
        step_tokens=tuple(value for result in results for value in result.step_tokens),
        segment_nll_nats=tuple(value for result in results for value in result.segment_nll_nats),
        segment_tokens=tuple(value for result in results for value in result.segment_tokens),
    )
