"""What `txl bench` measures: opens artifacts and checkpoints in groups of equal lengths, and asks each artifact for its proof."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from txl_train.errors import ArtifactError, UsageError, ValidationError, nearest

if TYPE_CHECKING:
    from txl_deploy.bench.harness import Contender, ExpectedNll
    from txl_deploy.corpora import ModelData
    from txl_deploy.manifest import Dtype
    from txl_deploy.opening import Lengths
    from txl_deploy.receipt import Receipt
    from txl_deploy.runtimes.base import RuntimeInfo
    from txl_train.config import MemoryKind
    from txl_train.data.corpus import Corpus

RUNTIMES = ("pytorch", "compiled", "torchscript", "onnx")


def runtime_names(text: str | None) -> list[str]:
    """Return the names in a list such as `pytorch,compiled`, each once. Raises UsageError for one that there is not."""
    found = list(dict.fromkeys(name.strip() for name in (text or "pytorch").split(",")))
    for name in found:
        if name not in RUNTIMES:
            raise UsageError(f"`{name}` is no runtime of a checkpoint.{nearest(name, RUNTIMES)}", remedy=f"There is {', '.join(RUNTIMES)}.")
    return found


def open_in(
    checkpoint: Path, runtime: str, dtype: Dtype, leader: RuntimeInfo, threads: int | None, stack: contextlib.ExitStack
) -> Contender:
    """Open the checkpoint in another runtime or type, for the lengths of the reference that leads its group."""
    from txl_deploy.bench.harness import Contender
    from txl_deploy.opening import Lengths, open_checkpoint

    config = leader.config
    lengths = Lengths(
        tgt_len=leader.tgt_len,
        mem_len=config.mem_len,
        ext_len=config.ext_len,
        clamp_len=config.clamp_len or -1,
        same_length=config.same_length,
        same_length_rule=config.same_length_rule,
    )
    opened = open_checkpoint(
        checkpoint, runtime=runtime, lengths=lengths, memory=leader.memory, dtype=dtype, device=leader.device, threads=threads
    )
    return Contender(stack.enter_context(opened).runtime)


def open_contenders(
    artifacts: Sequence[Path], checkpoint: Path | None, lengths: Lengths, memory: MemoryKind | None, *, device: str, threads: int | None
) -> tuple[list[list[Contender]], ModelData]:
    """Open what is to be measured, in groups of equal lengths, each led by the reference if there is a checkpoint.

    Raises UsageError for artifacts of different vocabularies or another head, ArtifactError for one that was not made from the checkpoint.
    """
    from txl_deploy.bench.harness import Contender
    from txl_deploy.corpora import ModelData
    from txl_deploy.opening import open_exported
    from txl_deploy.runtimes.registry import eager_from_checkpoint

    opened = [open_exported(path, lengths=lengths, memory=memory, head="nll", device=device, threads=threads) for path in artifacts]
    for path, other in zip(artifacts, opened):
        if other.model_data.vocabulary.sha256 != opened[0].model_data.vocabulary.sha256:
            raise UsageError(
                f"{path} has another vocabulary than {artifacts[0]}, so they cannot read the same tokens.",
                remedy="Measure them one by one.",
            )
    groups: dict[tuple[object, ...], list[Contender]] = {}
    for item in opened:
        config = item.runtime.info.config
        key = (item.runtime.info.tgt_len, config.mem_len, config.ext_len, config.clamp_len, config.max_distance)
        groups.setdefault(key, []).append(Contender(item.runtime))
    if checkpoint is None:
        return list(groups.values()), opened[0].model_data
    model_data = opened[0].model_data if opened else None
    led: list[list[Contender]] = []
    for group in list(groups.values()) or [[]]:
        info = group[0].runtime.info if group else None
        reference, loaded = eager_from_checkpoint(
            checkpoint,
            tgt_len=info.tgt_len if info else lengths.tgt_len,
            memory=memory,
            mem_len=info.mem_len if info else lengths.mem_len,
            ext_len=info.config.ext_len if info else lengths.ext_len,
            clamp_len=(info.config.clamp_len or -1) if info else lengths.clamp_len,
            same_length=info.config.same_length if info else lengths.same_length,
            same_length_rule=info.config.same_length_rule if info else lengths.same_length_rule,
            device=device,
            threads=threads,
        )
        for contender in group:
            if contender.runtime.info.checkpoint_sha256 != reference.info.checkpoint_sha256:
                raise ArtifactError(
                    f"{contender.runtime.info.origin} was not made from {checkpoint}, so it cannot be checked against it.",
                    remedy="Give the checkpoint it was made from, or export this one again with `txl export`.",
                )
        led.append([Contender(reference, is_reference=True), *group])
        model_data = model_data or ModelData(loaded.dataset, loaded.vocabulary, loaded.data_folder)
    assert model_data is not None
    return led, model_data


@dataclass
class Proofs:
    """The receipts that artifacts were found to have for the text that is to be measured on."""

    summaries: list[Mapping[str, Any]] = field(default_factory=list)
    """Of the receipts that prove an artifact, each once."""
    parents: dict[str, str] = field(default_factory=dict)
    """Checksum of the manifest of the graph that an engine was built from, by that of the engine's."""
    is_any_missing: bool = False
    """True if an artifact is measured without one."""


def prove(
    groups: Sequence[Sequence[Contender]], corpus: Corpus, split: str, receipts: Sequence[Path], *, unvalidated: bool
) -> tuple[list[list[Contender]], Proofs]:
    """Return the contenders with the proof of each artifact, recomputed from the files that are here.

    Args:
        receipts: files to take instead of those in the artifacts' folders, where they are of that artifact.
        unvalidated: measure an artifact without a receipt too, and mark it.

    Raises:
        ValidationError: an artifact has no receipt for this text, a stale one, one for other lengths, or one that failed.
        ReceiptError: a receipt is not as it was written.
    """
    from txl_deploy.bench.result import Proof
    from txl_deploy.manifest import read_manifest
    from txl_deploy.receipt import Receipt, require_receipt

    given = {}
    for path in receipts:
        try:
            given[Receipt.read(path).manifest_sha256] = path
        except FileNotFoundError:
            raise UsageError(f"There is no receipt {path}.", remedy="`txl eval --artifact DIR --receipt FILE` writes one.") from None
    proofs = Proofs()
    corpus_sha256 = corpus.sha256(split)

    def proved(contender: Contender) -> Contender:
        info = contender.runtime.info
        if info.manifest_sha256 is None:
            return contender  # the checkpoint itself
        directory = Path(info.origin)
        manifest = read_manifest(directory)
        if manifest.source.parent is not None:
            proofs.parents[info.manifest_sha256] = manifest.source.parent.manifest_sha256
        try:
            receipt, file = require_receipt(
                directory,
                info,
                dataset=corpus.spec.name,
                split=split,
                corpus_sha256=corpus_sha256,
                n_tokens=len(corpus.ids(split)),
                vocabulary_sha256=manifest.vocabulary_sha256,
                path=given.get(info.manifest_sha256),
            )
        except ValidationError as error:
            if not unvalidated:
                raise
            proofs.is_any_missing = True
            return dataclasses.replace(contender, proof=Proof(kind="none", reason=error.message))
        summary = receipt.summary(file)
        if summary not in proofs.summaries:
            proofs.summaries.append(summary)
        return dataclasses.replace(
            contender, proof=Proof(kind="receipt", receipt_sha256=summary["receipt_sha256"]), expected=_expected(receipt)
        )

    return [[proved(contender) for contender in group] for group in groups], proofs


def _expected(receipt: Receipt) -> ExpectedNll:
    """Return what the artifact's own nll was in each segment when its receipt was made."""
    from txl_deploy.bench.harness import ExpectedNll
    from txl_deploy.parity.tolerances import tolerance_for

    tolerance = tolerance_for(receipt.dtype, memory_dtype=receipt.memory_dtype)
    assert tolerance is not None  # the receipt has passed
    sums = receipt.segments
    return ExpectedNll(
        batch_size=receipt.batch_size,
        tgt_len=receipt.lengths.tgt_len,
        n_tokens=tuple(sums.n_tokens),
        nll_nats=tuple(sums.nll_nats),
        bound=tolerance.mean_bound(receipt.nll_nats_sum / receipt.n_tokens),
    )
