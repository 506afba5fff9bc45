"""The proof that an exported model scores a text as its checkpoint does: what `txl eval --artifact` writes and `txl bench` asks for.

A receipt names by sha256 what was scored, with what and on what, and holds the nll of every segment twice: of the artifact, and of the
checkpoint in FP32 eager PyTorch on the same segments. Sums, perplexities, intervals and the verdict follow from those, so whoever reads it
computes them again. Scoring is done elsewhere (`scoring`); what to do without a receipt is decided by whoever asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from txl_deploy import documents
from txl_deploy.bootstrap import abs_mean_bound, mean_interval
from txl_deploy.manifest import Manifest
from txl_deploy.parity.tolerances import tolerance_for
from txl_train import metrics
from txl_train.errors import ArtifactError, ValidationError
from txl_train.files import file_sha256, finite, whole_or_absent

if TYPE_CHECKING:
    from txl_deploy.runtimes.base import RuntimeInfo

SCHEMA = "txl.receipt"
SCHEMA_VERSION = 1
CONFIDENCE = 0.95
"""Of the intervals, and of the bound on the mean difference."""

COMPUTING = ("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx")
"""Packages of which another version may compute something else."""

_REMEDY = "Make it again with `txl eval --artifact DIR --checkpoint FILE`."


class ReceiptError(ArtifactError):
    """A receipt is unreadable, was changed, or is of another version."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """All lengths that change what a model computes."""

    tgt_len: int
    mem_len: int
    ext_len: int
    clamp_len: int | None
    same_length: bool
    same_length_rule: str

    def __str__(self) -> str:
        clamp = "no clamp" if self.clamp_len is None else f"clamp {self.clamp_len}"
        same = f", same length by {self.same_length_rule}" if self.same_length else ""
        return f"tgt {self.tgt_len}, mem {self.mem_len}, ext {self.ext_len}, {clamp}{same}"

    @classmethod
    def of(cls, info: RuntimeInfo) -> Lengths:
        """Return those of a runtime."""
        config = info.config
        return cls(
            tgt_len=info.tgt_len,
            mem_len=config.mem_len,
            ext_len=config.ext_len,
            clamp_len=config.clamp_len,
            same_length=config.same_length,
            same_length_rule=config.same_length_rule,
        )


_LARGEST = 10**15
"""Tokens or nats of a segment, whose squares can be added up in float64."""


@dataclass(frozen=True, kw_only=True)
class SegmentSums:
    """What was scored in each segment, in order, over all streams."""

    n_tokens: list[int]
    """Counted targets."""
    nll_nats: list[float]
    """Sum of −log p by the artifact."""
    reference_nll_nats: list[float] | None
    """The same by the checkpoint in FP32 eager PyTorch; None if it was not at hand."""

    def __post_init__(self) -> None:
        series = [self.nll_nats, *([] if self.reference_nll_nats is None else [self.reference_nll_nats])]
        if not self.n_tokens or any(len(values) != len(self.n_tokens) for values in series):
            raise ReceiptError("`segments` must hold equally many figures of each kind, at least one.", remedy=_REMEDY)
        if min(self.n_tokens) < 0 or not all(math.isfinite(value) for values in series for value in values):
            raise ReceiptError("`segments` must hold finite figures.", remedy=_REMEDY)
        if max(self.n_tokens) > _LARGEST or not all(abs(value) <= _LARGEST for values in series for value in values):
            raise ReceiptError(f"`segments` must hold figures of up to {_LARGEST:.0e}: no text has more.", remedy=_REMEDY)
        if sum(self.n_tokens) == 0:
            raise ReceiptError("`segments` scored no token.", remedy=_REMEDY)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One evaluation of one artifact on one split."""

    schema: str = SCHEMA
    schema_version: int = SCHEMA_VERSION
    manifest_sha256: str
    """Checksum of the artifact's manifest, which names each of its files by checksum."""
    parent_manifest_sha256: str | None
    """Of the graph that an engine was built from."""
    checkpoint_sha256: str
    corpus_sha256: str
    """Checksum of the text of this split."""
    vocabulary_sha256: str
    dataset: str
    split: str
    lengths: Lengths
    batch_size: int
    """Streams the text was read by."""
    processes: int
    runtime: str
    provider: str
    device: str
    dtype: str
    compute: str
    memory: str
    memory_dtype: str
    n_tokens_in_text: int
    """Tokens of the split; all but the first have a predecessor, and must have been scored."""
    segments: SegmentSums
    reference_device: str | None
    """Where the reference was computed; None if it was not."""
    command: str
    versions: dict[str, str]
    """Version of each package that took part, by name."""
    git_commit: str | None
    time_utc: str

    def __post_init__(self) -> None:
        if self.schema != SCHEMA or self.schema_version != SCHEMA_VERSION:
            raise ReceiptError(
                f"It is of schema {self.schema} {self.schema_version}, but this txl reads {SCHEMA} {SCHEMA_VERSION}.", remedy=_REMEDY
            )

    @property
    def n_tokens(self) -> int:
        """Tokens scored."""
        return sum(self.segments.n_tokens)

    @property
    def nll_nats_sum(self) -> float:
        """Sum of −log p by the artifact, exact in float64."""
        return math.fsum(self.segments.nll_nats)

    @property
    def reference_nll_nats_sum(self) -> float | None:
        """Sum of −log p by the reference; None if it was not at hand."""
        return None if self.segments.reference_nll_nats is None else math.fsum(self.segments.reference_nll_nats)

    @property
    def perplexity(self) -> float:
        """By the artifact."""
        return metrics.perplexity(self.nll_nats_sum / self.n_tokens)

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """95 % interval of the perplexity on text like this, by block bootstrap over segments."""
        low, high = mean_interval(self.segments.nll_nats, [float(n) for n in self.segments.n_tokens], confidence=CONFIDENCE)
        return metrics.perplexity(low), metrics.perplexity(high)

    def verdict(self) -> Verdict:
        """Judge whether artifact and reference are equivalent on this text."""
        sums = self.segments
        scored = f"{self.n_tokens:,} of the {self.n_tokens_in_text - 1:,} tokens that have a predecessor"
        complete = self.n_tokens == self.n_tokens_in_text - 1
        if sums.reference_nll_nats is None or self.reference_nll_nats_sum is None:
            reason = "it was not compared with its checkpoint, which was not at hand"
            return Verdict(False, reason, None, None, None)
        reference_mean = self.reference_nll_nats_sum / self.n_tokens
        deltas = [ours - theirs for ours, theirs in zip(sums.nll_nats, sums.reference_nll_nats)]
        mean_delta = math.fsum(deltas) / self.n_tokens
        upper = abs_mean_bound(deltas, [float(n) for n in sums.n_tokens], confidence=CONFIDENCE)
        tolerance = tolerance_for(self.dtype, memory_dtype=self.memory_dtype)
        if tolerance is None:
            return Verdict(False, f"there is no bound for {self.dtype} yet", mean_delta, upper, None)
        bound = tolerance.mean_bound(reference_mean)
        if not complete:
            return Verdict(False, f"it scored {scored}", mean_delta, upper, bound)
        if not upper <= bound:
            reason = f"its mean nll may differ from the checkpoint's by {upper:.2e} nats, more than {bound:.1e}"
            return Verdict(False, reason, mean_delta, upper, bound)
        reason = f"its mean nll differs from the checkpoint's by {upper:.2e} nats at most (bound {bound:.1e}, confidence {CONFIDENCE:.0%})"
        return Verdict(True, reason, mean_delta, upper, bound)

    def summary(self, file: Path | None = None) -> dict[str, Any]:
        """Return all but the segments as plain values, with what follows from these; with `file`, its name and checksum."""
        verdict = self.verdict()
        reference = self.reference_nll_nats_sum
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("segments", "lengths")}
        named = {} if file is None else {"file": file.name, "receipt_sha256": file_sha256(file)}
        low, high = self.perplexity_interval
        document: dict[str, Any] = {
            **plain,
            **dataclasses.asdict(self.lengths),
            "n_segments": len(self.segments.n_tokens),
            "n_tokens": self.n_tokens,
            "nll_nats_sum": self.nll_nats_sum,
            "reference_nll_nats_sum": reference,
            "perplexity": self.perplexity,
            "perplexity_interval_95": [low, high],
            "reference_perplexity": None if reference is None else metrics.perplexity(reference / self.n_tokens),
            "mean_delta_nll": verdict.mean_delta_nll,
            "mean_delta_upper_bound": verdict.upper_bound,
            "equivalence_bound": verdict.bound,
            "passed": verdict.passed,
            "reason": verdict.reason,
            **named,
        }
        finite_document: dict[str, Any] = finite(document)
        return finite_document

    def write(self, path: Path) -> None:
        """Write it, whole or not at all. EnvironmentUnfitError where it cannot be written."""
        text = documents.to_text(self)
        with whole_or_absent(path) as file:
            file.write(text.encode())

    @classmethod
    def read(cls, path: Path) -> Receipt:
        """Read a receipt. ReceiptError (exit code 4) if it is not as it was written, FileNotFoundError if there is none."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            raise ReceiptError(f"{path} cannot be read: {error}.", remedy=_REMEDY) from error
        document = documents.parse(text, path, ReceiptError, _REMEDY)
        documents.check_content(document, path, ReceiptError, _REMEDY)
        try:
            receipt = documents.from_plain(cls, document, error=ReceiptError)
        except ReceiptError as error:
            raise ReceiptError(f"{path} is no receipt that this txl reads: {error.message}", remedy=_REMEDY) from error
        assert isinstance(receipt, Receipt)
        return receipt


@dataclass(frozen=True)
class Verdict:
    """Whether a receipt proves anything."""

    passed: bool
    reason: str
    """One clause."""
    mean_delta_nll: float | None
    """Artifact minus reference, nats per token."""
    upper_bound: float | None
    """What the magnitude of that stays below, with 95 % confidence; nats per token."""
    bound: float | None
    """What it has to stay below; nats per token."""


def receipt_name(split: str) -> str:
    """Return the file that holds the receipt for a split within an artifact's folder."""
    return "receipt.json" if split == "test" else f"receipt-{split}.json"


def find_checkpoint(directory: Path, manifest: Manifest) -> Path | None:
    """Return the checkpoint an artifact was made from where it lies beside the artifact's folder under its own name, else None."""
    name = manifest.source.checkpoint_name
    if Path(name).name != name:
        return None
    for folder in (directory.resolve().parent, directory.resolve()):
        path = folder / name
        if path.is_file() and file_sha256(path) == manifest.source.checkpoint_sha256:
            return path
    return None


def examine(directory: Path, manifest: Manifest, manifest_sha256: str) -> list[tuple[str, bool | None, str]]:
    """Return of each receipt in an artifact's folder its name, whether it is a proof of this artifact, and what it says in one clause.

    None where nothing was compared, so that it neither proves nor disproves.
    """
    found: list[tuple[str, bool | None, str]] = []
    for path in sorted(directory.glob("receipt*.json")):
        try:
            receipt = Receipt.read(path)
        except ReceiptError as error:
            found.append((path.name, False, error.message))
            continue
        verdict = receipt.verdict()
        about = f"perplexity {receipt.perplexity:.6g} on {receipt.n_tokens:,} tokens of {receipt.dataset} {receipt.split}"
        settings = manifest.settings
        pairs: tuple[tuple[object, object], ...] = (
            (receipt.runtime, manifest.format),
            (receipt.dtype, settings.dtype),
            (receipt.memory, settings.memory),
            (receipt.memory_dtype, settings.memory_dtype),
            (receipt.checkpoint_sha256, manifest.source.checkpoint_sha256),
            (receipt.vocabulary_sha256, manifest.vocabulary_sha256),
            ((receipt.lengths.tgt_len, receipt.lengths.mem_len), (settings.tgt_len, settings.mem_len)),
        )
        if receipt.manifest_sha256 != manifest_sha256:
            found.append((path.name, False, "is stale: it is of another artifact"))
        elif any(claimed != actual for claimed, actual in pairs):
            found.append((path.name, False, "is not of what the manifest describes"))
        else:
            compared = receipt.segments.reference_nll_nats is not None
            found.append((path.name, verdict.passed if compared else None, f"{about}: {verdict.reason}"))
    return found


def require_receipt(
    directory: Path,
    info: RuntimeInfo,
    *,
    dataset: str,
    split: str,
    corpus_sha256: str,
    n_tokens: int,
    vocabulary_sha256: str,
    path: Path | None = None,
) -> tuple[Receipt, Path]:
    """Return the receipt that proves the artifact in `directory` for this text, and its file.

    Args:
        directory: the artifact, whose files were checked against its manifest.
        info: of the artifact, opened now: its checksums are those of what is here, not of what the receipt says.
        dataset: by whose rules the text that is to be measured on became tokens.
        split: of that text.
        corpus_sha256: of that text.
        n_tokens: that it has.
        vocabulary_sha256: of the artifact's vocabulary.
        path: the receipt; None means `receipt_name(split)` in the folder.

    Raises:
        ValidationError: it is missing, was made for something else, or failed; the message says which.
        ReceiptError: it is not as it was written.
    """
    remedy = f"Make one with `txl eval --artifact {directory} --checkpoint FILE --split {split}`, or measure without with `--unvalidated`."
    file = path or directory / receipt_name(split)
    try:
        receipt = Receipt.read(file)
    except FileNotFoundError:
        others = sorted(found.name for found in directory.glob("receipt*.json"))
        there = f" (there is {', '.join(others)}, of other splits)" if others else ""
        raise ValidationError(f"{directory} has no receipt for the {split} split{there}: no {file}.", remedy=remedy) from None
    compared: Sequence[tuple[str, object, object]] = (
        ("for other lengths", receipt.lengths, Lengths.of(info)),
        ("of another split", receipt.split, split),
        ("of another text (sha256)", receipt.corpus_sha256, corpus_sha256),
        ("of another text (data set, tokens)", (receipt.dataset, receipt.n_tokens_in_text), (dataset, n_tokens)),
        ("of another vocabulary (sha256)", receipt.vocabulary_sha256, vocabulary_sha256),
        ("of another checkpoint (sha256)", receipt.checkpoint_sha256, info.checkpoint_sha256),
        ("of another artifact: it is stale (sha256 of the manifest)", receipt.manifest_sha256, info.manifest_sha256),
        ("of another runtime", receipt.runtime, info.name),
        ("of another precision", (receipt.dtype, receipt.memory_dtype, receipt.memory), (info.dtype, info.memory_dtype, info.memory)),
        ("of another provider", (receipt.provider, receipt.compute), (info.provider, info.compute)),
        ("of another device", receipt.device, info.device.partition(":")[0]),
        ("of other versions", _versions_that_compute(receipt.versions), _versions_that_compute(versions())),
    )
    for what, recorded, actual in compared:
        if recorded != actual:
            raise ValidationError(f"The receipt {file} is {what}: {_told(recorded)} there, {_told(actual)} here.", remedy=remedy)
    verdict = receipt.verdict()
    if not verdict.passed:
        raise ValidationError(f"The receipt {file} proves nothing: {verdict.reason}.", remedy=remedy)
    return receipt, file


def versions() -> dict[str, str]:
    """Return the version of each package that may take part in computing, by name, of those that are installed."""
    found = {}
    for package in ("txl", *COMPUTING, "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _versions_that_compute(found: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{package} {found[package]}" for package in COMPUTING if package in found)


def _told(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(_told(item) for item in value)
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
