"""The base model of the specification through the whole export: both memories, both types, and engines of compute capability 7.5.

    python benchmarks/export_base.py                      # everything: some minutes, 6 GiB of memory, 6 GB of disk
    python benchmarks/export_base.py --quick --out /tmp/x  # a small model: does the script itself work?

Writes a checkpoint of random weights, exports it four times, compares each graph in ONNX Runtime with eager PyTorch at batch size 1, and
builds the float16 ones with TensorRT-RTX, which needs no GPU for that. Each of these is a process of its own, so that its time and its peak
memory are its own. Writes <out>.json with everything, the versions and the machine, and <out>.md with the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from running import ROOT, child_environment, device_slug, without_folders

from txl_deploy.bench.environment import describe_environment
from txl_deploy.bench.report import BUSY_SHARE
from txl_train.config import ModelConfig, to_dict
from txl_train.errors import TxlError, UsageError, ValidationError
from txl_train.files import check_replaceable, whole_or_absent, write_json

BASE = ModelConfig(
    vocab_size=267_735,
    n_layer=16,
    n_head=8,
    d_head=64,
    d_model=512,
    d_inner=2048,
    dropout=0.0,
    adaptive=True,
    cutoffs=(19_997, 39_997, 199_997),
    mem_len=640,
    clamp_len=400,
    same_length=True,
)
QUICK = ModelConfig(
    vocab_size=2000,
    n_layer=2,
    n_head=2,
    d_head=8,
    d_model=16,
    d_inner=32,
    dropout=0.0,
    adaptive=True,
    cutoffs=(200, 400, 1000),
    mem_len=16,
    clamp_len=10,
    same_length=True,
)
TGT_LEN = {"base": 64, "quick": 4}
BATCH = (1, 8, 32)
"""Streams an engine takes: at least, tuned for, at most."""
COMPUTE_CAPABILITY = "7.5"
VARIANTS = [(memory, dtype) for memory in ("kv", "hidden") for dtype in ("fp32", "fp16")]


def write_base_checkpoint(folder: Path, *, size: str) -> dict[str, Any]:
    """Write a checkpoint with random weights."""
    import torch

    from txl_train.checkpoint import Checkpoint, save_checkpoint
    from txl_train.data.vocabulary import Vocabulary
    from txl_train.model.transformer_xl import TransformerXL

    config = BASE if size == "base" else QUICK
    torch.manual_seed(0)
    model = TransformerXL(config)
    words = ["<eos>", "<unk>", *(f"word{i}" for i in range(config.vocab_size - 2))]
    checkpoint = Checkpoint(
        model_config=config,
        model=model.parameters_by_name(),
        vocabulary=Vocabulary(words, unit="word"),
        dataset="text",
        run={"settings": {"train": {"eval_tgt_len": TGT_LEN[size]}}, "data_folder": None},
        progress={"step": 0},
    )
    save_checkpoint(folder / "checkpoint.pt", checkpoint)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"config": to_dict(config), "tgt_len": TGT_LEN[size], "parameters": n_parameters, "weights": "random, seed 0"}


def export(folder: Path, *, memory: str, dtype: str) -> dict[str, Any]:
    """Export it, and say what is in the files."""
    import onnx

    from txl_deploy.export.artifact import ExportRequest, export_artifact

    out = folder / f"{memory}-{dtype}"
    begun = time.perf_counter()
    result = export_artifact(
        ExportRequest(
            checkpoint=folder / "checkpoint.pt",
            out=out,
            format="onnx",
            memory=memory,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            command="benchmarks/export_base.py",
        )
    )
    seconds = time.perf_counter() - begun
    graph = onnx.load(str(out / "model.onnx"), load_external_data=False).graph
    manifest, parity = result.manifest, result.parity
    return {
        "export_seconds": round(seconds, 1),
        "files": {name: record.bytes for name, record in manifest.files.items()},
        "nodes": len(graph.node),
        "operators": dict(sorted(Counter(node.op_type for node in graph.node).items())),
        "precisions": manifest.precisions,
        "audit": manifest.audit,
        "compared_while_exporting": None if parity is None else parity.reason,
    }


def compare(folder: Path, *, memory: str, dtype: str, segments: int) -> dict[str, Any]:
    """Run the graph in ONNX Runtime beside the checkpoint, one stream, each on its own memory."""
    from txl_deploy.parity.rollout import compare as roll
    from txl_deploy.parity.rollout import random_segments
    from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact

    reference, _ = eager_from_checkpoint(folder / "checkpoint.pt", memory=memory)  # type: ignore[arg-type]
    info = reference.info
    chosen = random_segments(info.config, tgt_len=info.tgt_len, n_segments=segments, batch_size=1)
    begun = time.perf_counter()
    result = roll(reference, open_artifact(folder / f"{memory}-{dtype}"), chosen)
    if not result.passed:
        raise ValidationError(f"{memory} {dtype}: {result.reason}.")
    figures = {key: value for key, value in result.to_dict().items() if key not in ("segments", "reference", "candidate", "worst_token")}
    return {"parity": figures, "parity_seconds": round(time.perf_counter() - begun, 1)}


def build(folder: Path, *, memory: str, dtype: str) -> dict[str, Any]:
    """Build an engine of the graph, if TensorRT-RTX has products of its type for that compute capability."""
    from txl_deploy.manifest import BatchRange
    from txl_deploy.trt.builder import EngineSpec, build_engine

    low, usual, high = BATCH
    spec = EngineSpec(package="tensorrt_rtx", batch=BatchRange(min=low, opt=usual, max=high), compute_capability=COMPUTE_CAPABILITY)
    begun = time.perf_counter()
    try:
        built = build_engine(folder / f"{memory}-{dtype}", spec)
    except TxlError as error:
        if dtype == "fp32":
            return {"engine": None, "why_not": error.message}
        raise
    seconds = time.perf_counter() - begun
    (folder / f"{memory}-{dtype}.plan").write_bytes(built.built.plan)
    return {
        "engine": {
            "builder": f"{built.api.package} {built.api.version}",
            "compute_capability": COMPUTE_CAPABILITY,
            "batch": list(BATCH),
            "bytes": len(built.built.plan),
            "build_seconds": round(built.built.seconds, 1),
            "with_reading_seconds": round(seconds, 1),
            "precisions": built.built.precisions.record(),
        }
    }


STEPS = {"checkpoint": write_base_checkpoint, "export": export, "compare": compare, "build": build}


def in_a_process(step: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Run one of `STEPS` in a process of its own; add its peak memory to what it returns."""
    command = [sys.executable, str(Path(__file__).resolve()), "--step", step, "--work-dir", str(folder), "--options", json.dumps(options)]
    done = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise ValidationError(f"The step `{step}` failed with exit code {done.returncode}: {options}.")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(folder: Path, *, size: str, segments: int, only: str | None) -> dict[str, Any]:
    """Do everything, one process at a time."""
    environment = describe_environment()
    record: dict[str, Any] = {"theme": "export_base", "size": size, "environment": environment, "rows": []}
    record["model"] = in_a_process("checkpoint", folder, size=size)
    record["model"]["checkpoint_bytes"] = (folder / "checkpoint.pt").stat().st_size
    for memory, dtype in VARIANTS:
        if only not in (None, f"{memory}-{dtype}"):
            continue
        row: dict[str, Any] = {"memory": memory, "dtype": dtype}
        for step, options in (("export", {}), ("compare", {"segments": segments}), ("build", {})):
            print(f"{memory} {dtype}: {step}", file=sys.stderr, flush=True)
            found = in_a_process(step, folder, memory=memory, dtype=dtype, **options)
            row |= {f"{step}_peak_bytes" if key == "peak_bytes" else key: value for key, value in found.items()}
        record["rows"].append(row)
        shutil.rmtree(folder / f"{memory}-{dtype}")
    record["finished_at"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return record


def table(record: dict[str, Any], name: str) -> str:
    """Return the record as Markdown."""
    model, environment = record["model"], record["environment"]
    config, packages = model["config"], environment["packages"]
    settings = environment["thread_settings"]
    threads = f"{settings['OMP_NUM_THREADS']} threads" if "OMP_NUM_THREADS" in settings else "threads as the packages choose"
    versions = ", ".join(
        f"{package} {packages[package]}" for package in ("torch", "onnx", "onnxruntime", "tensorrt-rtx") if package in packages
    )
    cutoffs = ", ".join(f"{end:,}" for end in config["cutoffs"])
    lines = [
        "# The base model, exported",
        "",
        f"{config['n_layer']} layers, d_model {config['d_model']}, {config['n_head']} heads of {config['d_head']}, d_inner "
        f"{config['d_inner']}, vocabulary {config['vocab_size']:,} with cutoffs {cutoffs}, tgt_len {model['tgt_len']}, mem_len "
        f"{config['mem_len']}, clamp_len {config['clamp_len']}, same_length; {model['parameters'] / 1e6:.1f} million weights, random.",
        "",
        f"Graphs of opset 18 with the head `nll` and any batch size; engines of TensorRT-RTX for compute capability {COMPUTE_CAPABILITY}, "
        f"batch {BATCH[0]} to {BATCH[2]} (tuned for {BATCH[1]}), built without a GPU and not run. Each figure is of a process of its own.",
        "",
        "| memory | type | graph, MB | nodes | export, s | peak, GB | engine, MB | build, s | peak, GB | Δ perplexity |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        engine = row["engine"]
        size = sum(size for file, size in row["files"].items() if file.startswith("model.onnx"))
        cells = ["-", "-", "-"]
        if engine is not None:
            cells = [f"{engine['bytes'] / 1e6:.0f}", f"{engine['build_seconds']:.1f}", f"{row['build_peak_bytes'] / 1e9:.1f}"]
        delta = row["parity"]["perplexity_candidate"] / row["parity"]["perplexity_reference"] - 1
        first = [row["memory"], row["dtype"], f"{size / 1e6:.0f}", str(row["nodes"]), f"{row['export_seconds']:.0f}"]
        lines.append("| " + " | ".join([*first, f"{row['export_peak_bytes'] / 1e9:.1f}", *cells, f"{delta:+.1e}"]) + " |")
    refused = next((row["why_not"] for row in record["rows"] if row["engine"] is None), None)
    parity = record["rows"][0]["parity"]
    busy = environment["cpu_busy_before"] or 0.0
    lines += [
        "",
        "Export includes the audit (fp16), the checks, and a comparison of 6 segments of 3 streams. Δ perplexity is relative, of ONNX",
        f"Runtime on the CPU against eager PyTorch in FP32: {parity['n_segments']} segments of one stream of random tokens from a cold",
        "start, each on its own memory.",
        *([] if refused is None else ["", f"No engine of the fp32 graphs: {refused}"]),
        *([] if busy <= BUSY_SHARE else ["", f"When it began, others kept {busy:.0%} of the processors busy: times are upper bounds."]),
        "",
        f"{environment['cpu']}, {environment['cores_usable']} cores, {environment['memory_gib']} GiB, {threads}; Python "
        f"{environment['python']}, {versions}; commit {environment['git_commit']}. Everything: [{name}.json]({name}.json), made by "
        "`python benchmarks/export_base.py`.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the record; 0 if everything worked, an error's exit code otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="Record to write, without .json and .md.")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="Where the files are made.  [default: a temporary folder]")
    parser.add_argument("--segments", type=int, default=12, metavar="N", help="Segments compared at batch size 1.  [default: 12]")
    parser.add_argument("--quick", action="store_true", help="A small model instead.")
    parser.add_argument("--only", choices=[f"{memory}-{dtype}" for memory, dtype in VARIANTS], help="One of the four.  [default: all]")
    parser.add_argument("--step", choices=[*STEPS], help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, default={}, help=argparse.SUPPRESS)
    own = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        if own.step is not None:
            result = STEPS[own.step](own.work_dir, **own.options)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps({**result, "peak_bytes": peak}))
            return 0
        if (own.quick or own.only) and own.out is None:
            raise UsageError("A record of less than all is no measurement of the base model.", remedy="Say where to write it with `--out`.")
        if own.out is not None:
            check_replaceable(Path(f"{own.out}.json"), b"{")
            check_replaceable(Path(f"{own.out}.md"), b"# ")
        if own.work_dir is not None:
            own.work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=own.work_dir) as folder:
            record = without_folders(measure(Path(folder), size="quick" if own.quick else "base", segments=own.segments, only=own.only))
        name = f"export_base_{device_slug(None, record['environment']['cores_usable'])}_{record['finished_at'][:7].replace('-', '')}"
        out = own.out or ROOT / "benchmarks" / "results" / name
        write_json(Path(f"{out}.json"), record)
        with whole_or_absent(Path(f"{out}.md")) as file:
            file.write(table(record, out.name).encode())
    except TxlError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(f"{out}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
