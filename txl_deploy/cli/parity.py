"""`txl parity`: an exported model against its checkpoint over a recurrent rollout; exit 1 if they differ."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from txl_deploy.cli.options import data_options, device_option, echo_json, json_option, threads_option, verbosity_options
from txl_deploy.cli.progress import progress
from txl_train.errors import ValidationError

if TYPE_CHECKING:
    from txl_deploy.parity.rollout import ParityResult


@click.command("parity")
@click.option(
    "--checkpoint", "--model", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The checkpoint, run in eager PyTorch."
)
@click.option("--artifact", type=click.Path(path_type=Path), required=True, metavar="DIR", help="A folder that `txl export` wrote from it.")
@data_options
@click.option(
    "--segments",
    type=click.IntRange(min=1),
    metavar="N",
    help="Segments to run.  [default: twice the receptive field, as far as the text goes]",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Streams; all but the first are reset once."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Also write the JSON document to FILE.")
@device_option
@threads_option
@json_option
@verbosity_options
def command(
    checkpoint: Path,
    artifact: Path,
    dataset: str | None,
    data: Path | None,
    split: str,
    segments: int | None,
    batch_size: int,
    out: Path | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Run checkpoint and exported model over the same text from a cold start, each on its own memory, and compare.

    Each token's nll and every state of the memory must agree within the bounds for the artifact's precision.
    """
    from txl_deploy.corpora import open_corpus
    from txl_deploy.opening import open_exported
    from txl_deploy.parity.rollout import compare, default_segments
    from txl_deploy.runtimes.registry import eager_from_checkpoint
    from txl_train.data.segments import SegmentIterator
    from txl_train.files import check_replaceable, write_json

    if out is not None:
        check_replaceable(out, b"{")
    opened = open_exported(artifact, device=device, threads=threads)
    info = opened.runtime.info
    reference, loaded = eager_from_checkpoint(
        checkpoint,
        tgt_len=info.tgt_len,
        memory=info.memory,
        mem_len=info.mem_len,
        ext_len=info.config.ext_len,
        clamp_len=info.config.clamp_len or -1,
        same_length=info.config.same_length,
        same_length_rule=info.config.same_length_rule,
        device="cpu",
        threads=threads,
    )
    if reference.info.checkpoint_sha256 != info.checkpoint_sha256:
        raise ValidationError(
            f"{artifact} was not made from {checkpoint}: it names a checkpoint with sha256 {(info.checkpoint_sha256 or '')[:12]}…, "
            f"this one has {(reference.info.checkpoint_sha256 or '')[:12]}….",
            remedy="Give the checkpoint it was made from, or export this one again.",
        )
    corpus = open_corpus(opened.model_data, dataset=dataset, data=data)
    iterator = SegmentIterator(corpus.ids(split), batch_size=batch_size, tgt_len=info.tgt_len, ext_len=info.config.ext_len)
    chosen = list(itertools.islice(iterator, segments or default_segments(info.config, info.tgt_len)))
    with progress("comparing", len(chosen)) as advance:
        result = compare(reference, opened.runtime, chosen, on_step=advance)
    document = {
        **result.to_dict(),
        "artifact": str(artifact),
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": info.checkpoint_sha256,
        "manifest_sha256": info.manifest_sha256,
        "runtime": info.name,
        "provider": info.provider,
        "dtype": info.dtype,
        "dataset": dataset or loaded.dataset,
        "split": split,
        "corpus_sha256": corpus.sha256(split),
    }
    if out is not None:
        write_json(out, document)
    if as_json:
        echo_json(document)
    else:
        _print(result)
    if not result.passed:
        raise ValidationError(f"{artifact} does not compute what {checkpoint} does: {result.reason}.")


def _print(result: ParityResult) -> None:
    click.echo(f"reference  {result.reference}")
    click.echo(f"candidate  {result.candidate}")
    field = result.receptive_field_segments
    reach = "" if result.n_segments >= 2 * field else "; the text is too short for twice that"
    click.echo(
        f"{result.n_segments} segments of {result.batch_size} streams, {result.n_tokens:,} tokens (receptive field: {field} segments"
        f"{reach}); each side on its own memory, streams reset at different times"
    )
    click.echo(f"{'segment':>7} {'tokens':>7} {'mean Δnll':>12} {'max |Δnll|':>12} {'memory error':>13}  reset")
    for part in result.segments:
        resets = ",".join(map(str, part.reset_streams))
        figures = f"{part.mean_delta_nll:>12.2e} {part.max_abs_delta_nll:>12.2e} {part.memory_error:>13.2e}"
        click.echo(f"{part.index:>7} {part.n_tokens:>7} {figures}  {resets}".rstrip())
    click.echo(
        f"perplexity {result.perplexity_reference:.6f} and {result.perplexity_candidate:.6f}, "
        f"mean Δnll {result.mean_delta_nll:.2e}, trend {result.slope_per_segment:.1e} nats per segment"
    )
    click.echo(f"{'PASSED' if result.passed else 'FAILED'}: {result.reason}")
