"""What `gpu_suite` writes of its steps: the tables, and whether each goal is met, MISSED or not measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gpu_plan import Plan, Training


@dataclass
class Step:
    """One command of the suite and what came of it."""

    name: str
    status: str
    """done, failed or skipped."""
    reason: str = ""
    command: list[str] = field(default_factory=list)
    seconds: float = 0.0
    result: Any = None


@dataclass(frozen=True)
class Goal:
    """A goal and what came of it."""

    what: str
    goal: str
    measured: str
    """The figure, and what it is of; empty where there is none."""
    outcome: str
    """met, MISSED, or not measured with the reason."""


def against_name(plan: Plan, batch_size: int, *, exports: bool = False) -> str:
    """Return what the step is called that measures inference against the reference, that of exported models too or the checkpoint alone."""
    return f"against the reference, {plan.against.dtype}, batch {batch_size}{', exports too' if exports else ''}"


def training_name(training: Training) -> str:
    """Return what the step of a training is called."""
    name = training.name.split(", batch ")[0]
    return f"train {name}, batch {training.batch_size}"


def goals(plan: Plan, steps: list[Step], device: str) -> list[Goal]:
    """Judge every goal by the steps; say which were not run, or are not of the model and the device that the goals are set for."""
    by_name = {step.name: step for step in steps}
    unfit = "" if plan.goals_apply and plan.device == "cuda" else "the goals are set for the base model on a GPU"
    judged = [*_inference_goals(plan, by_name), *_training_goals(plan, by_name)]
    out = []
    for what, goal, measured, is_met, reason in judged:
        outcome = f"not measured: {reason}" if reason else "met" if is_met else "MISSED"
        if unfit and not reason:
            outcome = f"not measured: {unfit}, and this is {device}"
        out.append(Goal(what, goal, measured, outcome))
    return out


_Judged = tuple[str, str, str, bool, str]
"""What, goal, what was measured, whether that is enough, and why nothing was."""


def _inference_goals(plan: Plan, by_name: dict[str, Step]) -> Iterator[_Judged]:
    dtype, sizes = plan.against.dtype.upper(), plan.against.batch_sizes
    for size in sizes:
        names = against_name(plan, size, exports=True), against_name(plan, size)
        steps = [step for name in names if (step := by_name.get(name)) is not None]
        own, reference, reason = _best_and_reference(next((step for step in steps if step.result), steps[0] if steps else None))
        one = size == sizes[0]
        what, goal = (
            f"{dtype}, batch {size}, best runtime against the reference's TorchScript",
            "latency p50 at most 1/10" if one else "throughput at least 4 x",
        )
        second = "p99 at most 1.05 x p50" if one else "at least 35 % of the measured matmul peak"
        if own is None or reference is None:
            yield what, goal, "", False, reason
            yield f"{dtype}, batch {size}, best runtime", second, "", False, reason
            continue
        name = f"{own['runtime']} ({own['provider']})"
        doubt = "".join(f"; the row of {row['runtime']} is INVALID" for row in (own, reference) if not row["valid"])
        if one:
            ratio = reference["latency_ms_p50"] / own["latency_ms_p50"]
            text = f"1/{ratio:.1f}: {name} {own['latency_ms_p50']:.3f} ms, reference {reference['latency_ms_p50']:.3f} ms{doubt}"
            yield what, goal, text, ratio >= 10, ""
            tail = own["latency_ms_p99"] / own["latency_ms_p50"]
            reason = "" if own["valid"] else f"the row is INVALID: {own['invalid_reasons'][0]}"
            yield f"{dtype}, batch {size}, best runtime", second, f"{tail:.3f} x: {name}, n = {own['n']}", tail <= 1.05, reason
        else:
            ratio = own["tokens_per_s"] / reference["tokens_per_s"]
            text = f"{ratio:.2f} x: {name} {own['tokens_per_s']:,.0f} tokens/s, reference {reference['tokens_per_s']:,.0f} tokens/s{doubt}"
            yield what, goal, text, ratio >= 4, ""
            share = matmul_share(own)
            yield f"{dtype}, batch {size}, best runtime", second, f"{share:.1%}: {name}{doubt}", share >= 0.35, ""


def matmul_share(row: dict[str, Any]) -> float:
    """Return the share of the measured peak of matrix products that a row's median step reaches."""
    roofline = row["roofline"]
    return float(roofline["flops_per_step"] / (row["latency_ms_p50"] / 1000) / roofline["peak_flops"])


def _best_and_reference(step: Step | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str]:
    """Return the row of the fastest of our runtimes in the reference's type that yields the right perplexity, and the reference's."""
    if step is None:
        return None, None, "its step was not asked for"
    if not step.result:
        return None, None, step.reason or "its step has no result"
    rows = step.result["rows"]
    reference = next((row for row in rows if row["runtime"] == "reference"), None)
    if reference is None:
        return None, None, "the reference was not measured"
    own = [
        row
        for row in rows
        if row["runtime"] != "reference" and row["dtype"] == reference["dtype"] and (row["verified"] or row["is_reference"])
    ]
    if not own:
        return None, reference, "no runtime of ours has the right perplexity"
    return min(own, key=lambda row: float(row["latency_ms_p50"])), reference, ""


def _training_goals(plan: Plan, by_name: dict[str, Step]) -> Iterator[_Judged]:
    trainings = {training.name: training for training in plan.trainings}
    for training in plan.trainings:
        if training.opponent is None:
            continue
        own, other = by_name.get(training_name(trainings[training.opponent])), by_name.get(training_name(training))
        what = f"training in {training.options[1]}, batch {training.batch_size}, against the reference's step"
        goal = "tokens/s at least 2 x" + (" at equal loss" if training.follows else "")
        missing = next(
            (step for step in (own, other) if step is None or step.status != "done" or "measured" not in (step.result or {})), own
        )
        if own is None or other is None or missing is not own or own.status != "done":
            yield (
                what,
                goal,
                "",
                False,
                "its step was not asked for" if missing is None else missing.reason or f"{missing.name} was not trained",
            )
            continue
        ours, theirs = own.result["measured"], other.result["measured"]
        ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
        share = ours["model_flops_utilisation"]
        mfu = "–" if share is None else f"{share:.1%}"
        text = f"{ratio:.2f} x: {ours['tokens_per_s']:,.0f} against {theirs['tokens_per_s']:,.0f} tokens/s, MFU {mfu}"
        alike = True
        if training.follows:
            compared = by_name.get(f"{training.name} follows {training.follows}")
            alike = compared is not None and compared.status == "done"
            text += ", losses alike" if alike else f", losses not alike: {compared.reason if compared else 'not compared'}"
        yield what, goal, text, ratio >= 2 and alike, ""


def goal_lines(judged: list[Goal]) -> Iterator[str]:
    """Yield the goals as a Markdown table."""
    yield "| what | goal | measured | outcome |"
    yield "|---|---|---|---|"
    for goal in judged:
        yield f"| {goal.what} | {goal.goal} | {goal.measured or '–'} | {goal.outcome} |"


def summary_lines(steps: list[Step]) -> Iterator[str]:
    """Yield the record as Markdown: every step, training, what follows what, the latency table."""
    yield "| step | status | seconds | reason |"
    yield "|---|---|---:|---|"
    for step in steps:
        yield f"| {step.name} | {step.status} | {step.seconds:.1f} | {step.reason} |"
    trained = [step for step in steps if step.name.startswith("train ") and step.status == "done"]
    if trained:
        yield ""
        yield "Training: tokens/s without the first fifth of the steps; MFU is the share of the peak that was measured on matrix products."
        yield ""
        yield "| training | steps | tokens/s | MFU | peak memory GiB | loss, last fifth (nats) | loss scale | valid nll (nats) |"
        yield "|---|---:|---:|---:|---:|---:|---:|---:|"
        for step in trained:
            figures, valid = step.result["measured"], (step.result["valid"] or {}).get("nll_nats_per_token", float("nan"))
            share, scale, held = figures["model_flops_utilisation"], figures["loss_scale"], figures["peak_memory_bytes"]
            cells = [
                step.name[6:],
                f"{step.result['steps']}",
                f"{figures['tokens_per_s']:,.0f}",
                "–" if share is None else f"{share:.1%}",
                "–" if held is None else f"{held / 2**30:.2f}",
                f"{figures['loss_last_fifth']:.4f}",
                "–" if scale is None else f"{scale:g}",
                f"{valid:.3f}",
            ]
            yield f"| {' | '.join(cells)} |"
    compared = [step for step in steps if " follows " in step.name and step.result]
    if compared:
        yield ""
        yield "| mean loss of the last fifth | difference (nats) | allowed | the loss fell by (nats) |"
        yield "|---|---:|---:|---:|"
        for step in compared:
            yield f"| {step.name} | {step.result['difference']:+.4f} | {step.result['tolerance']} | {step.result['learned']:.3f} |"
    rows: list[dict[str, Any]] = [
        row for step in steps if step.name.startswith("latency table") and step.result for row in step.result["rows"]
    ]
    if rows:
        yield ""
        yield "| runtime | dtype | memory | batch size | n | p50 ms | p99 ms | tokens/s | of the roofline | perplexity | verified | valid |"
        yield "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|---|"
        for row in rows:
            name = f"{row['runtime']} ({row['provider']}) | {row['dtype']} | {row['memory']}"
            latency = f"{row['n']} | {row['latency_ms_p50']:.3f} | {row['latency_ms_p99']:.3f}"
            roofline = row["roofline"]
            share = "–" if roofline is None else f"{roofline['share_of_peak']:.1%} ({roofline['bound']})"
            proved = f"{row['perplexity']:.3f} | {row['verified']} | {row['valid']}"
            yield f"| {name} | {row['batch_size']} | {latency} | {row['tokens_per_s']:,.0f} | {share} | {proved} |"
