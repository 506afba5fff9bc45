"""Writes small checkpoints the way the other programs do, from the oracle's parameters, and a language model that is known to be right.

Their classes are not needed: classes of the same module and name are put in their place while a file is written. The names of weights
are written out here a second time, from the other side than the importer has them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import sys
import types
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference.naive_txl import naive_forward, naive_nll
from txl_train.config import ModelConfig
from txl_train.data import pydoc
from txl_train.interop.foreign import ATTENTION

Style = Literal["nvidia-2019", "nvidia-2023", "kimiyoung", "huggingface"]
Parameters = Mapping[str, np.ndarray]

_OF_LAYER = {
    "dec_attn.o_net.weight": "attention.output.weight",
    "dec_attn.layer_norm.weight": "attention_norm.weight",
    "dec_attn.layer_norm.bias": "attention_norm.bias",
    "pos_ff.CoreNet.0.weight": "feed_forward.inner.weight",
    "pos_ff.CoreNet.0.bias": "feed_forward.inner.bias",
    "pos_ff.CoreNet.3.weight": "feed_forward.outer.weight",
    "pos_ff.CoreNet.3.bias": "feed_forward.outer.bias",
    "pos_ff.layer_norm.weight": "feed_forward_norm.weight",
    "pos_ff.layer_norm.bias": "feed_forward_norm.bias",
}


def symbols(count: int) -> list[str]:
    """Return `count` words that no text holds, after `<eos>`: the importer has nothing to score, which takes no time."""
    return ["<eos>", *(f"word{i}" for i in range(count - 1))]


# Weights under their names


def state_of(config: ModelConfig, parameters: Parameters, style: Style) -> dict[str, Tensor]:
    """Return a model's state dict as the program of `style` names it; what is tied is the same tensor."""
    given = {name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in parameters.items()}
    clusters = range(config.n_cluster + 1)

    def tables(name: str) -> list[Tensor]:
        parts = [given[f"{name}.{i}"] for i in clusters]
        return parts if config.div_val > 1 else [torch.cat(parts)]

    state: dict[str, Tensor] = {}
    embeddings = tables("embedding.weights")
    outputs = embeddings if config.tie_weights else tables("head.weights")
    for i, (embedding, output, bias) in enumerate(zip(embeddings, outputs, tables("head.biases"))):
        state[f"word_emb.emb_layers.{i}.weight"] = embedding
        if style == "nvidia-2023":
            state[f"crit.out_layers_biases.{i}"] = bias
            if not config.tie_weights:
                state[f"crit.out_layers_weights.{i}"] = output
        else:
            state[f"crit.out_layers.{i}.weight"], state[f"crit.out_layers.{i}.bias"] = output, bias
    if config.div_val > 1 or config.embed_size != config.d_model:
        own = [given[f"embedding.projections.{i}"] for i in (clusters if config.div_val > 1 else [0])]
        for i, projection in enumerate(own):
            state[f"word_emb.emb_projs.{i}"] = projection
            if style == "nvidia-2023":
                state[f"crit.shared_out_projs.{i}"] = projection
        for i in clusters:
            tied = config.projection_is_tied(i)
            if not tied or style != "nvidia-2023":
                state[f"crit.out_projs.{i}"] = own[i if config.div_val > 1 else 0] if tied else given[f"head.projections.{i}"]
    if config.n_cluster:
        ours = slice(None) if style == "huggingface" else slice(None, None, -1)
        state["crit.cluster_weight"] = torch.from_numpy(np.array(parameters["head.cluster_weight"][ours], dtype=np.float32))
        state["crit.cluster_bias"] = torch.from_numpy(np.array(parameters["head.cluster_bias"][ours], dtype=np.float32))
    state |= _positions(config, given, style)
    for layer in range(config.n_layer):
        state |= {f"layers.{layer}.{theirs}": given[f"layers.{layer}.{ours}"] for theirs, ours in _OF_LAYER.items()}
    return state


def _positions(config: ModelConfig, given: Mapping[str, Tensor], style: Style) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    width = config.n_head * config.d_head
    for layer in range(config.n_layer):
        theirs, ours = f"layers.{layer}.dec_attn", f"layers.{layer}.attention"
        if config.attn_type in ("relative", "shaw"):
            state[f"{theirs}.qkv_net.weight"] = given[f"{ours}.qkv.weight"]
        else:
            state[f"{theirs}.q_net.weight"] = given[f"{ours}.qkv.weight"][:width]
            state[f"{theirs}.kv_net.weight"] = given[f"{ours}.qkv.weight"][width:]
        if config.attn_type == "relative":
            state[f"{theirs}.r_net.weight"] = given[f"{ours}.position.weight"]
            for bias, name in (("r_w_bias", "content_bias"), ("r_r_bias", "position_bias")):
                if style == "huggingface":
                    state[f"{theirs}.{bias}"] = given[f"{ours}.{name}" if config.untie_biases else name]
                if not config.untie_biases:
                    state[bias] = given[name]

    def all_layers(name: str) -> Tensor:
        return torch.stack([given[f"layers.{layer}.attention.{name}"] for layer in range(config.n_layer)])

    if config.attn_type == "shaw":
        for name, ours in (("r_emb", "distance_keys"), ("r_w_bias", "content_bias"), ("r_bias", "distance_bias")):
            state[name] = all_layers(ours)
    elif config.attn_type == "learned":
        rows = all_layers("position_embedding")
        state["r_emb"] = rows.view(*rows.shape[:2], config.n_head, config.d_head) if style == "kimiyoung" else rows
    else:
        state["pos_emb.inv_freq"] = 1 / (10000 ** (torch.arange(0.0, config.d_model, 2.0) / config.d_model))
    return state


# Classes of theirs


class _StandIn(types.ModuleType):
    """Stands for a module of theirs."""


@contextlib.contextmanager
def classes(*names: str) -> Iterator[types.SimpleNamespace]:
    """Yield empty classes by their last name, written "module.name", which pickles then name; their modules are there until the end."""
    made = types.SimpleNamespace()
    before = dict(sys.modules)
    try:
        for name in names:
            module, _, last = name.rpartition(".")
            cls = type(last, (nn.Module,) if module in ("mem_transformer", "proj_adaptive_softmax") else (), {"__module__": module})
            parts = module.split(".")
            for i in range(1, len(parts) + 1):
                path = ".".join(parts[:i])
                if not isinstance(sys.modules.get(path), _StandIn):
                    sys.modules[path] = _StandIn(path)
            setattr(sys.modules[module], last, cls)
            setattr(made, last, cls)
        yield made
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)


def save(value: object, path: Path, *, legacy: bool = False) -> None:
    """Write with `torch.save`, in its zip form or in that before PyTorch 1.6."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the source text of a class is not found
        torch.save(value, path, _use_new_zipfile_serialization=not legacy)


# Checkpoints


def write_nvidia(
    path: Path, config: ModelConfig, parameters: Parameters, *, lineage: str = "2023", words: list[str] | None = None, legacy: bool = False
) -> None:
    """Write NVIDIA's checkpoint of 2019 or 2023."""
    style: Style = "nvidia-2019" if lineage == "2019" else "nvidia-2023"
    write_nvidia_state(path, config, state_of(config, parameters, style), lineage=lineage, words=words, legacy=legacy)


def write_nvidia_state(
    path: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    lineage: str = "2023",
    words: list[str] | None = None,
    legacy: bool = False,
    changes: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    vocab: object = None,
) -> None:
    """Write a checkpoint with these weights, `changes` in its model_config, `arguments` among the program's, and another `vocab`."""
    rows = config.position_rows - config.mem_len - config.ext_len if config.position_rows else 5
    model_config = {
        "n_token": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "d_model": config.d_model,
        "d_head": config.d_head,
        "d_inner": config.d_inner,
        "dropout": config.dropout,
        "dropatt": config.dropatt,
        "dtype": None,
        "tie_weight": config.tie_weights,
        "d_embed": config.embed_size,
        "div_val": config.div_val,
        "tie_projs": [config.projection_is_tied(i) for i in range(config.n_cluster + 1)],
        "pre_lnorm": config.pre_lnorm,
        "tgt_len": rows,
        "ext_len": config.ext_len,
        "mem_len": config.mem_len,
        "cutoffs": list(config.cutoffs),
        "same_length": config.same_length,
        "attn_type": ATTENTION.index(config.attn_type),
        "clamp_len": -1 if config.clamp_len is None else config.clamp_len,
        "sample_softmax": -1,
        **(changes or {}),
    }
    listed = words or symbols(config.vocab_size)
    with classes("utils.vocabulary.Vocab") as made:
        own = made.Vocab()
        own.__dict__ |= {
            "counter": Counter(listed),
            "special": ["<eos>"],
            "lower_case": False,
            "idx2sym": listed,
            "sym2idx": OrderedDict((word, i) for i, word in enumerate(listed)),
        }
        saved: dict[str, Any] = {
            "args": argparse.Namespace(
                **{"dataset": "wt103", "data": "../data/wikitext-103", "eval_tgt_len": 4, "lr": 0.01, **(arguments or {})}
            ),
            "model_config": model_config,
            "model_state": OrderedDict(state),
            "optimizer_state": {"state": {0: {"step": 3, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.01}]},
            "scheduler_state": {"last_epoch": 3},
            "vocab": vocab or own,
            "amp_state": None,
            "train_step": 30,
            "best_val_loss": 3.25,
        }
        if lineage == "2023":
            saved |= {"rng_states": [torch.get_rng_state()], "memory": [[torch.ones(2, 3, 1, 4)]], "epoch": 2, "batch": 7, "last_iter": 99}
        save(saved, path, legacy=legacy)


def write_kimiyoung(path: Path, config: ModelConfig, parameters: Parameters, *, legacy: bool = False) -> None:
    """Write the authors' pickled module."""
    tensors = state_of(config, parameters, "kimiyoung")
    by_tensor = {id(tensor): nn.Parameter(tensor) for tensor in tensors.values()}
    state = {name: by_tensor[id(tensor)] for name, tensor in tensors.items()}  # what is one tensor is one parameter
    kind = {"relative": "RelPartialLearnable", "shaw": "RelLearnable"}.get(config.attn_type, "")
    names = (
        "MemTransformerLM",
        "AdaptiveEmbedding",
        "PositionalEmbedding",
        "PositionwiseFF",
        f"{kind}DecoderLayer",
        f"{kind}MultiHeadAttn",
    )
    softmax = "proj_adaptive_softmax.ProjectedAdaptiveLogSoftmax"
    with classes(*(f"mem_transformer.{name}" for name in names), softmax) as made:
        save(_kimiyoung_module(made, kind, config, state), path, legacy=legacy)


def _kimiyoung_module(made: types.SimpleNamespace, kind: str, config: ModelConfig, state: Mapping[str, nn.Parameter]) -> nn.Module:
    ends = [*config.cutoffs, config.vocab_size]
    tgt_len = config.position_rows - config.mem_len - config.ext_len if config.position_rows else 5

    def linear(name: str) -> nn.Linear:
        weight = state[f"{name}.weight"]
        part = nn.Linear(weight.shape[1], weight.shape[0], bias=f"{name}.bias" in state)
        part.weight = weight
        if f"{name}.bias" in state:
            part.bias = state[f"{name}.bias"]
        return part

    def norm(name: str) -> nn.LayerNorm:
        part = nn.LayerNorm(config.d_model)
        part.weight, part.bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return part

    def projections(prefix: str, count: int) -> nn.ParameterList:
        found = nn.ParameterList()
        for i in range(count):
            found.append(state.get(f"{prefix}.{i}"))
        return found

    model = made.MemTransformerLM()
    for name in ("n_layer", "n_head", "d_model", "d_head", "mem_len", "ext_len", "same_length"):
        setattr(model, name, getattr(config, name))
    model.n_token, model.d_embed, model.tgt_len = config.vocab_size, config.embed_size, tgt_len
    model.max_klen = tgt_len + config.ext_len + config.mem_len
    model.attn_type, model.sample_softmax = ATTENTION.index(config.attn_type), -1
    model.clamp_len = -1 if config.clamp_len is None else config.clamp_len
    model.word_emb = made.AdaptiveEmbedding()
    model.word_emb.cutoffs, model.word_emb.div_val = ends, config.div_val
    model.word_emb.emb_layers = nn.ModuleList()
    for i in range(len(ends) if config.div_val > 1 else 1):
        weight = state[f"word_emb.emb_layers.{i}.weight"]
        table = nn.Embedding(*weight.shape)
        table.weight = weight
        model.word_emb.emb_layers.append(table)
    model.word_emb.emb_projs = projections("word_emb.emb_projs", sum(name.startswith("word_emb.emb_projs") for name in state))
    model.drop = nn.Dropout(config.dropout)
    model.layers = nn.ModuleList()
    for layer in range(config.n_layer):
        prefix = f"layers.{layer}"
        part = getattr(made, f"{kind}DecoderLayer")()
        part.dec_attn, part.pos_ff = getattr(made, f"{kind}MultiHeadAttn")(), made.PositionwiseFF()
        part.dec_attn.pre_lnorm = part.pos_ff.pre_lnorm = config.pre_lnorm
        for name in ("qkv_net", "q_net", "kv_net", "r_net", "o_net"):
            if f"{prefix}.dec_attn.{name}.weight" in state:
                setattr(part.dec_attn, name, linear(f"{prefix}.dec_attn.{name}"))
        part.dec_attn.drop, part.dec_attn.dropatt = nn.Dropout(config.dropout), nn.Dropout(config.dropatt)
        part.dec_attn.layer_norm, part.pos_ff.layer_norm = norm(f"{prefix}.dec_attn.layer_norm"), norm(f"{prefix}.pos_ff.layer_norm")
        inner, outer = linear(f"{prefix}.pos_ff.CoreNet.0"), linear(f"{prefix}.pos_ff.CoreNet.3")
        part.pos_ff.CoreNet = nn.Sequential(inner, nn.ReLU(inplace=True), nn.Dropout(config.dropout), outer, nn.Dropout(config.dropout))
        model.layers.append(part)
    model.crit = made.ProjectedAdaptiveLogSoftmax()
    model.crit.cutoffs, model.crit.n_clusters = ends, config.n_cluster
    model.crit.out_layers = nn.ModuleList(linear(f"crit.out_layers.{i}") for i in range(len(model.word_emb.emb_layers)))
    model.crit.out_projs = projections("crit.out_projs", len(ends))
    for name in ("cluster_weight", "cluster_bias"):
        if f"crit.{name}" in state:
            setattr(model.crit, name, state[f"crit.{name}"])
    if "pos_emb.inv_freq" in state:
        model.pos_emb = made.PositionalEmbedding()
        model.pos_emb.register_buffer("inv_freq", state["pos_emb.inv_freq"].data)
    for name in ("r_w_bias", "r_r_bias", "r_emb", "r_bias"):
        if name in state:
            setattr(model, name, state[name])
    return model


def write_huggingface(
    folder: Path,
    config: ModelConfig,
    parameters: Parameters,
    *,
    form: Literal["safetensors", "bin", "legacy bin"] = "safetensors",
    words: list[str] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder of `save_pretrained`: tied tensors are doubled in .bin and absent in .safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name if name.startswith("crit.") else f"transformer.{name}": tensor
        for name, tensor in state_of(config, parameters, "huggingface").items()
    }
    if form == "safetensors":
        seen: set[int] = set()
        write_safetensors(folder / "model.safetensors", {n: t for n, t in state.items() if not (id(t) in seen or seen.add(id(t)))})
    else:
        save(OrderedDict(state), folder / "pytorch_model.bin", legacy=form == "legacy bin")
    settings = {
        "model_type": "transfo-xl",
        "architectures": ["TransfoXLLMHeadModel"],
        "vocab_size": config.vocab_size,
        "tie_projs": [config.projection_is_tied(i) for i in range(config.n_cluster + 1)],
        "cutoffs": list(config.cutoffs),
        "clamp_len": -1 if config.clamp_len is None else config.clamp_len,
        "untie_r": config.untie_biases,
        "d_embed": config.embed_size,
        **{name: getattr(config, name) for name in ("n_layer", "n_head", "d_head", "d_model", "d_inner", "div_val", "mem_len")},
        **{name: getattr(config, name) for name in ("dropout", "dropatt", "pre_lnorm", "same_length")},
        "attn_type": 0,
        "layer_norm_epsilon": 1e-05,
    }
    if not config.tie_weights:
        settings["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps({**settings, **(changes or {})}), encoding="utf-8")
    write_vocab_pkl(folder / "vocab.pkl", words or symbols(config.vocab_size))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write float32 tensors in the safetensors format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        numbers = tensor.contiguous().numpy().astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_vocab_pkl(path: Path, words: list[str], *, plain: bool = False) -> None:
    """Write Hugging Face's vocabulary: a plain dict, or as newer versions do with the tokenizer's tools in it and one token too many."""
    table = OrderedDict((word, i) for i, word in enumerate(words))
    content: dict[str, Any] = {"counter": Counter(words), "special": [], "idx2sym": words, "sym2idx": table, "unk_idx": 2}
    names = ("sacremoses.tokenize.MosesTokenizer", "sacremoses.normalize.MosesPunctNormalizer", "tokenizers.AddedToken")
    with classes(*names, "transformers.tokenization_utils.Trie") as made:
        if not plain:
            table["<formula>"] = len(words)
            content |= {"moses_tokenizer": made.MosesTokenizer(), "moses_punct_normalizer": made.MosesPunctNormalizer()}
            content["_added_tokens_decoder"] = {len(words): made.AddedToken()}
            content["tokens_trie"] = made.Trie()
            content["tokens_trie"].data, content["tokens_trie"]._tokens = {}, {"<formula>"}
        path.write_bytes(pickle.dumps(content))


# What is right


def expected_nll(config: ModelConfig, parameters: Parameters, ids_BN: np.ndarray, tgt_len: int) -> np.ndarray:
    """Return the oracle's -log p of every token but the first of each stream, [B, N-1], nats, segment after segment from a cold start."""
    memory, parts = None, []
    for start in range(0, ids_BN.shape[1] - 1, tgt_len):
        hidden, memory = naive_forward(config, parameters, ids_BN[:, start : start + tgt_len], memory)
        parts.append(naive_nll(config, parameters, hidden, ids_BN[:, start + 1 : start + tgt_len + 1]))
    return np.concatenate(parts, axis=1)


def bigram_model(words: int = 96, cutoffs: tuple[int, ...] = (24, 48, 72)) -> tuple[ModelConfig, dict[str, np.ndarray], list[str]]:
    """Return a model that knows, by construction, which word of the built-in text follows which: config, parameters, words.

    Embeddings are one-hot, the only layer adds nothing, and normalising a one-hot vector gives sqrt(D-1) where the one was and
    -1/sqrt(D-1) elsewhere. The output weights hold the logarithms of the text's own pair frequencies.
    """
    topics = __import__("pydoc_data.topics", fromlist=["topics"]).topics
    tokens = [token for topic in sorted(topics) for text in pydoc.paragraphs(topics[topic]) for token in [*pydoc.tokenize(text), "<eos>"]]
    counts = Counter(tokens)
    del counts["<eos>"]
    listed = ["<eos>", "<unk>", *(word for word, _ in counts.most_common(words - 2))]
    number = {word: i for i, word in enumerate(listed)}
    ids = [number.get(token, 1) for token in tokens]
    pairs = np.full((words, words), 0.05)
    np.add.at(pairs, (ids[:-1], ids[1:]), 1.0)
    log_p = np.log(pairs / pairs.sum(axis=1, keepdims=True))  # [word before, word]
    config = ModelConfig(
        vocab_size=words,
        n_layer=1,
        n_head=1,
        d_head=4,
        d_model=words,
        d_inner=4,
        dropout=0.0,
        adaptive=bool(cutoffs),
        cutoffs=cutoffs,
        tie_weights=False,
        mem_len=4,
    )
    D = words
    high, low = np.sqrt(D - 1), -1 / np.sqrt(D - 1)
    ends = config.cluster_ends
    scores = [log_p[:, a:b] for a, b in zip(ends, ends[1:])]
    clusters = np.stack([np.log(np.exp(part).sum(axis=1)) for part in scores[1:]], axis=1) if cutoffs else np.zeros((D, 0))

    def output(log_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = log_scores.T / (high - low)
        return weight, -weight.sum(axis=1) * low

    parameters: dict[str, np.ndarray] = {}
    for i, (a, b) in enumerate(zip(ends, ends[1:])):
        parameters[f"embedding.weights.{i}"] = np.eye(D)[a:b]
        parameters[f"head.weights.{i}"], parameters[f"head.biases.{i}"] = output(scores[i])
    if cutoffs:
        parameters["head.cluster_weight"], parameters["head.cluster_bias"] = output(clusters)
    width = config.n_head * config.d_head
    parameters |= {"content_bias": np.zeros((1, 4)), "position_bias": np.zeros((1, 4))}
    parameters |= {
        "layers.0.attention.qkv.weight": np.zeros((3 * width, D)),
        "layers.0.attention.position.weight": np.zeros((width, D)),
        "layers.0.attention.output.weight": np.zeros((D, width)),
        "layers.0.feed_forward.inner.weight": np.zeros((4, D)),
        "layers.0.feed_forward.inner.bias": np.zeros(4),
        "layers.0.feed_forward.outer.weight": np.zeros((D, 4)),
        "layers.0.feed_forward.outer.bias": np.zeros(D),
    }
    for norm in ("attention_norm", "feed_forward_norm"):
        parameters |= {f"layers.0.{norm}.weight": np.ones(D), f"layers.0.{norm}.bias": np.zeros(D)}
    return config, parameters, listed
