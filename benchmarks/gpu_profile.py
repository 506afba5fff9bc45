"""Where a step's time goes on a GPU: inference and training of the base model, ours and the reference's, kernel by kernel.

    python benchmarks/gpu_profile.py                           inference, training and block sizes: some minutes
    python benchmarks/gpu_profile.py --parts inference         one of them
    python benchmarks/gpu_profile.py --quick --device cpu      a small model without a GPU: does the script itself work?

Weights are random and the text is drawn (`speed.SHARES` says how many targets lie in each tail cluster), as for `speed.py`. Latencies
are of one runtime after the other, not by turns: for comparisons that count there is `gpu_suite.py`. How far the step in kernels
(`model.fused`) is from the plain one is measured too. Block sizes are those of the three kernels that take the most, tried one by one.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import functools
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import export_base
import numpy as np
import torch
from reference_style import ReferenceModel, ReferenceRuntime
from reference_training import ReferenceLamb, TrainingModel
from running import device_slug
from speed import SHARES
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from txl_deploy.bench.environment import describe_environment
from txl_deploy.runtimes.base import TORCH_TYPES, Runtime, RuntimeInfo
from txl_deploy.runtimes.eager import EagerRuntime
from txl_train.config import ModelConfig
from txl_train.files import write_json
from txl_train.flops import measured_peak_flops
from txl_train.model.adaptive import cluster_rows
from txl_train.model.transformer_xl import TransformerXL
from txl_train.optim.lamb import Lamb
from txl_train.parallel import LossModule
from txl_train.precision import Precision

PARTS = ("inference", "training", "blocks")
N_BATCHES = 16
MOST_KERNELS = 30
"""Of each step, that are written down."""
OPERATORS = ("aten::", "Optimizer", "autograd::", "Torch-Compiled", "CompiledFunction", "## Call")
"""How names begin that stand for several kernels."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured."""

    config: ModelConfig
    tgt_len: int
    batch_sizes: tuple[int, ...]
    samples: int
    train_len: int
    train_batch_sizes: tuple[int, ...]


BASE = Sizes(export_base.BASE, 64, (1, 4, 32), 100, 192, (32, 128))
QUICK = Sizes(export_base.QUICK, 4, (1, 2), 5, 8, (2,))


def draw(config: ModelConfig, batch_size: int, length: int, seed: int) -> Tensor:
    """Return words [B, length]: of the shortlist and of each tail cluster, as many as `SHARES` says."""
    generator, ends = np.random.default_rng(seed), np.array(config.cluster_ends)
    cluster = generator.choice(len(ends) - 1, size=(batch_size, length), p=SHARES)
    return torch.from_numpy(generator.integers(ends[cluster], ends[cluster + 1]))


class Gpu:
    """The device, and what is measured on it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_gpu = self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until all work is done."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def latencies(self, step: Callable[[], object], samples: int) -> dict[str, float]:
        """Return percentiles of single steps, ms."""
        times = []
        for _ in range(samples):
            self.wait()
            start = time.perf_counter_ns()
            step()
            self.wait()
            times.append((time.perf_counter_ns() - start) / 1e6)
        p50, p99 = (float(np.percentile(times, q)) for q in (50, 99))
        return {"p50_ms": p50, "p99_ms": p99, "mean_ms": statistics.mean(times), "n": samples}

    def kernels(self, step: Callable[[], object], steps: int) -> dict[str, Any]:
        """Return the kernels of a step (on a CPU, the operators) with microseconds and launches per step, the longest first."""
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_gpu else [])]) as recorded:
            for _ in range(steps):
                step()
            self.wait()
        rows = []
        for event in recorded.key_averages():
            taken = event.self_device_time_total if self.is_gpu else event.self_cpu_time_total
            if taken > 0 and not (self.is_gpu and event.key.startswith(OPERATORS)):
                rows.append({"kernel": event.key[:120], "us": taken / steps, "launches": event.count / steps})
        rows.sort(key=lambda row: -row["us"])
        total = sum(row["us"] for row in rows)
        return {"us": total, "launches": sum(row["launches"] for row in rows), "longest": rows[:MOST_KERNELS]}


def stepper(runtime: Runtime, sizes: Sizes, batch_size: int) -> Callable[[], Tensor]:
    """Return a function that runs the next segment of a text on a runtime, and returns its nll."""
    device = runtime.info.device
    batches = [tuple(draw(sizes.config, batch_size, sizes.tgt_len, 2 * k + i).to(device) for i in range(2)) for k in range(N_BATCHES)]
    state: dict[str, Any] = {"memory": runtime.initial_memory(batch_size), "next": itertools.cycle(batches)}

    def step() -> Tensor:
        output = runtime.step(*next(state["next"]), state["memory"])
        state["memory"] = output.memory
        return output.nll_BT

    return step


def reference(model: TransformerXL, sizes: Sizes, dtype: str) -> ReferenceRuntime:
    """Return the reference's way of computing in TorchScript, over a copy of the weights."""
    own = copy.deepcopy(model)
    device = own.embedding.weights[0].device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated since 2.13, and what the original runs in
        module = torch.jit.script(ReferenceModel(own, own.config).eval().requires_grad_(False).to(device, TORCH_TYPES[dtype]))
    info = RuntimeInfo(
        name="reference",
        provider="torchscript",
        device=str(device),
        dtype=dtype,
        memory="hidden",
        memory_dtype=dtype,
        tgt_len=sizes.tgt_len,
        config=own.config,
    )
    return ReferenceRuntime(info, module)


def inference(gpu: Gpu, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield the figures of one runtime and batch size after the other."""
    torch.manual_seed(0)
    with gpu.device:
        model = TransformerXL(sizes.config)
    model = model.to(gpu.device).eval().requires_grad_(False)
    dtypes = ("fp16", "fp32") if gpu.is_gpu else ("fp32",)
    fill = 2 + -(-sizes.config.mem_len // sizes.tgt_len)
    for batch_size, dtype in itertools.product(sizes.batch_sizes, dtypes):
        opened: dict[str, Runtime] = {
            "ours": EagerRuntime(model, tgt_len=sizes.tgt_len, dtype=dtype),
            "ours, plain": EagerRuntime(model, tgt_len=sizes.tgt_len, dtype=dtype, packed=False),
            "reference": reference(model, sizes, dtype),
        }
        steps = {name: stepper(runtime, sizes, batch_size) for name, runtime in opened.items()}
        differences = []
        for _ in range(2 * fill):
            nll = {name: step() for name, step in steps.items()}
            differences.append(float((nll["ours"] - nll["ours, plain"]).abs().max()))
        for name, step in steps.items():
            provider = opened[name].info.provider
            yield {
                "what": "inference",
                "name": name,
                "provider": provider,
                "dtype": dtype,
                "batch_size": batch_size,
                **gpu.latencies(step, sizes.samples),
                "largest_difference_to_plain_nats": max(differences) if name == "ours" else None,
                "kernels": gpu.kernels(step, 5),
            }


def training_steps(gpu: Gpu, sizes: Sizes, batch_size: int, dtype: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield training steps: ours, ours compiled, and the reference's."""
    config = dataclasses.replace(sizes.config, mem_len=sizes.train_len, clamp_len=None, same_length=False, dropout=0.1)
    batches = [tuple(draw(config, batch_size, sizes.train_len, 2 * k + i) for i in range(2)) for k in range(4)]
    n_tokens = batch_size * sizes.train_len

    def fresh() -> TransformerXL:
        torch.manual_seed(0)
        with gpu.device:
            return TransformerXL(config).to(gpu.device).train()

    def update(precision: Precision, optimizer: torch.optim.Optimizer, weights: list[Tensor], loss: Tensor) -> None:
        precision.backward(loss)
        norm = precision.norm(optimizer, weights)
        precision.clip(weights, 0.25, norm)
        precision.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    def own(*, compiled: bool) -> Callable[[], object]:
        model = fresh()
        weights, precision = [weight for weight in model.parameters() if weight.numel()], Precision(dtype, gpu.device)
        module, optimizer = LossModule(model, compiled=compiled, graphed=compiled), Lamb(weights, lr=1e-3)
        rows = [[row.to(gpu.device) for row in cluster_rows(targets.reshape(-1), model.head.cluster_ends)] for _, targets in batches]
        given = [(inputs.to(gpu.device), targets.to(gpu.device)) for inputs, targets in batches]
        counted = torch.ones(batch_size, sizes.train_len, dtype=torch.bool, device=gpu.device)
        state: dict[str, Any] = {"memory": model.initial_memory(batch_size), "next": itertools.cycle(range(4))}

        def step() -> None:
            k = next(state["next"])
            with precision.autocast():
                total, state["memory"] = module(*given[k], counted, rows[k], state["memory"])
            update(precision, optimizer, weights, total / n_tokens)

        return step

    yield "ours", own(compiled=False)
    if gpu.is_gpu:
        yield "ours, compiled", own(compiled=True)
    model = fresh()
    weights, precision = [weight for weight in model.parameters() if weight.numel()], Precision(dtype, gpu.device)
    trained, optimizer = TrainingModel(model).to(gpu.device).train(), ReferenceLamb(weights, lr=1e-3)
    given = [(inputs.t().contiguous().to(gpu.device), targets.t().contiguous().to(gpu.device)) for inputs, targets in batches]
    empty = torch.zeros(config.n_layer, 0, batch_size, config.d_model, device=gpu.device)
    state = {"memory": empty, "next": itertools.cycle(given)}

    def reference_step() -> float:
        with precision.autocast():
            nll, state["memory"] = trained(*next(state["next"]), state["memory"])
        loss = nll.float().sum() / n_tokens
        update(precision, optimizer, weights, loss)
        return float(loss.detach())

    yield "reference", reference_step


def training(gpu: Gpu, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield the figures of one way of training and batch size after the other."""
    dtype = "bf16" if gpu.is_gpu else "fp32"
    for batch_size in sizes.train_batch_sizes:
        for name, step in training_steps(gpu, sizes, batch_size, dtype):
            if gpu.is_gpu:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            for _ in range(4):
                step()
            gpu.wait()
            first_s, start, count = time.perf_counter() - start, time.perf_counter(), 10 if gpu.is_gpu else 2
            for _ in range(count):
                step()
            gpu.wait()
            seconds = (time.perf_counter() - start) / count
            yield {
                "what": "training",
                "name": name,
                "dtype": dtype,
                "batch_size": batch_size,
                "ms": 1000 * seconds,
                "tokens_per_s": batch_size * sizes.train_len / seconds,
                "first_steps_s": first_s,
                "peak_bytes": torch.cuda.max_memory_allocated() if gpu.is_gpu else None,
                "kernels": gpu.kernels(step, 2),
            }


def blocks(gpu: Gpu, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield the time of the three kernels with other block sizes, microseconds; nothing without a GPU."""
    if gpu.is_gpu:
        for batch_size in sizes.batch_sizes:
            for name, of_kernel, choices in (
                ("attend", attend_with, itertools.product((16, 32, 64), (32, 64, 128), (2, 4, 8), (2, 3, 4), (1, 2, 3, 4, 6))),
                ("score_and_keep", score_with, itertools.product((16, 32, 64, 128), (32, 64, 128))),
                ("add_tail_nll", tail_with, itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))),
            ):
                run = of_kernel(gpu, sizes, batch_size)
                for block in choices:
                    yield tried(functools.partial(run, blocks=block), name, batch_size, block)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Operands of the attention of one layer, of random numbers."""

    qkv_NW: Tensor
    bias_HE: Tensor
    term_HCE: Tensor
    ring_2BHSE: Tensor
    start: Tensor
    lengths: dict[str, Any]

    @classmethod
    def random(cls, gpu: Gpu, sizes: Sizes, batch_size: int) -> Attention:
        """Return those of the base model's layers, with a full memory."""
        config, half = sizes.config, {"dtype": torch.float16, "device": gpu.device}
        H, E, Q, M = config.n_head, config.d_head, sizes.tgt_len, config.mem_len
        n_distance = 1 + Q + (M if config.clamp_len is None else config.clamp_len - 1)
        return cls(
            torch.randn(batch_size * Q, 3 * H * E, **half),
            torch.randn(H, E, **half),
            torch.randn(H, n_distance, E, **half),
            torch.randn(2, batch_size, H, 2 * (M + Q), E, **half),
            torch.full((1,), Q, device=gpu.device),
            {"n_query": Q, "mem_len": M, "scale": E**-0.5},
        )


def score_with(gpu: Gpu, sizes: Sizes, batch_size: int) -> Callable[..., Tensor]:
    """Return `score_and_keep` with random operands, a function of block sizes."""
    from txl_train.model import layer_kernels

    own = Attention.random(gpu, sizes, batch_size)
    return functools.partial(layer_kernels.score_and_keep, own.qkv_NW, own.bias_HE, own.term_HCE, own.ring_2BHSE, own.start, **own.lengths)


def attend_with(gpu: Gpu, sizes: Sizes, batch_size: int) -> Callable[..., Tensor]:
    """Return `attend` with random operands, a function of block sizes."""
    from txl_train.model import layer_kernels

    own, M = Attention.random(gpu, sizes, batch_size), sizes.config.mem_len
    scored = layer_kernels.score_and_keep(own.qkv_NW, own.bias_HE, own.term_HCE, own.ring_2BHSE, own.start, **own.lengths)
    lengths = own.lengths | {"ext_len": 0, "n_distance": own.term_HCE.shape[1], "max_distance": M}
    full = torch.full((batch_size,), M, device=gpu.device)
    return functools.partial(layer_kernels.attend, own.qkv_NW, own.bias_HE, own.ring_2BHSE, scored, full, own.start, **lengths)


def tail_with(gpu: Gpu, sizes: Sizes, batch_size: int) -> Callable[..., None]:
    """Return `add_tail_nll` for all tail clusters with random weights, a function of block sizes."""
    from txl_train.model import softmax_kernels

    config, half = sizes.config, {"dtype": torch.float16, "device": gpu.device}
    N, D, ends = batch_size * sizes.tgt_len, config.d_model, config.cluster_ends
    lows, words = torch.tensor(ends[1:], device=gpu.device), [high - low for low, high in zip(ends[1:-1], ends[2:])]
    tiles = [0, *itertools.accumulate(-(-count // softmax_kernels.TILE) for count in words)][:-1]
    targets_N = draw(config, batch_size, sizes.tgt_len, 1).reshape(-1).to(gpu.device)
    return functools.partial(
        softmax_kernels.add_tail_nll,
        torch.zeros(N, device=gpu.device),
        torch.randn(N, D, **half),
        torch.randn(sum(words), D, **half),
        torch.randn(sum(words), **half),
        targets_N,
        *softmax_kernels.find_rows(targets_N, lows),
        lows,
        torch.tensor(tiles, dtype=torch.int32, device=gpu.device),
        first_cluster=0,
        sizes=words,
    )


def tried(kernel: Callable[[], object], name: str, batch_size: int, block: tuple[int, ...]) -> dict[str, Any]:
    """Return the row of a kernel with some block sizes."""
    from triton.testing import do_bench_cudagraph

    row: dict[str, Any] = {"what": "blocks", "name": name, "batch_size": batch_size, "blocks": list(block), "us": None, "refused": None}
    try:
        kernel()
        row["us"] = 1000 * do_bench_cudagraph(kernel, rep=5)
    except Exception as error:  # of sizes that do not fit the GPU, in many ways
        row["refused"] = f"{type(error).__name__}: {error}"[:120]
    return row


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the record as Markdown."""
    for row in rows:
        if row["what"] == "blocks":
            continue
        figures = (
            f"{row['p50_ms']:.3f} ms, p99 {row['p99_ms']:.3f}"
            if "p50_ms" in row
            else f"{row['ms']:.1f} ms, {row['tokens_per_s']:,.0f} tokens/s"
        )
        taken = row["kernels"]
        yield f"\n**{row['what']}, {row['name']}, {row['dtype']}, batch {row['batch_size']}**: {figures};"
        yield f"{taken['launches']:.0f} kernels take {taken['us']:.0f} µs\n"
        yield "| kernel | launches | µs |"
        yield "|---|---:|---:|"
        for kernel in taken["longest"][:12]:
            yield f"| `{kernel['kernel'][:70]}` | {kernel['launches']:.1f} | {kernel['us']:.1f} |"
    tried = [row for row in rows if row["what"] == "blocks" and row["us"] is not None]
    for (name, size), group in itertools.groupby(tried, key=lambda row: (row["name"], row["batch_size"])):
        best = sorted(group, key=lambda row: row["us"])[:5]
        yield f"\n{name}, batch {size}: " + "; ".join(f"{row['blocks']} {row['us']:.1f} µs" for row in best)


def main() -> int:
    """Measure, and write the record; 3 if there is no such device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help=f"what to measure, of {', '.join(PARTS)}  [default: all]")
    parser.add_argument("--out", type=Path, help="<out>.json and <out>.md  [default: gpu_profile_<device> in this folder's results]")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"argument --parts: {sorted(unknown)[0]!r} is none of {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use, so nothing was measured; try `--quick --device cpu`.", file=sys.stderr)
        return 3
    gpu, sizes = Gpu(arguments.device), QUICK if arguments.quick else BASE
    out = arguments.out or Path(__file__).resolve().parent / "results" / f"gpu_profile_{device_slug(name_of(gpu), None)}"
    out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "environment": describe_environment(threads=torch.get_num_threads(), device="cuda:0" if gpu.is_gpu else "cpu"),
        "peak_flops_fp16": measured_peak_flops(gpu.device, torch.float16) if gpu.is_gpu else None,
        "rows": [],
    }
    head = f"# Where a step's time goes on {name_of(gpu)}\n\nMade by `python benchmarks/gpu_profile.py`, {datetime.date.today()}.\n"
    for part, measure in (("inference", inference), ("training", training), ("blocks", blocks)):
        for row in measure(gpu, sizes) if part in parts else ():
            record["rows"].append(row)
            print({key: value for key, value in row.items() if key != "kernels"}, file=sys.stderr, flush=True)
            write_json(out.with_suffix(".json"), record)  # each time: who measures may be stopped
            out.with_suffix(".md").write_text(head + "\n".join(lines(record["rows"])) + "\n", encoding="utf-8")
    return 0


def name_of(gpu: Gpu) -> str:
    """Return what the device is called."""
    return torch.cuda.get_device_name(gpu.device) if gpu.is_gpu else "a CPU"


if __name__ == "__main__":
    sys.exit(main())
