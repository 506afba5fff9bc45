"""Where the time of a step goes, by kind of operator: from ONNX Runtime's own profile or from torch.profiler.

    python benchmarks/speed_profile.py --artifact DIR --data TEXT --batch-size 4 --out profile.json
    python benchmarks/speed_profile.py --checkpoint C.pt --data TEXT --batch-size 4 --out profile.json         # eager PyTorch

Called by `speed.py --profile`. The memory is filled first; what lies between operators, and the host's own work, is `between operators`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import running  # noqa: F401  makes this checkout's packages importable
from torch.profiler import ProfilerActivity, profile

from txl_deploy.bench.workload import Workload
from txl_deploy.corpora import open_corpus
from txl_deploy.manifest import artifact_file
from txl_deploy.opening import Lengths, open_checkpoint, open_exported
from txl_deploy.runtimes.base import Runtime, RuntimeInfo
from txl_deploy.runtimes.onnxrt import OnnxRuntime
from txl_train.errors import TxlError, UsageError
from txl_train.files import write_json
from txl_train.model.memory import Memory

STEPS = 4
"""Steps that are looked at."""

KINDS = {
    "rounding to int8": ("quantizelinear", "aminmax"),
    "products": ("matmul", "gemm", "mm", "linear", "einsum"),
    "moving and shaping": (
        *(
            "transpose",
            "concat",
            "slice",
            "gather",
            "copy",
            "cat",
            "pad",
            "reshape",
            "split",
            "expand",
            "index",
            "scatter",
            "clone",
            "cast",
        ),
        *("embedding", "contiguous", "view", "where", "fill", "empty", "zero", "select", "squeeze", "as_strided", "narrow"),
    ),
    "normalisation": ("layernorm", "layer_norm", "normalization"),
    "softmax and log-sum-exp": ("softmax", "logsumexp", "exp", "log", "max"),
    "element by element": ("add", "mul", "sub", "div", "relu", "sum", "neg", "sqrt", "pow", "less", "greater", "equal"),
}
"""Kinds of operators by parts of their names; the first kind that has one of an operator's counts."""


def kind_of(operator: str) -> str:
    """Return the kind of an operator of ONNX Runtime (`FusedMatMul`) or PyTorch (`aten::addmm`)."""
    name = operator.lower().rpartition("::")[2]
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other operators")


def by_kind(operator_ms: Mapping[str, float], step_ms: float) -> dict[str, Any]:
    """Return milliseconds per step in all and by kind, given those by operator; what no operator took is `between operators`."""
    kinds: Counter[str] = Counter()
    for operator, ms in operator_ms.items():
        kinds[kind_of(operator)] += ms  # type: ignore[assignment]  # Counter adds floats as well
    kinds["between operators"] = max(0.0, step_ms - sum(kinds.values()))  # type: ignore[assignment]
    return {"step_ms": step_ms, "steps": STEPS, "ms_by_kind": dict(kinds), "ms_by_operator": dict(operator_ms)}


def advance(runtime: Runtime, workload: Workload, memory: Memory, first: int, n_steps: int) -> Memory:
    """Run some steps of the text and return the memory after them."""
    for step in range(first, first + n_steps):
        if workload.starts_cold(step):
            memory = runtime.initial_memory(workload.batch_size)
        _, memory = runtime.step(*workload.tensors(workload.segment(step), "cpu"), memory)
    return memory


def warmup_steps(info: RuntimeInfo, workload: Workload) -> int:
    """Return the steps until the memory is full. UsageError where the text ends before the steps that are looked at."""
    needed = -(-info.config.mem_len // info.tgt_len) + 2
    if needed + STEPS > workload.steps_per_pass:
        raise UsageError(
            f"The text has {workload.steps_per_pass} steps, but a full memory and the profile take {needed + STEPS}.",
            remedy="Give a longer text, or a smaller batch size.",
        )
    return needed


class ProfiledOnnx(OnnxRuntime):
    """ONNX Runtime whose one profile is of steps with a full memory, rather than of one of zeros."""

    def __init__(self, path: Path, info: RuntimeInfo, workload: Workload, *, threads: int | None = None) -> None:
        self.workload = workload
        self.events: list[Mapping[str, Any]] = []
        super().__init__(path, info, threads=threads)

    def _profile(self) -> list[Mapping[str, Any]]:
        n_warm = warmup_steps(self.info, self.workload)
        memory = advance(self, self.workload, self.initial_memory(self.workload.batch_size), 0, n_warm)
        advance(self, self.workload, memory, n_warm, STEPS)
        with open(self._session.end_profiling(), encoding="utf-8") as file:
            self.events = json.load(file)
        return self.events


def profile_onnx(artifact: Path, workload: Workload, info: RuntimeInfo, threads: int | None) -> dict[str, Any]:
    """Profile an exported graph."""
    runtime = ProfiledOnnx(artifact_file(artifact, "model.onnx"), info, workload, threads=threads)
    return by_kind(*last_steps(runtime.events, STEPS))


def last_steps(events: Iterable[Mapping[str, Any]], n_steps: int) -> tuple[dict[str, float], float]:
    """Return milliseconds per step by operator and in all, of the last `n_steps` runs in a profile of ONNX Runtime."""
    events = list(events)
    runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])[-n_steps:]
    found: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= runs[0]["ts"]:
            found[event["args"]["op_name"]] += event["dur"]
    return {name: us / 1e3 / n_steps for name, us in found.items()}, sum(run["dur"] for run in runs) / 1e3 / n_steps


def profile_eager(runtime: Runtime, workload: Workload) -> dict[str, Any]:
    """Profile eager PyTorch; the step's time is that with the profiler on."""
    n_warm = warmup_steps(runtime.info, workload)
    warm = advance(runtime, workload, runtime.initial_memory(workload.batch_size), 0, n_warm)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begun = time.perf_counter()
        advance(runtime, workload, warm, n_warm, STEPS)
        step_ms = (time.perf_counter() - begun) * 1e3 / STEPS
    operators = {item.key: item.self_cpu_time_total / 1e3 / STEPS for item in profiler.key_averages()}
    return by_kind(operators, step_ms)


def main() -> int:
    """Profile one runtime and write what was found."""
    parser = argparse.ArgumentParser(description="Where the time of a step goes, by kind of operator.")
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--artifact", type=Path, help="an export for ONNX Runtime")
    one.add_argument("--checkpoint", type=Path, help="a checkpoint, in eager PyTorch")
    parser.add_argument("--dtype", choices=("fp32", "int8"), help="of the checkpoint  [fp32]")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--threads", type=int)
    for name in ("--tgt-len", "--mem-len", "--clamp-len"):
        parser.add_argument(name, type=int)
    parser.add_argument("--same-length", action=argparse.BooleanOptionalAction)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    try:
        if given.artifact is not None:
            opened = open_exported(given.artifact, threads=given.threads)
            runtime, model_data = opened.runtime, opened.model_data
        else:
            lengths = Lengths(tgt_len=given.tgt_len, mem_len=given.mem_len, clamp_len=given.clamp_len, same_length=given.same_length)
            with open_checkpoint(given.checkpoint, runtime="pytorch", lengths=lengths, dtype=given.dtype, threads=given.threads) as opened:
                runtime, model_data = opened.runtime, opened.model_data
        info = runtime.info
        ids = open_corpus(model_data, dataset=given.dataset, data=given.data).ids("test")
        workload = Workload(ids_N=ids, batch_size=given.batch_size, tgt_len=info.tgt_len, ext_len=info.config.ext_len)
        found = profile_eager(runtime, workload) if given.artifact is None else profile_onnx(given.artifact, workload, info, given.threads)
    except TxlError as error:
        print(f"Error: {error.message} {error.remedy or ''}".strip(), file=sys.stderr)
        return error.exit_code
    write_json(given.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
