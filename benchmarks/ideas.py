"""Ideas that were not built, each measured on the part of the base model's step that it would change, by turns with what there is.

    python benchmarks/ideas.py                    # all: five minutes on two cores; writes results/ideas_<device>_<yyyymm>.{json,md}
    python benchmarks/ideas.py tails attention    # some
    python benchmarks/ideas.py --quick --out /tmp/x

* tails: the tail clusters of several segments at once, rather than of each when it comes;
* attention: ONNX's operator Attention (opset 23) in ONNX Runtime, rather than its parts;
* int8: activations in int8 by scales that were calibrated before, rather than found in each step;
* states: keys and values in half precision, or PyTorch's fused attention, for one token a step;
* fbgemm: the other int8 there is in PyTorch, for whose quantized tensors it announces an end.

A part's time is the median over samples of both by turns; its share of a whole step is in the records of `speed.py`.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import export_base
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from running import ROOT, device_slug
from speed import SHARES

from txl_deploy.bench.environment import describe_environment
from txl_train.files import write_json
from txl_train.model.adaptive import cluster_rows
from txl_train.model.int8 import in_int8, rounded_weight
from txl_train.model.packed import PackedLogSoftmax, can_pack
from txl_train.model.transformer_xl import TransformerXL

THREADS = 2
Work = Callable[[], object]


def by_turns(ways: dict[str, Work], samples: int) -> dict[str, float]:
    """Return the median time of each way, ms, each timed once in every turn; the first three turns do not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(samples + 3):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if turn >= 3:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def tails(samples: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the time of the softmax for 64 tokens at a time and for several times as many at once, by packed matrices."""
    config = export_base.QUICK if quick else export_base.BASE
    torch.manual_seed(0)
    with torch.inference_mode():
        plain = TransformerXL(config).eval().head
        head = PackedLogSoftmax(plain) if can_pack() else plain
        ends, n_token, generator = np.array(config.cluster_ends), 64, np.random.default_rng(1)
        for n_segment in (2, 4, 8):
            cluster = generator.choice(len(ends) - 1, size=n_token * n_segment, p=SHARES)
            targets_N = torch.from_numpy(generator.integers(ends[cluster], ends[cluster + 1]))
            hidden_ND = torch.randn(n_token * n_segment, config.d_model)

            def score(first: int, last: int, targets_N: torch.Tensor = targets_N, hidden_ND: torch.Tensor = hidden_ND) -> None:
                some = targets_N[first:last]
                head(hidden_ND[first:last], some, cluster_rows(some, head.cluster_ends))

            def each(n_segment: int = n_segment, score: Callable[[int, int], None] = score) -> None:
                for k in range(n_segment):
                    score(n_token * k, n_token * (k + 1))

            def together(n_segment: int = n_segment, score: Callable[[int, int], None] = score) -> None:
                score(0, n_token * n_segment)

            taken = by_turns({"each segment": each, "together": together}, samples)
            yield {"what": f"softmax of {n_segment} segments of 64 tokens, per segment", **{k: v / n_segment for k, v in taken.items()}}


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _graph(nodes: list[Any], inputs: dict[str, tuple[int, ...]], constants: dict[str, npt.NDArray[Any]], opset: int) -> onnx.ModelProto:
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    out = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "part", given, out, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def _both(first: onnx.ModelProto, second: onnx.ModelProto, names: tuple[str, str], feeds: dict[str, Any], samples: int) -> dict[str, Any]:
    """Return the times of two graphs and how far their results are from each other, relative to the first one's."""
    sessions = [_session(first), _session(second)]
    results = [session.run(None, feeds)[0] for session in sessions]
    error = float(np.linalg.norm(results[1] - results[0]) / np.linalg.norm(results[0]))
    taken = by_turns({name: lambda s=session: s.run(None, feeds) for name, session in zip(names, sessions)}, samples)  # type: ignore[misc]
    return {**taken, "difference": error}


def attention(samples: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the time of one layer's attention over given scores of positions, in ONNX Runtime, in parts and as one operator."""
    H, Q, K, E = (2, 4, 20, 8) if quick else (8, 64, 704, 64)
    for B in (1, 4, 16):
        shapes = {"q": (B, H, Q, E), "k": (B, H, K, E), "v": (B, H, K, E), "bias": (B, H, Q, K)}
        parts = [
            helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["q", "kt"], ["s"]),
            helper.make_node("Add", ["s", "bias"], ["sb"]),
            helper.make_node("Softmax", ["sb"], ["w"], axis=-1),
            helper.make_node("MatMul", ["w", "v"], ["out"]),
        ]
        whole = [helper.make_node("Attention", ["q", "k", "v", "bias"], ["out"], scale=1.0)]
        generator = np.random.default_rng(1)
        feeds = {name: (0.3 * generator.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
        graphs = _graph(parts, shapes, {}, 18), _graph(whole, shapes, {}, 23)
        found = _both(*graphs, ("in parts (opset 18)", "Attention (opset 23)"), feeds, samples)
        yield {"what": f"attention of one layer, {B} streams", **found}


def int8(samples: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the time of a linear layer in int8 in ONNX Runtime, its input rounded by a scale found in each step, and by a constant one."""
    for n_token in (64, 256, 1024):
        for n_in, n_out in ((16, 32),) if quick else ((512, 1536), (512, 2048), (2048, 512)):
            generator = np.random.default_rng(1)
            x = generator.standard_normal((n_token, n_in)).astype(np.float32)
            weight = generator.standard_normal((n_in, n_out)).astype(np.float32) / n_in**0.5
            scale_w = np.float32(np.abs(weight).max() / 127)
            quantised = np.clip(np.round(weight / scale_w), -127, 127).astype(np.int8)
            scale_x = np.float32((x.max() - min(x.min(), 0)) / 255)
            zero_x = np.uint8(np.clip(round(-x.min() / scale_x), 0, 255))
            common = {"w": quantised, "zw": np.int8(0)}
            dynamic = [
                helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
                helper.make_node("MatMulInteger", ["xq", "w", "xz", "zw"], ["i"]),
                helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["xs", "ws"], ["s"]),
                helper.make_node("Mul", ["f", "s"], ["out"]),
            ]
            static = [
                helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
                helper.make_node("MatMulInteger", ["xq", "w", "xz", "zw"], ["i"]),
                helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["f", "s"], ["out"]),
            ]
            shapes = {"x": (n_token, n_in)}
            first = _graph(dynamic, shapes, {**common, "ws": scale_w}, 18)
            second = _graph(static, shapes, {**common, "xs": scale_x, "xz": zero_x, "s": np.float32(scale_x * scale_w)}, 18)
            found = _both(first, second, ("scales of each step", "constant scales"), {"x": x}, samples)
            yield {"what": f"linear layer {n_in} to {n_out}, {n_token} tokens", **found}


def states(samples: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the time of one layer's attention of one token over a full memory: products in float32 and in half precision, and fused."""
    H, K, E = (2, 20, 8) if quick else (8, 641, 64)
    torch.manual_seed(1)
    for B in (1, 4, 16, 32):
        query, bias = torch.randn(B, H, 1, E) * E**-0.5, torch.randn(B, H, 1, K)
        layers = [(torch.randn(B, H, K, E), torch.randn(B, H, K, E)) for _ in range(1 if quick else 16)]  # which no cache holds

        def products(dtype: torch.dtype, query: torch.Tensor = query, bias: torch.Tensor = bias, layers: Any = layers) -> Work:
            kept = [(key.to(dtype), value.to(dtype)) for key, value in layers]

            def work() -> None:
                for key, value in kept:
                    scores = torch.matmul(query.to(dtype), key.transpose(2, 3)).float().add_(bias)
                    torch.matmul(torch.softmax(scores, dim=-1).to(dtype), value)

            return work

        def fused(query: torch.Tensor = query, bias: torch.Tensor = bias, layers: Any = layers) -> None:
            for key, value in layers:
                torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)

        with torch.inference_mode():
            ways: dict[str, Work] = {"bfloat16": products(torch.bfloat16), "float16": products(torch.float16), "fused": fused}
            for name, way in ways.items():
                taken = by_turns({"products in float32": products(torch.float32), name: way}, samples)
                parts = {key: ms / len(layers) for key, ms in taken.items()}
                yield {"what": f"attention of one token in one layer, {B} streams, {name}", **parts}


def fbgemm(samples: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the time of a layer's four linear layers in int8 by oneDNN, as they are built, and by FBGEMM."""
    sizes = ((16, 32),) if quick else ((512, 1536), (512, 512), (512, 2048), (2048, 512))
    torch.manual_seed(1)
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
    try:
        plain = [[torch.nn.Linear(n_in, n_out) for n_in, n_out in sizes] for _ in range(1 if quick else 16)]
        own = [[in_int8(linear) for linear in layer] for layer in plain]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that quantized tensors will be removed
            theirs = [[_by_fbgemm(linear) for linear in layer] for layer in plain]
        with torch.inference_mode():
            for n_token in (1, 4, 16, 64, 256):
                inputs = {n_in: torch.randn(n_token, n_in) for n_in, _ in sizes}

                def run(layers: Any, inputs: dict[int, torch.Tensor] = inputs) -> None:
                    for layer in layers:
                        for linear, (n_in, _) in zip(layer, sizes):
                            linear(inputs[n_in])

                taken = by_turns({"oneDNN": lambda run=run: run(own), "FBGEMM": lambda run=run: run(theirs)}, samples)  # type: ignore[misc]
                yield {"what": f"linear layers of one layer in int8, {n_token} tokens", **{k: v / len(plain) for k, v in taken.items()}}
    finally:
        torch.backends.quantized.engine = before


def _by_fbgemm(linear: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    _, scale_O = rounded_weight(linear.weight)
    zero_O = torch.zeros(len(scale_O), dtype=torch.int64)
    quantised = torch.quantize_per_channel(linear.weight.detach(), scale_O.double(), zero_O, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantised, linear.bias.detach())
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)  # type: ignore[no-any-return]


IDEAS: dict[str, Callable[[int, bool], Iterator[dict[str, Any]]]] = {
    "tails": tails,
    "attention": attention,
    "int8": int8,
    "states": states,
    "fbgemm": fbgemm,
}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield Markdown: of each part both times, and the first over the second."""
    yield "| part | as it is, ms | the idea, ms | times as fast |"
    yield "|---|---:|---:|---:|"
    for row in rows:
        (_, before), (_, after) = [(name, value) for name, value in row.items() if name not in ("what", "difference")]
        yield f"| {row['what']} | {before:.3f} | {after:.3f} | {before / after:.2f} |"


def main() -> int:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ideas", nargs="*", metavar="IDEA", help=f"of {', '.join(IDEAS)}  [all]")
    parser.add_argument("--quick", action="store_true", help="small sizes: does the script itself work?")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the record")
    arguments = parser.parse_args()
    if unknown := set(arguments.ideas) - set(IDEAS):
        parser.error(f"{sorted(unknown)[0]!r} is none of {', '.join(IDEAS)}")
    torch.set_num_threads(THREADS)
    environment = describe_environment(threads=THREADS, device="cpu")
    rows: list[dict[str, Any]] = []
    for name in arguments.ideas or IDEAS:
        for row in IDEAS[name](5 if arguments.quick else 60, arguments.quick):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    today = datetime.date.today()
    device = device_slug(None, environment.get("cores_usable"), environment.get("cpu_extensions", ()))
    stem = arguments.out / f"ideas_{device}_{today:%Y%m}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(stem.with_suffix(".json"), {"date": today.isoformat(), "environment": environment, "rows": rows})
    head = f"# Ideas that were not built\n\nMade by `python benchmarks/ideas.py`, {today}, with {THREADS} threads.\n\n"
    stem.with_suffix(".md").write_text(head + "\n".join(table(rows)) + "\n", encoding="utf-8")
    print(stem.with_suffix(".md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
