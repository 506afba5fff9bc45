"""Every setting of the model and of training, as frozen dataclasses: one place for names, units, defaults, limits.

Files, environment and command line are merged into these classes by `txl_train.settings`. Knows nothing of PyTorch.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from txl_train.errors import ConfigError, nearest

SameLengthRule = Literal["mem_len+1", "mem_len"]
AttentionKind = Literal["relative", "shaw", "sinusoidal", "learned"]
Distribution = Literal["normal", "uniform"]
Compat = Literal["nvidia-2019", "nvidia-2023"]
MemoryKind = Literal["hidden", "kv"]
HeadKind = Literal["nll", "logits", "log_probs"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture, and the lengths that change what it computes.

    The defaults are those of the specification's command line (the "base" model of WikiText-103).
    """

    vocab_size: int = 0
    """Number of different tokens; 0 means that it is taken from the vocabulary."""
    n_layer: int = 16
    """Number of decoder layers."""
    n_head: int = 8
    """Number of attention heads per layer."""
    d_head: int = 64
    """Size of one attention head; n_head * d_head need not equal d_model."""
    d_model: int = 512
    """Size of the hidden states."""
    d_embed: int | None = None
    """Size of the embeddings of the most frequent words; none means d_model."""
    d_inner: int = 2048
    """Size of the inner layer of the feed-forward block."""
    dropout: float = 0.1
    """Probability of dropping a value of a hidden state, embedding or position."""
    dropatt: float = 0.0
    """Probability of dropping an attention weight."""
    attn_type: AttentionKind = "relative"
    """Positions: relative (0, Dai et al.), shaw (1, relative and learned), sinusoidal (2, Vaswani et al.), learned (3, Al-Rfou et al.)."""
    position_rows: int = 0
    """Positions that attn_type shaw and learned have per layer, the farthest for all beyond; 0 means tgt_len + ext_len + mem_len."""
    pre_lnorm: bool = False
    """Normalise the input of each block rather than its output."""
    tie_weights: bool = True
    """Use the embedding as the output matrix."""
    adaptive: bool = False
    """Split the vocabulary by frequency: adaptive embedding and adaptive softmax."""
    cutoffs: tuple[int, ...] = ()
    """Token ids at which the tail clusters start; empty with `adaptive` means the data set's own."""
    div_val: int = 1
    """Each tail cluster's embeddings are this many times narrower than those of the cluster before."""
    tie_projections: tuple[bool, ...] | None = None
    """Per cluster: the output projection is the embedding's; none means all but the first, as for WikiText-103."""
    untie_biases: bool = False
    """Each layer has its own content and position bias; otherwise one pair serves all layers."""
    mem_len: int = 192
    """Past positions kept per layer, in tokens; 0 turns the recurrence off."""
    ext_len: int = 0
    """Tokens before each segment that are read once more as context and not scored."""
    clamp_len: int | None = None
    """Distances above it share one encoding, in tokens; none means no limit."""
    same_length: bool = False
    """Let every token attend to the same number of keys."""
    same_length_rule: SameLengthRule = "mem_len+1"
    """How many keys that is, the token itself included: `mem_len+1` (NVIDIA 2023) or `mem_len` (NVIDIA 2019, Hugging Face)."""
    init: Distribution = "normal"
    """Distribution the weights are drawn from."""
    init_range: float = 0.1
    """Half-width of the uniform distribution."""
    init_std: float = 0.02
    """Standard deviation of the normal distribution."""
    proj_init_std: float = 0.01
    """Standard deviation for the projections between clusters and model."""
    emb_init: Distribution | None = None
    """Distribution the embeddings are drawn from; none means that of all weights."""
    emb_init_range: float = 0.01
    """Half-width of the uniform distribution of the embeddings, where `emb_init` is uniform."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "d_head", "d_model", "d_inner", "div_val"):
            _require(self, name, getattr(self, name) >= 1, "1 or more")
        for name in ("vocab_size", "mem_len", "ext_len", "position_rows"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("dropout", "dropatt"):
            _require(self, name, 0.0 <= getattr(self, name) < 1.0, "within 0..1, 1 excluded")
        for name in ("init_range", "init_std", "proj_init_std", "emb_init_range"):
            _require(self, name, 0.0 <= getattr(self, name) < math.inf, "0 or more")
        _require(self, "d_model", self.d_model % 2 == 0, "even (half the positions are sines, half cosines)")
        _require(self, "d_embed", self.d_embed is None or self.d_embed >= 1, "1 or more")
        _require(self, "clamp_len", self.clamp_len is None or self.clamp_len >= 1, "1 or more")
        _require_choice(self, "same_length_rule", ("mem_len+1", "mem_len"))
        _require_choice(self, "init", typing.get_args(Distribution))
        _require_choice(self, "emb_init", (None, *typing.get_args(Distribution)))
        _require_choice(self, "attn_type", typing.get_args(AttentionKind))
        if self.same_length and self.mem_len == 0 and self.same_length_rule == "mem_len":
            raise ConfigError("`same_length` over `mem_len` 0 keys leaves no key to attend to.")
        if self.cutoffs:
            _require(self, "cutoffs", self.cutoffs[0] >= 1, "1 or more each")
            _require(self, "cutoffs", all(a < b for a, b in zip(self.cutoffs, self.cutoffs[1:])), "strictly increasing")
            if self.vocab_size and self.cutoffs[-1] >= self.vocab_size:
                raise ConfigError(
                    f"`cutoffs` must be below the vocabulary's size {self.vocab_size}, but are {list(self.cutoffs)} instead.",
                    remedy="Add `--no-adaptive`, as a small vocabulary needs no adaptive softmax, or give smaller ones with `--cutoffs`.",
                )
        cutoffs_to_come = self.adaptive and not self.cutoffs  # the data set's own, filled in when its vocabulary is known
        if self.tie_projections is not None and not cutoffs_to_come and len(self.tie_projections) != self.n_cluster + 1:
            raise ConfigError(f"`tie_projections` must have {self.n_cluster + 1} entries, one per cluster.")
        narrowest = self.embed_size // self.div_val**self.n_cluster
        if narrowest < 1:
            raise ConfigError(
                f"`div_val` {self.div_val} leaves no width for the last of {self.n_cluster + 1} clusters of `d_embed` {self.embed_size}."
            )

    @property
    def embed_size(self) -> int:
        """`d_embed`, or `d_model` where it is not set."""
        return self.d_model if self.d_embed is None else self.d_embed

    @property
    def n_cluster(self) -> int:
        """Number of tail clusters; 0 for a plain softmax."""
        return len(self.cutoffs)

    @property
    def cluster_ends(self) -> tuple[int, ...]:
        """Ids where clusters begin and the last one ends: (0, *cutoffs, vocab_size)."""
        return (0, *self.cutoffs, self.vocab_size)

    @property
    def cluster_widths(self) -> tuple[int, ...]:
        """Embedding width of each cluster: d_embed // div_val**i."""
        return tuple(self.embed_size // self.div_val**i for i in range(self.n_cluster + 1))

    @property
    def max_distance(self) -> int | None:
        """Farthest key a token attends to, in tokens, under `same_length`; None where the memory is the only limit."""
        if not self.same_length:
            return None
        return self.mem_len if self.same_length_rule == "mem_len+1" else self.mem_len - 1

    def projection_is_tied(self, cluster: int) -> bool:
        """True if the output projection of `cluster` is the embedding's own."""
        return cluster > 0 if self.tie_projections is None else self.tie_projections[cluster]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    dataset: str = "wt103"
    """Data set: pydoc (built in), text (any folder of train.txt, valid.txt, test.txt), wt103, lm1b, text8 or enwik8."""
    data: str | None = None
    """Folder of train.txt, valid.txt and test.txt; none means that the data set is built into the work folder."""
    vocab: Literal["word", "bpe"] = "word"
    """Tokens of the vocabulary: word (the data set's own: words, characters or bytes) or bpe (the 50,257 subwords of GPT-2)."""
    min_count: int = 1
    """Words seen fewer times in train.txt become <unk> (text, pydoc and lm1b)."""

    def __post_init__(self) -> None:
        _require(self, "min_count", self.min_count >= 1, "1 or more")
        _require_choice(self, "vocab", ("word", "bpe"))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rate over time, clipping."""

    optim: Literal["lamb", "jitlamb", "adam", "adamw", "sgd", "adagrad"] = "lamb"
    """Optimizer: lamb (You et al. 2019; jitlamb is the same), adam (Kingma & Ba 2015), adamw (Loshchilov & Hutter 2019), sgd, adagrad."""
    lr: float = 0.01
    """Largest learning rate."""
    mom: float = 0.0
    """Momentum of sgd."""
    scheduler: Literal["cosine", "inv_sqrt", "dev_perf", "constant"] = "cosine"
    """Learning rate after the warm-up: half a cosine, 1/sqrt(step), lowered when valid.txt stops improving, or constant."""
    max_step_scheduler: int | None = None
    """Step at which the cosine ends; none means `max_step`."""
    lr_warmup_steps: int = 1000
    """Steps over which the learning rate grows linearly to `lr` (the specification's --warmup-step)."""
    eta_min: float = 0.001
    """Learning rate at the end of the cosine."""
    decay_rate: float = 0.5
    """Factor on the learning rate when valid.txt stops improving (dev_perf)."""
    patience: int = 0
    """Evaluations without improvement that are waited for before the learning rate is lowered (dev_perf)."""
    lr_min: float = 0.0
    """Learning rate below which dev_perf does not go."""
    clip: float = 0.25
    """Largest norm of the gradient over all parameters; 0 turns clipping off."""
    clip_nonemb: bool = False
    """Clip the gradients of all parameters but the embeddings'."""
    weight_decay: float = 0.0
    """Weight decay: of lamb and adamw decoupled, of adam added to the gradient. sgd and adagrad have none."""

    def __post_init__(self) -> None:
        _require_choice(self, "optim", ("lamb", "jitlamb", "adam", "adamw", "sgd", "adagrad"))
        _require_choice(self, "scheduler", ("cosine", "inv_sqrt", "dev_perf", "constant"))
        _require(self, "lr", 0.0 < self.lr < math.inf, "above 0")
        for name in ("lr_warmup_steps", "eta_min", "clip", "weight_decay", "patience", "lr_min"):
            _require(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")
        _require(self, "mom", 0.0 <= self.mom < 1.0, "within 0..1, 1 excluded")
        _require(self, "decay_rate", 0.0 < self.decay_rate < 1.0, "within 0..1, both excluded")
        _require(self, "max_step_scheduler", self.max_step_scheduler is None or self.max_step_scheduler >= 1, "1 or more")
        if self.scheduler == "cosine" and self.eta_min > self.lr:
            raise ConfigError(
                f"`eta_min` {self.eta_min} must not be above `lr` {self.lr}: the cosine would climb.",
                remedy="Give a smaller one, such as `--eta-min 0`, or use `--scheduler constant`.",
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which portions, in which precision, and how often to look."""

    work_dir: str = "LM-TFM"
    """Folder for checkpoints, logs, the resolved configuration and the token cache."""
    append_dataset: bool = False
    """Append the data set's name to the name of the work folder."""
    append_time: bool = False
    """Append the time of the start to the path of the work folder, as in 20260131-235959."""
    debug: bool = False
    """Write no files: no work folder, checkpoints or logs."""
    init_from: str | None = None
    """Checkpoint whose weights, and settings of the model, training begins with; none means freshly drawn weights."""
    compat: Compat | None = None
    """Train as NVIDIA's code of 2019 or 2023 does, where the default here is better on purpose (docs/training.md lists where)."""
    max_step: int = 40000
    """Number of optimizer steps."""
    max_minutes: float | None = None
    """Stop after this many minutes of training since this start, and finish as after the last step; none means no limit."""
    batch_size: int = 256
    """Number of streams read in parallel, over all accumulated parts."""
    batch_chunk: int = 1
    """Number of parts a batch is split into to save memory; gradients are accumulated over them."""
    tgt_len: int = 192
    """Tokens predicted per stream and step."""
    roll: bool = False
    """Shift each stream by a random number of tokens at the start of each epoch."""
    varlen: bool = False
    """Draw the length of each segment at random: mostly around tgt_len, one in twenty around half of it."""
    sample_softmax: int | None = None
    """Words drawn for the sampled softmax of training; none means the full softmax. Evaluation is always over all words."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the matrix products: fp32, or autocast to bf16 or fp16 (with a dynamic loss scale)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto means a GPU if there is one."""
    threads: int | None = None
    """CPU threads; none means what PyTorch chooses."""
    tf32: bool = False
    """Let GPUs since Ampere round the inputs of fp32 matrix products to TF32."""
    compile: bool = False
    """Compile layers and softmax with torch.compile (on one GPU, as CUDA graphs): a minute or more at the start, faster steps after."""
    multi_gpu: Literal["ddp", "dp"] | None = None
    """Several GPUs: ddp is one process each, started by torchrun (which says it all); dp is one process for all of them."""
    gpu0_bsz: int | None = None
    """Streams on the first GPU, over all parts, with --multi-gpu dp; none means an equal share."""
    seed: int = 1111
    """Seed of the initial weights, of dropout and of the order of the text (roll, varlen, lm1b)."""
    log_interval: int = 10
    """Steps between two lines of the training log."""
    log_all_ranks: bool = False
    """Let every process log, into files of its own; otherwise only the first does."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the folder tensorboard of the work folder."""
    save_all: bool = False
    """Keep the checkpoint of every evaluation, as checkpoint_<step>.pt."""
    keep_last: int | None = None
    """Keep the checkpoints of the newest so many evaluations, as checkpoint_<step>.pt; none means checkpoint_last.pt only."""
    target_throughput: float | None = None
    """Exit 1 if training reaches fewer tokens per second than this."""
    target_perplexity: float | None = None
    """Exit 1 if the best perplexity on valid.txt is above this."""
    eval_interval: int = 5000
    """Steps between two evaluations on valid.txt, each followed by writing checkpoints."""
    eval_batch_size: int = 16
    """Streams read in parallel by evaluation."""
    eval_tgt_len: int = 192
    """Tokens predicted per stream and step of evaluation."""
    eval_max_steps: int | None = None
    """Steps after which evaluation during training stops; none means the whole split."""

    def __post_init__(self) -> None:
        for name in (
            "max_step",
            "batch_size",
            "batch_chunk",
            "tgt_len",
            "log_interval",
            "eval_interval",
            "eval_batch_size",
            "eval_tgt_len",
        ):
            _require(self, name, getattr(self, name) >= 1, "1 or more")
        for name in ("threads", "eval_max_steps", "sample_softmax", "gpu0_bsz", "keep_last"):
            _require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more")
        for name in ("max_minutes", "target_throughput", "target_perplexity"):
            _require(self, name, getattr(self, name) is None or getattr(self, name) > 0, "above 0")
        _require_choice(self, "compat", (None, *typing.get_args(Compat)))
        _require_choice(self, "multi_gpu", (None, "ddp", "dp"))
        _require_choice(self, "dtype", ("fp32", "bf16", "fp16"))
        _require_choice(self, "device", ("auto", "cpu", "cuda"))
        if self.batch_size % self.batch_chunk:
            raise ConfigError(f"`batch_size` {self.batch_size} must be a multiple of `batch_chunk` {self.batch_chunk}.")


VALUE_ALIASES: dict[str, dict[str, str]] = {
    "model.attn_type": {"0": "relative", "1": "shaw", "2": "sinusoidal", "3": "learned"},
}
"""Other ways to write a setting's value: the specification's numbers."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one training run, by section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


SECTIONS: dict[str, type[ModelConfig] | type[DataConfig] | type[OptimConfig] | type[TrainConfig]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain values that JSON and YAML can hold (tuples become lists)."""
    return {
        key: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for key, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    }


def model_config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Rebuild a `ModelConfig` from `to_dict`; an unknown key is a `ConfigError` naming the nearest one."""
    known = [f.name for f in dataclasses.fields(ModelConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(f"`{key}` is no setting of the model.{nearest(key, known)}")
    try:
        given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return ModelConfig(**given)
    except TypeError as error:
        raise ConfigError(f"The model's settings have values of the wrong type: {error}.") from error


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Map each field of a config class to the sentence written below it; the command line's help is made of these."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for target, text in zip(body.body, body.body[1:]):
        match target, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(sentence))):
                docs[name] = sentence
    return docs


def _require(config: object, name: str, holds: bool, limits: str) -> None:
    if not holds:
        raise ConfigError(f"`{name}` must be {limits}, but is {getattr(config, name)} instead.")


def _require_choice(config: object, name: str, choices: tuple[str | None, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        named = [choice for choice in choices if choice is not None]
        raise ConfigError(f"`{name}` must be one of {', '.join(named)}, but is {value!r} instead.{nearest(str(value), named)}")
