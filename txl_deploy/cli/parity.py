"""`txl parity`: an exported model against its checkpoint over a recurrent rollout; exit 1 if they differ.

With `--self-test`, whether the checks find the bugs they are there for: see `parity/self_test.py`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from txl_deploy.cli.options import data_options, device_option, echo_json, json_option, threads_option, verbosity_options
from txl_deploy.cli.progress import progress
from txl_train.errors import UsageError, ValidationError

if TYPE_CHECKING:
    from txl_deploy.parity.layers import Bisection
    from txl_deploy.parity.rollout import ParityResult
    from txl_deploy.runtimes.base import RuntimeInfo


@click.command("parity")
@click.option("--checkpoint", "--model", type=click.Path(path_type=Path), metavar="FILE", help="The checkpoint, run in eager PyTorch.")
@click.option("--artifact", type=click.Path(path_type=Path), metavar="DIR", help="A folder that `txl export` wrote from it.")
@data_options
@click.option(
    "--segments",
    type=click.IntRange(min=1),
    metavar="N",
    help="Segments to run.  [default: twice the receptive field and 16 after it at least, as far as the text goes]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Streams; all but the first start late or end early, and are reset once.  [default: 3, or as near as the artifact takes]",
)
@click.option(
    "--distribution-segments",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    metavar="N",
    help="Segments at which the predictions of all words are compared; each costs a dozen steps more. 0 leaves that out.",
)
@click.option(
    "--bisect",
    is_flag=True,
    help="Name the first layer, and the first tensor in it, that leaves the bound; where none does, show how the error grows. ONNX only.",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Draw the differences per segment to a PNG.")
@click.option(
    "--self-test",
    is_flag=True,
    help="Put known bugs into an exported model, one at a time, and print which check finds each: exit 1 if one is missed. Takes a "
    "--checkpoint, or makes a small model of its own.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Also write the JSON document to FILE.")
@device_option
@threads_option
@json_option
@verbosity_options
def command(
    checkpoint: Path | None,
    artifact: Path | None,
    dataset: str | None,
    data: Path | None,
    split: str,
    segments: int | None,
    batch_size: int | None,
    distribution_segments: int,
    bisect: bool,
    plot: Path | None,
    self_test: bool,
    out: Path | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Run checkpoint and exported model over the same text from a cold start, each on its own memory, and compare.

    The reference is FP32 in eager PyTorch, whatever the artifact's precision. Each token's nll, all of them together, their mean, every
    state of the memory and the predictions of all words must agree within the bounds for that precision, and no difference may grow over
    the segments; of an artifact that scores the next token, each word's nll is compared.
    """
    if self_test:
        if artifact is not None or plot is not None or bisect:
            raise UsageError("`--self-test` makes its own artifacts: `--artifact`, `--plot` and `--bisect` have no meaning with it.")
        context = click.get_current_context()
        unused = ("dataset", "data", "split", "segments", "batch_size", "device", "threads")
        for name in unused:
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise UsageError(f"`--{name.replace('_', '-')}` has no meaning with `--self-test`, which has texts of its own.")
        from txl_deploy.cli.self_test import run_self_test

        run_self_test(checkpoint, as_json, out)
        return
    if checkpoint is None or artifact is None:
        missing = "--checkpoint" if checkpoint is None else "--artifact"
        raise UsageError(f"`{missing}` is missing.", remedy="Give the checkpoint and what was exported from it, or `--self-test`.")
    from txl_deploy.corpora import open_corpus
    from txl_deploy.manifest import artifact_file
    from txl_deploy.opening import open_exported
    from txl_deploy.parity import layers
    from txl_deploy.parity.rollout import compare, default_segments
    from txl_deploy.runtimes.registry import eager_from_checkpoint
    from txl_train.data.segments import SegmentIterator
    from txl_train.files import check_replaceable, whole_or_absent, write_json

    if out is not None:
        check_replaceable(out, b"{")
    if plot is not None:
        check_replaceable(plot, b"\x89PNG")
    opened = open_exported(artifact, device=device, threads=threads)
    info = opened.runtime.info
    if bisect:
        layers.check_can_bisect(opened.runtime)
    reference, loaded = eager_from_checkpoint(
        checkpoint,
        tgt_len=info.tgt_len,
        memory=info.memory,
        mem_len=info.mem_len,
        ext_len=info.config.ext_len,
        clamp_len=info.config.clamp_len or -1,
        same_length=info.config.same_length,
        same_length_rule=info.config.same_length_rule,
        head=info.head,
        device="cpu",
        threads=threads,
        packed=not bisect,
    )
    if reference.info.checkpoint_sha256 != info.checkpoint_sha256:
        raise ValidationError(
            f"{artifact} was not made from {checkpoint}: it names a checkpoint with sha256 {(info.checkpoint_sha256 or '')[:12]}…, "
            f"this one has {(reference.info.checkpoint_sha256 or '')[:12]}….",
            remedy="Give the checkpoint it was made from, or export this one again.",
        )
    corpus = open_corpus(opened.model_data, dataset=dataset, data=data)
    iterator = SegmentIterator(
        corpus.ids(split), batch_size=batch_size or _batch_size(info), tgt_len=info.tgt_len, ext_len=info.config.ext_len
    )
    chosen = list(itertools.islice(iterator, segments or default_segments(info.config, info.tgt_len)))
    with progress("comparing", len(chosen)) as advance:
        result = compare(reference, opened.runtime, chosen, distribution_segments=distribution_segments, on_step=advance)
    found: Bisection | None = None
    if bisect:
        graph = artifact_file(artifact, "model.onnx")
        found = layers.bisect(reference, opened.runtime, graph, chosen, layers.segment_to_examine(result))
    document = {
        **result.to_dict(),
        "bisection": None if found is None else found.to_dict(),
        "artifact": str(artifact),
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": info.checkpoint_sha256,
        "manifest_sha256": info.manifest_sha256,
        "runtime": info.name,
        "provider": info.provider,
        "dtype": info.dtype,
        "compute": info.compute,
        "memory_dtype": info.memory_dtype,
        "head": info.head,
        "dataset": dataset or loaded.dataset,
        "split": split,
        "corpus_sha256": corpus.sha256(split),
    }
    if out is not None:
        write_json(out, document)
    if plot is not None:
        from txl_deploy.bench.plots_parity import drift_chart

        with whole_or_absent(plot) as file:
            file.write(drift_chart(document).png)
    if as_json:
        echo_json(document)
    else:
        _print(result)
        if found is not None:
            _print_bisection(found)
        click.echo(f"{'PASSED' if result.passed else 'FAILED'}: {result.reason}")
    if not result.passed:
        where = "" if found is None else f" In segment {found.segment}, {found.reason}."
        remedy = "`txl parity --bisect` names the layer it begins in." if found is None and info.name == "onnx" else None
        raise ValidationError(f"{artifact} does not compute what {checkpoint} does: {result.reason}.{where}", remedy=remedy)


def _batch_size(info: RuntimeInfo) -> int:
    """Return 3, or the number nearest to it that the artifact takes: more than one stream where it can be, so that the axis counts."""
    return max(info.min_batch, min(3, info.max_batch or 3))


def _print(result: ParityResult) -> None:
    click.echo(f"reference  {result.reference}")
    click.echo(f"candidate  {result.candidate}")
    field = result.receptive_field_segments
    reach = "" if result.n_segments >= 2 * field else "; the text is too short for twice that"
    words = f", {result.n_compared:,} words' scores as the next one" if result.unit == "word" else ""
    click.echo(
        f"{result.n_segments} segments of {result.batch_size} streams, {result.n_tokens:,} tokens{words} (receptive field: {field} segments"
        f"{reach}); each side on its own memory, streams start, start anew and end at different times"
    )
    click.echo(f"{'segment':>7} {'tokens':>7} {'mean Δnll':>12} {'rms Δnll':>12} {'max |Δnll|':>12} {'memory error':>13}  starts  running")
    for part in result.segments:
        starts = ",".join(map(str, part.reset_streams))
        running = "all" if len(part.live_streams) == result.batch_size else ",".join(map(str, part.live_streams))
        nll = f"{part.mean_delta_nll:>12.2e} {part.rms_delta_nll:>12.2e} {part.max_abs_delta_nll:>12.2e}"
        click.echo(f"{part.index:>7} {part.n_tokens:>7} {nll} {part.memory_error:>13.2e}  {starts:<6}  {running}".rstrip())
    bounds = result.tolerance
    ends = f"{bounds.mean_nll:>12.2e} {bounds.rms_nll:>12.2e} {bounds.token_nll:>12.2e} {bounds.memory:>13.2e}"
    click.echo(f"{'bound':>7} {'':>7} {ends}")
    if result.memory_error_by_layer:
        click.echo(f"memory error by layer  {'  '.join(f'{error:.1e}' for error in result.memory_error_by_layer)}")
    where = ", ".join(f"{name} {number}" for name, number in result.worst_token.items())
    click.echo(f"worst {result.unit:<16} {result.max_abs_delta_nll:.2e} nats at {where}")
    click.echo(f"perplexity             {result.perplexity_reference:.6f} and {result.perplexity_candidate:.6f}")
    click.echo(
        f"mean Δnll              {result.mean_delta_nll:.2e} nats, |mean| below {result.upper_bound_mean_nll:.1e} with 95 % confidence "
        f"(bound {bounds.mean_nll:.1e})"
    )
    trend = result.trend
    slope = ""
    if trend.slope_per_segment is not None and trend.interval is not None:
        low, high = trend.interval
        slope = f"; rms Δnll changes by {trend.slope_per_segment:.1e} nats per segment (99 %: {low:.1e} to {high:.1e})"
    click.echo(f"trend                  {trend.reason}{slope}")
    found = result.distribution
    if found is not None:
        kl = f"KL {found.kl_nats:.1e} ± {found.kl_standard_error:.0e} nats (bound {bounds.kl:.1e})"
        undecided = f", {found.top1_undecided:,} undecided" if found.top1_undecided else ""
        swap = (
            f", swapped words at most {found.largest_swap_nats:.1e} nats apart (bound {bounds.swap:.1e})" if found.largest_swap_nats else ""
        )
        click.echo(f"distributions          {kl} at {found.n_positions:,} positions of {found.n_segments} segments ({found.compared})")
        same = "-" if found.top1_agreement is None else f"the same at {found.top1_agreement:.2%}"
        click.echo(f"likeliest word         {same} of {found.top1_decided:,} positions{undecided}{swap}")


def _print_bisection(found: Bisection) -> None:
    click.echo("")
    nodes = f"{len(found.tensors)} of {found.n_nodes} nodes"
    click.echo(f"Within segment {found.segment}: {nodes}, computed by {found.provider} and by eager PyTorch from the same memory;")
    click.echo("errors are shares of the largest magnitude")
    width = max(len(name) for part in found.places for name in (part.worst, part.first_beyond or ""))
    click.echo(f"{'':<10} {'tensors':>7} {'largest error':>13}  {'where':<{width}}  first beyond its bound")
    for part in found.places:
        beyond = part.first_beyond or "-"
        click.echo(f"{part.place:<10} {part.n_tensors:>7} {part.error:>13.2e}  {part.worst:<{width}}  {beyond}")
    if found.place is not None:
        tensors = [tensor for tensor in found.tensors if tensor.place == found.place]
        first = next(i for i, tensor in enumerate(tensors) if tensor.name == found.tensor)
        click.echo(f"{found.place}, up to the first tensor beyond its bound and the two after it:")
        for tensor in tensors[: first + 3]:
            mark = "" if tensor.within else f"  beyond {tensor.bound:.1e}"
            click.echo(f"  {tensor.error:>10.2e}  {tensor.name} {tensor.shape} {tensor.dtype}{mark}")
    click.echo(f"{found.reason[0].upper()}{found.reason[1:]}.")
    click.echo("")
