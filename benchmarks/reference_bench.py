"""`txl bench` with two runtimes more, `reference` and `reference-eager`: NVIDIA's Transformer-XL in TorchScript and as it is, over the
weights of `--checkpoint`.

    python benchmarks/reference_bench.py bench --checkpoint C.pt --dtype fp16 --runtimes compiled,reference --artifact DIR --device cuda

They take turns with all others, in the type of `--dtype`, or in fp32 beside int8, which NVIDIA's code does not have; options, verdicts
and files are those of `txl bench`.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from reference_style import reference_runtime

from txl_deploy.bench.harness import Contender
from txl_deploy.cli import bench_contenders
from txl_deploy.cli import main as cli
from txl_deploy.manifest import Dtype
from txl_deploy.runtimes.base import RuntimeInfo

SCRIPTED = {"reference": True, "reference-eager": False}

_open_own = bench_contenders.open_in


def open_in(
    checkpoint: Path, runtime: str, dtype: Dtype, leader: RuntimeInfo, threads: int | None, stack: contextlib.ExitStack
) -> Contender:
    """Open the checkpoint in a runtime of ours or in the reference, for the lengths of the one that leads its group."""
    if runtime not in SCRIPTED:
        return _open_own(checkpoint, runtime, dtype, leader, threads, stack)
    config = leader.config
    opened = reference_runtime(
        checkpoint,
        scripted=SCRIPTED[runtime],
        tgt_len=leader.tgt_len,
        mem_len=config.mem_len,
        clamp_len=config.clamp_len,
        same_length=config.same_length,
        threads=threads,
        dtype="fp32" if dtype == "int8" else dtype,
        device=leader.device,
    )
    return Contender(opened)


if __name__ == "__main__":
    bench_contenders.RUNTIMES = (*bench_contenders.RUNTIMES, *SCRIPTED)  # type: ignore[assignment]
    bench_contenders.open_in = open_in
    sys.argv[0] = "txl"
    sys.exit(cli.main())
