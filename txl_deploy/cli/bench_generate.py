"""`txl bench generate`: time to the first token and tokens per second, by length of the prompt and number of samples."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from txl_deploy.cli.options import (
    command_line,
    device_option,
    dtype_option,
    echo_json,
    json_option,
    threads_option,
    verbosity_options,
)
from txl_deploy.cli.progress import progress
from txl_train.errors import UsageError, ValidationError

if TYPE_CHECKING:
    from txl_deploy.bench.generation import GenerationResult, GenerationRow
    from txl_deploy.corpora import ModelData
    from txl_deploy.generate import Generator
    from txl_deploy.opening import Opened


@click.command("generate")
@click.option("--checkpoint", "--model", type=click.Path(path_type=Path), metavar="FILE", help="A checkpoint that `txl train` wrote.")
@click.option(
    "--runtimes",
    metavar="LIST",
    help="What to run the checkpoint with, of pytorch, compiled, torchscript, onnx; the last two are exported on the way.  "
    "[default: pytorch]",
)
@click.option(
    "--artifact",
    "artifacts",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="An exported model: `txl export --head logits --tgt-len 1`; may be given several times.",
)
@click.option(
    "--prefill-artifact",
    "prefill",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="An export of the same checkpoint for longer segments, with which the artifacts of its format read prompts.",
)
@click.option(
    "--prompt-lens", default="16,64,256", show_default=True, metavar="SIZES", help="Tokens of the prompt: a list, 16..256 or 1-8."
)
@click.option(
    "--num-samples",
    default="1,4",
    show_default=True,
    metavar="SIZES",
    help="Continuations that are made side by side: a list, 1..32 or 1-8.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=2), default=32, show_default=True, metavar="N", help="New tokens of each sample, all of them."
)
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Take the prompts from the beginning of this text.  [default: random tokens, by the seed]",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, metavar="X", help="As for `txl generate`; 0 is greedy.")
@click.option("--top-k", type=int, metavar="N", help="As for `txl generate`.  [default: all]")
@click.option("--top-p", type=float, metavar="X", help="As for `txl generate`.  [default: all]")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of random prompts, and of what is drawn.")
@click.option(
    "--segment-len", type=click.IntRange(min=1), metavar="N", help="Tokens of the prompt that a checkpoint reads at a time.  [default: 64]"
)
@click.option("--mem-len", type=click.IntRange(min=0), metavar="N", help="Of a checkpoint: past positions kept.  [default: as trained]")
@dtype_option("of a checkpoint; an exported model has its own.  [default: fp32]")
@click.option("--percentiles", default="50,90", show_default=True, metavar="LIST", help="Percentiles to show, in percent.")
@click.option(
    "--min-samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Timed generations at least.  [default: what the largest percentile needs to be sound, 64 for p90, 662 for p99]",
)
@click.option(
    "--max-duration",
    type=float,
    default=60.0,
    show_default=True,
    metavar="S",
    help="Timed seconds at most of the slowest generator at each prompt and number of samples, even if that leaves fewer generations.",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="N",
    help="Generations before the clock counts; three times as many where they are not steady.",
)
@click.option("--accept-invalid", is_flag=True, help="End with 0 although rows are INVALID (noise, too few samples); they stay marked.")
@click.option(
    "--out", "-o", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the result with all samples to FILE."
)
@device_option
@threads_option
@json_option
@verbosity_options
def command(
    checkpoint: Path | None,
    runtimes: str | None,
    artifacts: tuple[Path, ...],
    prefill: tuple[Path, ...],
    prompt_lens: str,
    num_samples: str,
    max_tokens: int,
    prompt_file: Path | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    segment_len: int | None,
    mem_len: int | None,
    dtype: str | None,
    percentiles: str,
    min_samples: int | None,
    max_duration: float,
    warmup: int,
    accept_invalid: bool,
    out: Path | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how fast checkpoints and exported models go on with a text, side by side.

    All take turns at the same prompts with the same seed, and what they generate is compared: runtimes of one checkpoint and type must draw
    the same tokens. A row whose tokens are others, or whose figures are not to be believed, is INVALID and ends with 1.
    """
    from txl_deploy.bench.environment import describe_environment, describe_state
    from txl_deploy.bench.generation import GenerationResult, GenerationSettings, measure
    from txl_deploy.bench.stats import minimum_samples, parse_percentiles
    from txl_deploy.bench.workload import parse_batch_sizes
    from txl_deploy.sampling import Sampling
    from txl_train.files import check_replaceable

    if checkpoint is None and not artifacts:
        raise UsageError("There is nothing to measure.", remedy="Name `--checkpoint FILE` or `--artifact DIR`.")
    if checkpoint is None and not (runtimes is None and dtype is None and segment_len is None and mem_len is None):
        raise UsageError(
            "`--runtimes`, `--dtype`, `--segment-len` and `--mem-len` are for a checkpoint.", remedy="Add `--checkpoint FILE`."
        )
    if prefill and not artifacts:
        raise UsageError("`--prefill-artifact` goes with `--artifact`.")
    if out is not None:
        check_replaceable(out, b"{")
    lengths, widths = parse_batch_sizes(prompt_lens), parse_batch_sizes(num_samples)
    wanted = parse_percentiles(percentiles)
    settings = GenerationSettings(
        new_tokens=max_tokens,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
        seed=seed,
        percentiles=wanted,
        min_samples=max(map(minimum_samples, wanted)) if min_samples is None else min_samples,
        warmup=warmup,
        min_duration_s=min(3.0, max_duration),
        max_duration_s=max_duration,
    )
    with contextlib.ExitStack() as stack:
        found = _opened(stack, checkpoint, runtimes, artifacts, prefill, mem_len, dtype, device, threads, segment_len)
        prompt = _prompt(found[0][0].model_data, prompt_file, max(lengths), seed)
        generators = [generator for _, generator in found]
        environment = describe_environment(threads=threads, device=generators[0].step.info.device)
        rows: list[GenerationRow] = []
        with progress("Generating", len(lengths) * len(widths)) as done:
            for length in lengths:
                for width in widths:
                    rows += measure(generators, prompt[:length], width, settings, environment=describe_state)
                    done(len(rows) // len(generators))
    recorded = {
        "prompt": "random tokens" if prompt_file is None else prompt_file.name,
        "prompt_lens": list(lengths),
        "num_samples": list(widths),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "percentiles": list(wanted),
        "min_samples": settings.min_samples,
        "max_duration_s": max_duration,
        "warmup": warmup,
    }
    result = GenerationResult(command=command_line(), settings=recorded, environment=environment, rows=rows)
    if out is not None:
        result.write(out)
    if as_json:
        echo_json(result.to_dict())
    else:
        for line in [*result.lines(), _proof(result)]:
            click.echo(line)
    invalid = [row for row in rows if not row.valid]
    wrong = [row for row in invalid if row.same_tokens is False]
    if wrong or (invalid and not accept_invalid):
        worst = (wrong or invalid)[0]
        raise ValidationError(
            f"{len(invalid)} of {len(rows)} rows are INVALID; the first, {worst.name}: {worst.invalid_reasons[0]}.",
            remedy=None if wrong else "Measure longer, on an idle machine; or take them as they are with `--accept-invalid`.",
        )


def _opened(
    stack: contextlib.ExitStack,
    checkpoint: Path | None,
    runtimes: str | None,
    artifacts: Sequence[Path],
    prefill: Sequence[Path],
    mem_len: int | None,
    dtype: str | None,
    device: str,
    threads: int | None,
    segment_len: int | None,
) -> list[tuple[Opened, Generator]]:
    """Open all that is measured: the checkpoint first, so that the others are compared with it."""
    from txl_deploy.cli.bench_contenders import runtime_names
    from txl_deploy.cli.generate import SEGMENT_LEN, open_generator
    from txl_deploy.manifest import read_manifest
    from txl_deploy.opening import Lengths

    lengths = Lengths(tgt_len=1, mem_len=mem_len, ext_len=0)
    named = [] if checkpoint is None else [(checkpoint, None, name) for name in runtime_names(runtimes)]
    found = []
    for file, artifact, runtime in [*named, *((None, path, "") for path in artifacts)]:
        readers = () if artifact is None else tuple(p for p in prefill if read_manifest(p).format == read_manifest(artifact).format)
        found.append(open_generator(stack, file, artifact, readers, runtime, lengths, dtype, device, threads, segment_len or SEGMENT_LEN))
    first = found[0][0]
    for opened, _ in found[1:]:
        if opened.model_data.vocabulary != first.model_data.vocabulary:
            raise UsageError(f"{opened.origin} has another vocabulary than {first.origin}, so no prompt is the same for both.")
    return found


def _prompt(data: ModelData, file: Path | None, length: int, seed: int) -> list[int]:
    """Return the ids of the longest prompt."""
    import numpy as np

    from txl_deploy.corpora import encode_prompt

    if file is None:
        drawn: list[int] = np.random.default_rng(seed % 2**64).integers(0, len(data.vocabulary), length).tolist()
        return drawn
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The prompt {file} cannot be read: {error}.") from error
    ids, _ = encode_prompt(data, text, dataset=None)
    if len(ids) < length:
        raise UsageError(f"{file} has {len(ids)} tokens, fewer than the {length} of the longest prompt.", remedy="Give a longer text.")
    taken: list[int] = ids[:length].tolist()
    return taken


def _proof(result: GenerationResult) -> str:
    """Return what the rows' tokens have shown."""
    compared = [row for row in result.rows if row.same_tokens is not None]
    if not compared:
        return "The tokens were compared with nothing: measure a checkpoint and an artifact of it, or several runtimes, in one call."
    same = sum(row.same_tokens is True for row in compared)
    return f"{same} of {len(compared)} rows that were compared have drawn the tokens of the first generator, all of them."
