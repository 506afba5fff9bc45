"""What `gpu_suite` runs: the trainings, exports and lengths of the base model and of a small one, and the text they are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Training:
    """One training of the plan."""

    name: str
    options: tuple[str, ...]
    batch_size: int
    steps: int
    processes: int = 1
    follows: str | None = None
    """The training whose losses it must have."""
    opponent: str | None = None
    """The training of ours that this one, with the reference's step, is the opponent of."""
    left_out: str = ""
    """Why it is not run; empty if it is."""


@dataclass(frozen=True)
class Export:
    """One exported model of the plan."""

    format: str
    memory: str
    dtype: str
    package: str
    """What it needs."""
    of_onnx: bool = False
    """Built from the ONNX graph of the same memory and type, exported before, for every GPU that the builder supports."""

    @property
    def name(self) -> str:
        """What its steps call it."""
        return f"{self.format}, {self.memory} memory, {self.dtype}"

    @property
    def folder(self) -> str:
        """Where it is written."""
        return f"{self.format}-{self.memory}-{self.dtype}"


@dataclass(frozen=True)
class Against:
    """A comparison with the reference's TorchScript, which takes turns with ours."""

    dtype: str
    runtimes: str
    """Of ours, beside the exports of that type."""
    batch_sizes: tuple[int, ...]
    options: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    device: str
    preset: list[str]
    """Options that choose the model."""
    vocab_size: int
    n_tokens: int
    trainings: tuple[Training, ...]
    """The first one makes the checkpoint that is exported. What matters most comes first: time may be short."""
    tolerance_nats: float
    """How far the mean loss of the last fifth of a training may lie from that of the training it follows."""
    exports: tuple[Export, ...]
    lengths: list[str]
    """Options that choose the lengths of inference."""
    bench: list[str]
    compiled: list[str]
    """Options of `txl bench` for the compiled step, which takes a minute or more for each batch size; empty leaves it out."""
    against: Against
    """How inference is measured against the reference."""
    goals_apply: bool
    """The goals are set for what this plan measures."""


def _pair(dtype: str, batch_size: int, steps: int, follows: str | None = None) -> tuple[Training, Training]:
    """Return a compiled training of the base model and its opponent."""
    size = "" if batch_size == 32 else f", batch {batch_size}"
    own = f"{dtype}, compiled{size}"
    return (
        Training(own, ("--dtype", dtype, "--compile"), batch_size, steps, follows=follows),
        Training(f"reference in {dtype}{size}", ("--dtype", dtype), batch_size, steps, follows=follows and own, opponent=own),
    )


BASE = Plan(
    device="cuda",
    preset=["--config", "wt103-base"],
    vocab_size=267_735,
    n_tokens=3_000_000,
    trainings=(
        Training("fp32", ("--dtype", "fp32"), 32, 300),
        *_pair("bf16", 32, 300, follows="fp32"),
        *_pair("bf16", 128, 60),
        *_pair("fp16", 32, 300, follows="fp32"),
        # these tell a fault of the compiled step from a run that is unstable in this precision
        Training("bf16, compiled, seed 2", ("--dtype", "bf16", "--compile", "--seed", "2"), 32, 300, follows="fp32"),
        Training("bf16", ("--dtype", "bf16"), 32, 300, follows="fp32"),
        *_pair("fp16", 128, 60),
        *_pair("bf16", 256, 60),
        *_pair("fp16", 256, 60),
        Training("fp16", ("--dtype", "fp16"), 32, 300, follows="fp32"),
        Training("fp32 with TF32", ("--dtype", "fp32", "--tf32"), 32, 300, follows="fp32"),
        Training("fp16, two devices", ("--dtype", "fp16"), 32, 300, processes=2, follows="fp32"),
        Training("fp32, larger batch", ("--dtype", "fp32"), 64, 60),
    ),
    tolerance_nats=0.05,
    exports=(
        Export("torchscript", "hidden", "fp32", "torch"),
        *(
            export
            for dtype in ("fp32", "fp16")
            for export in (
                Export("torchscript", "kv", dtype, "torch"),
                Export("onnx", "kv", dtype, "onnxruntime"),
                Export("trt-rtx", "kv", dtype, "tensorrt_rtx", of_onnx=True),
            )
        ),
    ),
    lengths=["--tgt-len", "64", "--mem-len", "640", "--clamp-len", "400", "--same-length"],
    bench=["--batch-sizes", "1..32", "--duration", "3"],
    compiled=["--batch-sizes", "1,32", "--duration", "3"],
    against=Against("fp16", "pytorch", (1, 32), ("--duration", "10", "--max-duration", "60")),
    goals_apply=True,
)
QUICK = Plan(
    device="cpu",
    preset=[
        "--n-layer",
        "2",
        "--d-model",
        "32",
        "--n-head",
        "2",
        "--d-head",
        "16",
        "--d-inner",
        "64",
        "--adaptive",
        "--tgt-len",
        "32",
        "--mem-len",
        "32",
    ],
    vocab_size=3_000,
    n_tokens=20_000,
    trainings=(
        Training("fp32", ("--dtype", "fp32"), 8, 60),
        Training("bf16", ("--dtype", "bf16"), 8, 60, follows="fp32"),
        Training("fp32, compiled", ("--dtype", "fp32", "--compile"), 8, 60, follows="fp32", left_out="compiling takes longer than --quick"),
        Training("fp32, two devices", ("--dtype", "fp32"), 8, 60, processes=2, follows="fp32"),
        Training("reference in fp32", ("--dtype", "fp32"), 8, 60, follows="fp32", opponent="fp32"),
    ),
    tolerance_nats=0.02,
    exports=(
        Export("torchscript", "hidden", "fp32", "torch"),
        Export("onnx", "kv", "fp32", "onnxruntime"),
        Export("torchscript", "kv", "fp16", "torch"),
        Export("trt-rtx", "kv", "fp32", "tensorrt_rtx", of_onnx=True),
    ),
    lengths=["--tgt-len", "16", "--mem-len", "24"],
    bench=["--batch-sizes", "1,2", "--duration", "0.2", "--min-samples", "5", "--max-duration", "1"],
    compiled=[],
    against=Against("fp32", "pytorch", (1, 2), ("--duration", "0.2", "--min-samples", "5", "--max-duration", "1")),
    goals_apply=False,
)


def write_corpus(folder: Path, plan: Plan, seed: int = 1) -> None:
    """Write text that can be learned: phrases of a book, some of them frequent, and after each few of them some word of the vocabulary.

    Every word of the vocabulary comes at least once, a tenth of the tokens are drawn from all alike, the phrases' words follow Zipf's
    law: about as many tokens as in WikiText-103 fall into the tail clusters.
    """
    generator = np.random.default_rng(seed)
    n_words = plan.vocab_size - 1  # <eos> is the other token

    def zipf(n: int, size: int) -> np.ndarray:
        weights = 1.0 / np.arange(1, n + 1)
        return generator.choice(n, size=size, p=weights / weights.sum())

    lengths = generator.integers(4, 17, size=max(20, n_words // 100))
    book = np.split(zipf(n_words, int(lengths.sum())), np.cumsum(lengths)[:-1])

    def write(name: str, n_tokens: int, rare: np.ndarray) -> None:
        drawn = iter(zipf(len(book), n_tokens // 4))
        with open(folder / name, "w", encoding="utf-8") as file:
            for few in np.array_split(rare, max(1, n_tokens // 50)):
                words = np.concatenate([book[next(drawn)] for _ in range(4)] + [few])
                file.write(" ".join(f"w{i}" for i in words) + "\n")

    folder.mkdir(parents=True)
    write("train.txt", plan.n_tokens, generator.permutation(n_words))
    for split in ("valid", "test"):
        n_tokens = max(plan.n_tokens // 50, 4000)
        write(f"{split}.txt", n_tokens, generator.integers(0, n_words, n_tokens // 10))
