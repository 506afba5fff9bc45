"""Compiles every Triton kernel of the toolkit for a GPU that need not be there: `python -m tests.train.model.compile_kernels 90`.

With the base model's sizes. Exit code 1 if one does not compile, or takes more shared memory than the smallest GPU from Ampere on has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from txl_train import trial_kernel
from txl_train.model import layer_kernels, softmax_kernels
from txl_train.optim import lamb_kernels

MOST_SHARED = 99 * 1024
"""Bytes of shared memory that a block may have from compute capability 8.0 on, on the GPUs with the least (8.6 and 8.9)."""
FLOATS, LONGS, INTS = "*fp32", "*i64", "*i32"
SIXTEENS = ("stride_b", "stride_h", "N", "Q", "M", "D", "W", "S")
"""Numbers that are multiples of 16 with the base model, which Triton makes use of."""

ONES = {"B", "N", "H", "Q", "V", "n_cluster", "n_tile", "c0", "T", "n_row_block"}
"""Numbers that can be 1, which Triton makes a constant of."""

Case = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]
"""A kernel, the types of its arguments, its constants and its options."""


def cases(operand: str) -> Iterator[Case]:
    """Yield the kernels of the step for operands of a type, `*fp16` or `*fp32`."""
    exact = operand == FLOATS
    precision = layer_kernels.precision_of(torch.float32 if exact else torch.float16)
    pointers = dict.fromkeys(("qkv", "content_bias", "key", "value", "by_distance", "out"), operand)
    numbers = dict.fromkeys(("stride_b", "stride_h", "max_distance", "shift", "H", "N", "Q", "M", "EXT", "C", "pitch"), "i32")
    attend = {**pointers, "length": LONGS, "start": LONGS, "largests": FLOATS, "totals": FLOATS, "scale": "fp32", **numbers}
    for block_q, block_k, n_part in ((16, 32, 3), (32, 32, 1)) if exact else ((16, 128, 3), (64, 64, 1)):
        for fits in (True, False):
            sizes = {"E": 64, "BLOCK_E": 64, "BLOCK_Q": block_q, "BLOCK_K": block_k, "N_PART": n_part}
            sizes |= {"ALL_KEYS": fits and block_k < 128, "IS_ALIGNED": fits, "PRECISION": precision}
            yield layer_kernels._attend, attend, sizes, {"num_warps": 4, "num_stages": 3}
    joined = {**dict.fromkeys(("parts", "largests", "totals"), FLOATS), "out": operand, **dict.fromkeys(("N", "W", "H"), "i32")}
    yield layer_kernels._join, joined, {"E": 64, "N_PART": 3, "BLOCK": 512}, {}
    embed = {"ids": LONGS, "table": operand, "scale": "fp32", "x": FLOATS, "half": operand, "V": "i32", "D": "i32"}
    yield layer_kernels._embed, embed, {"BLOCK": 512}, {}
    norm = {"x": FLOATS, "more": operand, "weight": FLOATS, "bias": FLOATS, "out": FLOATS, "half": operand, "D": "i32", "eps": "fp32"}
    for keeps_sum in (True, False):
        yield layer_kernels._add_norm, norm, {"KEEPS_SUM": keeps_sum, "BLOCK": 512}, {}
    scored = dict.fromkeys(("qkv", "position_bias", "term", "out", "key", "value"), operand) | {"start": LONGS, "scale": "fp32"}
    numbers = dict.fromkeys(("stride_b", "stride_h", "first", "H", "N", "Q", "M", "S", "C", "pitch", "n_row_block"), "i32")
    for block_n, block_c in {layer_kernels.score_blocks(torch.float32 if exact else torch.float16, n) for n in (64, 256, 2048)}:
        sizes = {"E": 64, "BLOCK_E": 64, "BLOCK_N": block_n, "BLOCK_C": block_c, "PRECISION": precision}
        yield layer_kernels._score_and_keep, scored | numbers, sizes, {}
    advance = {"length": LONGS, "start": LONGS, **dict.fromkeys(("B", "T", "most", "S"), "i32")}
    yield layer_kernels._advance, advance, {"BLOCK": 32}, {}
    head = {"scores": operand, "targets": LONGS, "lows": LONGS, "nll": FLOATS, **dict.fromkeys(("V", "n_word", "n_cluster"), "i32")}
    yield softmax_kernels._head_nll, head, {"BLOCK": softmax_kernels.SUMMED, "BLOCK_C": 4}, {"num_warps": 8}
    found = {"targets": LONGS, "lows": LONGS, "rows": INTS, "offsets": INTS, "N": "i32", "n_cluster": "i32"}
    yield softmax_kernels._find_rows, found, {"BLOCK": softmax_kernels.SCANNED}, {"num_warps": 8}
    tail = dict.fromkeys(("hidden", "weight", "bias"), operand) | {"rows": INTS, "offsets": INTS, "lows": LONGS}
    tail |= {"largest": FLOATS, "total": FLOATS, **dict.fromkeys(("c0", "n_cluster", "W", "n_tile"), "i32")}
    for n in (64, 512, 2048):
        block_r, block_w, warps, stages = softmax_kernels.tail_blocks(torch.float32 if exact else torch.float16, n)
        sizes = {"BLOCK_C": 4, "BLOCK_R": block_r, "BLOCK_V": softmax_kernels.TILE, "BLOCK_W": block_w, "WHOLE_WIDTH": True}
        yield (
            softmax_kernels._tail_scores,
            {**tail, "first_tiles": INTS},
            {**sizes, "PRECISION": precision},
            {"num_warps": warps, "num_stages": stages},
        )
    add = {"BLOCK_V": softmax_kernels.TILE, "BLOCK_C": 4, "BLOCK_W": 512, "BLOCK": 2048}
    yield softmax_kernels._add_tail_nll, {**tail, "targets": LONGS, "nll": FLOATS}, add, {}


def optimizer_cases() -> Iterator[Case]:
    """Yield the kernels of LAMB, and the one that tries whether any can run."""
    settings = dict.fromkeys(("beta1", "beta2", "eps", "weight_decay", "correction1", "correction2"), "fp32")
    table = {"pointers": LONGS, "chunks": LONGS}
    sums, norms = dict.fromkeys(("weight_squares", "update_squares"), FLOATS), dict.fromkeys(("weight_norms", "update_norms"), FLOATS)
    yield trial_kernel._put_one, {"place": INTS}, {}, {}
    yield lamb_kernels._moments, {**table, **sums, **settings}, {"BLOCK": 2048}, {"num_warps": 8}
    yield lamb_kernels._norms, {"first_chunks": INTS, **sums, **norms}, {"BLOCK": 1024}, {}
    yield lamb_kernels._move, {**table, "factors": FLOATS, **settings}, {"BLOCK": 2048}, {"num_warps": 8}


def main() -> int:
    """Compile all for the compute capability that the first argument names (90 is 9.0)."""
    target, failed = GPUTarget("cuda", int(sys.argv[1]), 32), False
    of_base = [*cases("*fp16"), *cases(FLOATS), *optimizer_cases()]
    of_least = [
        (kernel, types, {**dict.fromkeys(ONES & set(types), 1), **constants}, options) for kernel, types, constants, options in of_base
    ]
    for kernel, types, constants, options in [*of_base, *of_least]:
        names = list(kernel.arg_names)
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(names)
                if name not in constants and (types[name].startswith("*") or name in SIXTEENS)
            },
        )
        compiled = triton.compile(source, target=target, options=options)
        shared = compiled.metadata.shared
        told = f"{kernel.fn.__name__} {types.get('qkv', types.get('hidden', ''))} {constants}: {shared} bytes shared"
        if constants.get("IS_ALIGNED") and "*fp16" in types.values() and "N" not in constants:
            narrow = compiled.asm["ptx"].count("ld.global.b16")
            told += f", wide loads of distances: {narrow == 0}"
            failed |= narrow > 0
        sys.stdout.write(told + "\n")
        failed |= shared > MOST_SHARED
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
