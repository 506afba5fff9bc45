"""Makes each mistake of `mutations` and looks whether the checks that users run find it, by how much, and nothing without it.

A check is of use only if it fails when something is wrong, and found by luck is not found: what a check measures must exceed its bound
at least twice, in every text. Each mistake is made once more with its switch off, and then no check may find anything.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from txl_deploy.export.precision import onnx_precisions, require
from txl_deploy.manifest import Dtype, verify
from txl_deploy.parity.distribution import Distribution
from txl_deploy.parity.mutants.examples import Example, make_example, write_built_in
from txl_deploy.parity.mutations import CHECKS, MUTATIONS, Check, Mutant, Mutation
from txl_deploy.parity.rollout import BATCH_SIZE, ParityResult, compare
from txl_deploy.parity.tolerances import Bounds
from txl_deploy.receipt import Lengths, Receipt, SegmentSums
from txl_deploy.runtimes.base import Runtime
from txl_train.errors import TxlError, ValidationError
from txl_train.evaluate import EvalResult, evaluate
from txl_train.files import finite

MARGIN = 2.0
"""How many times its bound a check must measure for a mistake to be found by more than luck."""

_CLAIM = re.compile("to be: |manifest says: |, but ")
"""What stands between an artifact's name and what is wrong with it, in the messages of `claims`."""

ASKED_SEGMENTS = 4
"""Segments whose whole distribution is compared: `txl parity` takes more, so what is found here it finds too, and it takes longer."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check said of one export."""

    check: Check
    failed: bool
    quantity: str
    """What was measured, with its unit; what is claimed, of a check without tolerance."""
    measured: float | None
    """None of a check without tolerance."""
    bound: float | None
    reason: str
    """What the check itself told."""

    @property
    def ratio(self) -> float | None:
        """The measured value over its bound; None of a check without tolerance."""
        return None if self.measured is None or self.bound is None else self.measured / self.bound

    @property
    def beyond_luck(self) -> bool:
        """True if the check failed, by twice its bound at least."""
        return self.failed and (self.ratio is None or not self.ratio < MARGIN)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one mutation."""

    mutation: Mutation
    skipped: str | None = None
    """Why the model cannot have it."""
    example: str = ""
    """What it was made of."""
    found: dict[Check, list[Finding]] = field(default_factory=dict)
    """By each check that was run, in each text."""
    control: dict[Check, list[Finding]] = field(default_factory=dict)
    """The same with the switch off."""

    @property
    def caught(self) -> bool:
        """True if the check that has to find it does so in every text, beyond luck."""
        findings = self.found.get(self.mutation.expected, [])
        return bool(findings) and all(finding.beyond_luck for finding in findings)

    @property
    def control_passed(self) -> bool:
        """True if no check finds anything with the switch off."""
        return bool(self.control) and not any(finding.failed for findings in self.control.values() for finding in findings)

    @property
    def passed(self) -> bool:
        """True if it was found, and nothing without it, or if the model cannot have it."""
        return self.skipped is not None or (self.caught and self.control_passed)

    @property
    def caught_by(self) -> list[Check]:
        """All checks that found it in every text, the one that has to first. Not `verify`, which finds whatever is changed by hand."""
        checks = [check for check, findings in self.found.items() if check != "verify" and all(finding.beyond_luck for finding in findings)]
        return sorted(checks, key=lambda check: (check != self.mutation.expected, list(CHECKS).index(check)))

    def weakest(self, check: Check) -> Finding:
        """Return the finding of that check that is nearest to its bound."""
        return min(self.found[check], key=size)

    def strongest_control(self) -> Finding:
        """Return the finding of the expected check that comes nearest to failing with the switch off."""
        return max(self.control[self.mutation.expected], key=size)


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """The outcome of all mutations."""

    rows: tuple[Row, ...]
    examples: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True if every mutation was found, and none where it was switched off."""
        return all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON; a figure that is not finite becomes None."""
        document: dict[str, Any] = finite(
            {"passed": self.passed, "margin": MARGIN, "examples": list(self.examples), "mutations": [_plain(row) for row in self.rows]}
        )
        return document


def run(
    checkpoint: Path | None = None,
    *,
    mutations: Sequence[Mutation] = MUTATIONS,
    seed: int = 1,
    on_step: Callable[[int], None] = lambda done: None,
) -> SelfTest:
    """Make every mutation and run the checks on it.

    Args:
        checkpoint: made an export of, one of each type that is needed; None takes the built-in models.
        mutations: those to make.
        seed: of the built-in models' weights, and of random texts.
        on_step: called with the number of mutations done, for progress.

    Raises:
        UsageError, CheckpointError: the checkpoint cannot be read.
        ValidationError: it cannot be exported faithfully, so nothing can be told from what is made of it.
        EnvironmentUnfitError: onnx or onnxruntime is not installed.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="txl-") as name:
        folder = Path(name)
        examples: dict[Dtype, Example | str] = {}
        for number, mutation in enumerate(mutations):
            if mutation.dtype not in examples:
                examples[mutation.dtype] = _example(checkpoint, folder, mutation.dtype, seed)
            example = examples[mutation.dtype]
            if isinstance(example, str):
                rows.append(Row(mutation=mutation, skipped=example))
            elif (reason := mutation.not_applicable(example)) is not None:
                rows.append(Row(mutation=mutation, skipped=reason, example=example.told))
            else:
                found = examine(example, mutation, folder / f"mutant-{number}", on=True)
                control = examine(example, mutation, folder / f"control-{number}", on=False)
                rows.append(Row(mutation=mutation, example=example.told, found=found, control=control))
            on_step(number + 1)
        told = tuple(example.told for example in examples.values() if isinstance(example, Example))
    return SelfTest(rows=tuple(rows), examples=told)


def _example(checkpoint: Path | None, folder: Path, dtype: Dtype, seed: int) -> Example | str:
    """Return an export of that type, or why fp16 cannot be had of a user's checkpoint."""
    if checkpoint is None:
        return make_example(write_built_in(folder, dtype, seed=seed), folder, dtype, built_in=True, seed=seed)
    try:
        return make_example(checkpoint, folder, dtype, built_in=False, seed=seed)
    except ValidationError as error:
        if dtype == "fp32":
            raise
        return error.message


# The checks


def examine(example: Example, mutation: Mutation, folder: Path, *, on: bool) -> dict[Check, list[Finding]]:
    """Make one mutation, in a folder that does not exist yet, and run on it every check that can be."""
    mutant = mutation.make(example, folder, on)
    found: dict[Check, list[Finding]] = {}
    if mutant.unsealed is not None:
        found["verify"] = [_verified(mutant.unsealed)]
    if mutant.directory is not None and mutation.where == "graph":
        found["export"] = [_types(mutant.directory, example)]
    claimed, runtime = _opened(mutant)
    found["claims"] = [claimed]
    if runtime is None or runtime.info.device != example.reference.info.device:
        return found
    found["receipt"] = [receipt_finding(example, mutant, runtime, text) for text in range(len(example.texts))]
    if mutation.where != "evaluation":  # whose mistake is beside the runtime, which is compared as it is
        found["parity"] = [parity_finding(example, runtime, text) for text in range(len(example.texts))]
    return found


def _verified(directory: Path) -> Finding:
    try:
        findings = [f"{finding.file} {finding.message}" for finding in verify(directory)]
    except TxlError as error:
        findings = [error.message]
    told = "; ".join(findings) or "every checksum is right"
    return _exact("verify", bool(findings), "checksums", told)


def _types(directory: Path, example: Example) -> Finding:
    path = directory / "model.onnx"
    settings = example.manifest.settings
    try:
        require(onnx_precisions(path), dtype=settings.dtype, memory_dtype=settings.memory_dtype, path=path)
    except ValidationError as error:
        return _exact("export", True, "types", error.message)
    return _exact("export", False, "types", "every type is as asked for")


def _opened(mutant: Mutant) -> tuple[Finding, Runtime | None]:
    try:
        runtime = mutant.open()
    except TxlError as error:
        return _exact("claims", True, _CLAIM.split(error.message)[-1].rstrip("."), error.message), None
    return _exact("claims", False, "", "it is what it claims to be"), runtime


def _exact(check: Check, failed: bool, quantity: str, reason: str) -> Finding:
    return Finding(check=check, failed=failed, quantity=quantity, measured=None, bound=None, reason=reason)


def parity_finding(example: Example, runtime: Runtime, text: int) -> Finding:
    """Compare a runtime with the reference as `txl parity` does; the figure is the one nearest to its bound, or farthest beyond."""
    result = compare(example.reference, runtime, list(example.segments(text)), distribution_segments=ASKED_SEGMENTS)
    figures = sorted(_figures(result), key=lambda figure: _share(figure[1], figure[2]))
    quantity, measured, bound = figures[-1]
    if result.distribution is not None and not _share(measured, bound) > 1:
        of_words = _figures_of_words(result.distribution, result.tolerance)
        quantity, measured, bound = max(figures[-1], *of_words, key=lambda figure: _share(figure[1], figure[2]))
    return Finding(check="parity", failed=not result.passed, quantity=quantity, measured=measured, bound=bound, reason=result.reason)


def _figures(result: ParityResult) -> Iterator[tuple[str, float, float]]:
    """Yield name, value and bound of what parity judges of the words that come, and of the memory."""
    bounds = result.tolerance
    yield f"a {result.unit}'s nll, nats", result.max_abs_delta_nll, bounds.token_nll
    yield "nll, root mean square, nats", result.rms_delta_nll, bounds.rms_nll
    yield "mean nll at most, nats", result.upper_bound_mean_nll, bounds.mean_nll
    yield "memory, of its magnitude", result.max_memory_error, bounds.memory


def _figures_of_words(found: Distribution, bounds: Bounds) -> Iterator[tuple[str, float, float]]:
    """Yield the same of all words. They are told only where no other figure is beyond its bound: a divergence grows with the square of
    the differences, and would look the largest every time."""
    yield "KL of the predictions, nats", found.kl_nats, bounds.kl
    yield "likeliest word, nats", found.largest_swap_nats, bounds.swap


def _share(measured: float, bound: float) -> float:
    share = measured / bound
    return math.inf if math.isnan(share) else share


def receipt_finding(example: Example, mutant: Mutant, runtime: Runtime, text: int) -> Finding:
    """Score a whole text with a runtime and with the reference, and judge it as a receipt does."""
    try:
        ours = evaluate(runtime, mutant.choose(example.segments(text)), batch_size=BATCH_SIZE)
        theirs = example.expected(text, mutant.choose)
    except ValidationError as error:
        return Finding(check="receipt", failed=True, quantity="mean nll, nats", measured=math.inf, bound=1.0, reason=error.message)
    receipt = _receipt(example, runtime, ours, theirs, text)
    verdict = receipt.verdict()
    missing = receipt.n_tokens_in_text - 1 - receipt.n_tokens
    if missing:
        return _exact("receipt", not verdict.passed, f"{missing} tokens not scored", verdict.reason)
    return Finding(
        check="receipt",
        failed=not verdict.passed,
        quantity="mean nll at most, nats",
        measured=verdict.upper_bound,
        bound=verdict.bound,
        reason=verdict.reason,
    )


def _receipt(example: Example, runtime: Runtime, ours: EvalResult, theirs: EvalResult, text: int) -> Receipt:
    info, manifest = runtime.info, example.manifest
    return Receipt(
        manifest_sha256=info.manifest_sha256 or "",
        parent_manifest_sha256=None,
        checkpoint_sha256=manifest.source.checkpoint_sha256,
        corpus_sha256=example.text_sha256(text),
        vocabulary_sha256=manifest.vocabulary_sha256,
        dataset=manifest.dataset,
        split="self-test",
        lengths=Lengths.of(info),
        batch_size=BATCH_SIZE,
        processes=1,
        runtime=info.name,
        provider=info.provider,
        device=info.device,
        dtype=info.dtype,
        compute=info.compute,
        memory=info.memory,
        memory_dtype=info.memory_dtype,
        n_tokens_in_text=len(example.texts[text]),
        segments=SegmentSums(
            n_tokens=list(ours.segment_tokens),
            nll_nats=list(ours.segment_nll_nats),
            reference_nll_nats=list(theirs.segment_nll_nats),
        ),
        reference_device=example.reference.info.device,
        command="txl parity --self-test",
        versions=dict(manifest.versions),
        git_commit=None,
        time_utc="",
    )


def size(finding: Finding) -> float:
    """Order findings by how far beyond their bound they are; without a bound, a failure is infinitely far."""
    if finding.ratio is None:
        return math.inf if finding.failed else 0.0
    return math.inf if math.isnan(finding.ratio) else finding.ratio


def _plain(row: Row) -> dict[str, Any]:
    mutation = row.mutation
    plain: dict[str, Any] = {
        "name": mutation.name,
        "what": mutation.what,
        "history": mutation.history,
        "where": mutation.where,
        "dtype": mutation.dtype,
        "expected": mutation.expected,
        "example": row.example or None,
        "not_applicable": row.skipped,
        "passed": row.passed,
    }
    if row.skipped is None:
        plain |= {
            "caught": row.caught,
            "caught_by": row.caught_by,
            "control_passed": row.control_passed,
            "switched_on": {check: [_plain_finding(finding) for finding in findings] for check, findings in row.found.items()},
            "switched_off": {check: [_plain_finding(finding) for finding in findings] for check, findings in row.control.items()},
        }
    return plain


def _plain_finding(finding: Finding) -> dict[str, Any]:
    return {**dataclasses.asdict(finding), "ratio": finding.ratio}
