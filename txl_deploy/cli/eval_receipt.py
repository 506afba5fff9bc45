"""The receipt of an evaluation: scores the same segments with the checkpoint in FP32 eager PyTorch, and writes what came of both."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from txl_deploy.cli.options import command_line
from txl_deploy.cli.progress import progress
from txl_deploy.cli.together import all_or_none
from txl_train.errors import EnvironmentUnfitError, UsageError, ValidationError

if TYPE_CHECKING:
    from txl_deploy.receipt import Receipt
    from txl_deploy.runtimes.eager import EagerRuntime
    from txl_deploy.scoring import Plan, Request
    from txl_train.distributed import World
    from txl_train.evaluate import EvalResult

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReceiptJob:
    """Where the receipts of an artifact are to go, and what they compare it with."""

    artifact: Path
    checkpoint: Path | None
    """None: it is looked for beside the artifact."""
    file: Path | None
    """None: in the artifact's folder."""
    threads: int | None

    def path(self, split: str) -> Path:
        """Return the file that the receipt for a split goes to."""
        from txl_deploy.receipt import receipt_name

        return self.file or self.artifact / receipt_name(split)

    def check_writable(self, splits: tuple[str, ...]) -> None:
        """Refuse now what could not be written after minutes of scoring."""
        from txl_train.files import check_replaceable

        if self.file is not None and len(splits) > 1:
            raise UsageError("`--receipt` names one file, but there is a receipt for each split.", remedy="Evaluate one split at a time.")
        for split in splits:
            path = self.path(split)
            check_replaceable(path, b"{")
            try:
                with tempfile.TemporaryFile(dir=path.parent):
                    pass
            except OSError as error:
                raise EnvironmentUnfitError(
                    f"{path} cannot be written: {error.strerror or error}.",
                    remedy="Name another file with `--receipt FILE`, or add `--no-receipt`.",
                ) from error


def why_no_receipt(request: Request, splits: tuple[str, ...]) -> str | None:
    """Return why this evaluation gives no receipt, or None if it does: a receipt is of a whole split, each token scored once."""
    if splits == ("manual",):
        return "the text is no split of a corpus"
    if request.protocol != "exact":
        return f"the protocol {request.protocol} does not score every token once"
    if request.max_size is not None or request.repeat != 1:
        return "not the whole split is scored, or more than once"
    return None


def open_reference(job: ReceiptJob, plan: Plan, world: World) -> EagerRuntime | None:
    """Open the artifact's checkpoint in FP32 eager PyTorch for the same lengths, or return None where it is not at hand.

    Raises ValidationError if the checkpoint that was named is another one.
    """
    from txl_deploy.manifest import read_manifest
    from txl_deploy.receipt import find_checkpoint
    from txl_deploy.runtimes.registry import eager_from_checkpoint

    info = plan.opened.runtime.info
    checkpoint = job.checkpoint or find_checkpoint(job.artifact, read_manifest(job.artifact))
    if checkpoint is None:
        return None

    def load() -> EagerRuntime:
        reference, _ = eager_from_checkpoint(
            checkpoint,
            tgt_len=info.tgt_len,
            memory=info.memory,
            mem_len=info.mem_len,
            ext_len=info.config.ext_len,
            clamp_len=info.config.clamp_len or -1,
            same_length=info.config.same_length,
            same_length_rule=info.config.same_length_rule,
            device=info.device,
            threads=job.threads,
        )
        if reference.info.checkpoint_sha256 != info.checkpoint_sha256:
            raise ValidationError(f"{job.artifact} was not made from {checkpoint}.", remedy="Leave `--checkpoint` out, or export it again.")
        return reference

    return all_or_none(world, load)


def score_reference(reference: EagerRuntime, plan: Plan, world: World, tell_nobody: Callable[[int], None]) -> EvalResult:
    """Score the plan's segments with the reference; all processes must call this together."""
    import dataclasses

    ours = dataclasses.replace(plan, opened=dataclasses.replace(plan.opened, runtime=reference), stepper=reference)
    ours = dataclasses.replace(ours, request=dataclasses.replace(plan.request, timed=False))
    with progress("scoring the checkpoint", plan.steps) if world.is_main else contextlib.nullcontext(tell_nobody) as advance:
        return ours.score(advance)


def make_receipt(plan: Plan, result: EvalResult, reference: EagerRuntime | None, expected: EvalResult | None, world: World) -> Receipt:
    """Return the receipt of an evaluation, `expected` being the reference's on the same segments."""
    from txl_deploy.bench.environment import git_commit
    from txl_deploy.receipt import Lengths, Receipt, SegmentSums, versions

    info, facts = plan.opened.runtime.info, plan.text.facts
    assert info.manifest_sha256 is not None
    assert info.checkpoint_sha256 is not None
    return Receipt(
        manifest_sha256=info.manifest_sha256,
        parent_manifest_sha256=_parent(Path(plan.opened.origin)),
        checkpoint_sha256=info.checkpoint_sha256,
        corpus_sha256=facts["corpus_sha256"],
        vocabulary_sha256=facts["vocabulary_sha256"],
        dataset=facts["dataset"],
        split=facts["split"],
        lengths=Lengths.of(info),
        batch_size=plan.request.batch_size,
        processes=world.size,
        runtime=info.name,
        provider=info.provider,
        device=info.device.partition(":")[0],
        dtype=info.dtype,
        compute=info.compute,
        memory=info.memory,
        memory_dtype=info.memory_dtype,
        n_tokens_in_text=facts["n_tokens_in_text"],
        segments=SegmentSums(
            n_tokens=list(result.segment_tokens),
            nll_nats=list(result.segment_nll_nats),
            reference_nll_nats=None if expected is None else list(expected.segment_nll_nats),
        ),
        reference_device=None if reference is None else reference.info.device.partition(":")[0],
        command=command_line(),
        versions=versions(),
        git_commit=git_commit(),
        time_utc=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _parent(directory: Path) -> str | None:
    from txl_deploy.manifest import read_manifest

    parent = read_manifest(directory).source.parent
    return None if parent is None else parent.manifest_sha256


def keeps_proof(path: Path, receipt: Receipt) -> bool:
    """Return whether there is a proof of the same artifact on the same text already, which one without a comparison must not replace."""
    from txl_deploy.receipt import Receipt, ReceiptError

    if receipt.segments.reference_nll_nats is not None:
        return False
    try:
        there = Receipt.read(path)
    except (FileNotFoundError, ReceiptError):
        return False
    same = (there.manifest_sha256, there.corpus_sha256, there.split) == (receipt.manifest_sha256, receipt.corpus_sha256, receipt.split)
    return same and there.verdict().passed


def lines(summary: dict[str, Any], path: Path) -> list[str]:
    """Return what the receipt says, for a reader."""
    low, high = (math.inf if end is None else end for end in summary["perplexity_interval_95"])
    told = [f"Receipt: {path}", f"Perplexity of text like this, 95 % interval: {low:.3f} to {high:.3f}"]
    if summary["reference_nll_nats_sum"] is None:
        return [*told, "Not compared with its checkpoint, which is not beside it: `--checkpoint FILE` makes the receipt a proof."]
    reference, ours = (math.inf if summary[name] is None else summary[name] for name in ("reference_perplexity", "perplexity"))
    told.append(f"The checkpoint in FP32 eager PyTorch: {reference:.6f}; this artifact: {ours:.6f}")
    return [*told, f"{'PASSED' if summary['passed'] else 'FAILED'}: {summary['reason']}"]
