"""What NVIDIA's Transformer-XL left on disk, read without running any of its code: checkpoints, recorded results, evaluation order.

Knows both lineages of NVIDIA/DeepLearningExamples `PyTorch/LanguageModeling/Transformer-XL`: "2019" (commit ca28f554) and "2023"
(8f822371), which differ in the checkpoint's names, in `same_length` and in how evaluation begins. Needs neither PyTorch nor the model:
a checkpoint is a zip file of raw storages and one pickle, whose few classes are replaced by inert ones here.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from txl_train.config import ModelConfig

Array: TypeAlias = npt.NDArray[Any]
Ids: TypeAlias = npt.NDArray[np.int64]
Lineage: TypeAlias = Literal["2019", "2023"]


# Checkpoints


@dataclass(frozen=True)
class NvidiaCheckpoint:
    """A checkpoint in our words: names and shapes of our parameters, each tied one once."""

    config: ModelConfig
    parameters: dict[str, Array]
    symbols: list[str]
    lineage: Lineage


def load_nvidia_checkpoint(path: Path) -> NvidiaCheckpoint:
    """Read a checkpoint of either lineage. Raises `pickle.UnpicklingError` where it asks for any class but the known inert ones."""
    saved = read_torch_zip(path)
    state = cast("dict[str, Array]", saved["model_state"])
    lineage: Lineage = "2019" if "crit.out_layers.0.bias" in state else "2023"
    config = map_config(saved["model_config"], lineage)
    return NvidiaCheckpoint(config, map_parameters(state, config), list(saved["vocab"].idx2sym), lineage)


def map_config(model_config: Mapping[str, Any], lineage: Lineage) -> ModelConfig:
    """Translate the reference's `model_config`. Its tgt_len and ext_len are lengths of a run, not of a model, and are left out."""
    if model_config["attn_type"] != 0:
        raise ValueError(f"attn_type {model_config['attn_type']} is not relative attention")
    return ModelConfig(
        vocab_size=model_config["n_token"],
        n_layer=model_config["n_layer"],
        n_head=model_config["n_head"],
        d_head=model_config["d_head"],
        d_model=model_config["d_model"],
        d_embed=model_config["d_embed"],
        d_inner=model_config["d_inner"],
        dropout=model_config["dropout"],
        dropatt=model_config["dropatt"],
        pre_lnorm=model_config["pre_lnorm"],
        tie_weights=model_config["tie_weight"],
        adaptive=bool(model_config["cutoffs"]),
        cutoffs=tuple(model_config["cutoffs"]),
        div_val=model_config["div_val"],
        tie_projections=tuple(bool(tied) for tied in model_config["tie_projs"]),
        mem_len=model_config["mem_len"],
        clamp_len=_none_unless_positive(model_config["clamp_len"]),
        same_length=model_config["same_length"],
        same_length_rule=_SAME_LENGTH_RULE[lineage],
    )


def map_parameters(state: Mapping[str, Array], config: ModelConfig) -> dict[str, Array]:
    """Translate a state dict of either lineage. Every entry must be used, or be the equal copy of a tied one; else `ValueError`."""
    left = dict(state)
    parameters: dict[str, Array] = {}
    ends = config.cluster_ends
    clusters = range(config.n_cluster + 1)
    is_2019 = "crit.out_layers.0.bias" in left

    def take_clusters(name: str) -> list[Array]:
        """Take the tensors of all clusters; with equal widths they are one tensor, cut here."""
        if config.div_val > 1:
            return [left.pop(name.format(i)) for i in clusters]
        whole = left.pop(name.format(0))
        return [whole[ends[i] : ends[i + 1]] for i in clusters]

    def drop_copy(name: str, original: Array) -> None:
        copy = left.pop(name, None)
        if copy is not None and not np.array_equal(copy, original):
            raise ValueError(f"{name} should be tied, but differs from the tensor it is tied to")

    embeddings = take_clusters("word_emb.emb_layers.{}.weight")
    for i in clusters:
        parameters[f"embedding.weights.{i}"] = embeddings[i]
    output_weight, output_bias = (
        ("crit.out_layers.{}.weight", "crit.out_layers.{}.bias") if is_2019 else ("crit.out_layers_weights.{}", "crit.out_layers_biases.{}")
    )
    if config.tie_weights:
        for i in clusters:
            drop_copy(output_weight.format(i), embeddings[i] if config.div_val > 1 else np.concatenate(embeddings))
    else:
        for i, weight in enumerate(take_clusters(output_weight)):
            parameters[f"head.weights.{i}"] = weight
    for i, bias in enumerate(take_clusters(output_bias)):
        parameters[f"head.biases.{i}"] = bias

    if config.div_val > 1 or config.embed_size != config.d_model:
        for i in clusters if config.div_val > 1 else (0,):
            parameters[f"embedding.projections.{i}"] = left.pop(f"word_emb.emb_projs.{i}")
        for i in clusters:
            shared = parameters[f"embedding.projections.{i if config.div_val > 1 else 0}"]
            drop_copy(f"crit.shared_out_projs.{i}", shared)
            if config.projection_is_tied(i):
                drop_copy(f"crit.out_projs.{i}", shared)
            else:
                parameters[f"head.projections.{i}"] = left.pop(f"crit.out_projs.{i}")

    if config.n_cluster:  # tail cluster i reads column -i there, column shortlist + i - 1 here
        parameters["head.cluster_weight"] = left.pop("crit.cluster_weight")[::-1].copy()
        parameters["head.cluster_bias"] = left.pop("crit.cluster_bias")[::-1].copy()
    parameters["content_bias"] = left.pop("r_w_bias")
    parameters["position_bias"] = left.pop("r_r_bias")
    for layer in range(config.n_layer):
        for theirs, ours in _LAYER_NAMES.items():
            parameters[f"layers.{layer}.{ours}"] = left.pop(f"layers.{layer}.{theirs}")
    left.pop("pos_emb.inv_freq", None)  # computed, not learned
    if left:
        raise ValueError(f"entries of the state dict that nothing uses: {sorted(left)}")
    return parameters


_SAME_LENGTH_RULE: dict[Lineage, Literal["mem_len+1", "mem_len"]] = {"2019": "mem_len", "2023": "mem_len+1"}

_LAYER_NAMES = {
    "dec_attn.qkv_net.weight": "attention.qkv.weight",
    "dec_attn.r_net.weight": "attention.position.weight",
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


# The file format of torch.save


class _Inert:
    """Stands for a class of theirs: keeps the attributes it is given and does nothing."""


def _rebuild_tensor(storage: Array, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Array:
    strides = [step * storage.itemsize for step in stride]
    return np.array(np.lib.stride_tricks.as_strided(storage[offset:], shape=size, strides=strides))


_ALLOWED: dict[tuple[str, str], type | np.dtype[Any] | Callable[..., Any]] = {
    ("argparse", "Namespace"): _Inert,
    ("utils.vocabulary", "Vocab"): _Inert,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "LongStorage"): np.dtype("<i8"),
    ("torch", "ByteStorage"): np.dtype("u1"),
}


class _Unpickler(pickle.Unpickler):
    """Builds plain containers, inert objects and arrays; refuses everything else by name."""

    def __init__(self, pickled: bytes, read_storage: Callable[[str], bytes]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._read_storage = functools.cache(read_storage)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is not among the classes known to be harmless")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Array:
        kind, dtype, key, _device, n_values = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"the file refers to a {kind}, not to a storage")
        return np.frombuffer(self._read_storage(key), dtype=dtype, count=n_values)


def read_torch_zip(path: Path) -> Any:
    """Read what `torch.save` wrote in its zip format, tensors as arrays; runs nothing that the file names."""
    with zipfile.ZipFile(path) as archive:
        (pickle_name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = pickle_name.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError(f"{path} holds big-endian numbers")
        return _Unpickler(archive.read(pickle_name), lambda key: archive.read(f"{folder}data/{key}")).load()


# Text and the order it is evaluated in


def encode_text(text: str, symbols: Sequence[str], dataset: str) -> Ids:
    """Return the ids of a text, [N]: words between white space; for wt103 every line, also an empty one, ends with <eos>.

    An unknown word is a `KeyError`, as in the reference it is an error.
    """
    id_of = {symbol: i for i, symbol in enumerate(symbols)}
    if dataset == "wt103":
        lines = text.split("\n")
        if lines[-1] == "":
            lines.pop()  # what follows the last line break is no line
        return np.array([id_of[word] for line in lines for word in [*line.split(), "<eos>"]], dtype=np.int64)
    if dataset == "text8":
        return np.array([id_of[token] for token in text.lower().split()], dtype=np.int64)
    raise ValueError(f"no rule for the data set {dataset!r}")


def encode_split(case: ReferenceCase, symbols: Sequence[str]) -> Ids:
    """Return the ids a case is evaluated on, [N]: its split of its corpus, or its manual text."""
    if case.manual_ids is not None:
        return np.array(case.manual_ids, dtype=np.int64)
    return encode_text((case.data / f"{case.split}.txt").read_text(encoding="utf-8"), symbols, case.dataset)


def nvidia_segments(
    ids: Ids, batch_size: int, tgt_len: int, mem_len: int, lineage: Lineage, *, max_size: int | None = None, warm_up: bool = True
) -> Iterator[tuple[Ids, Ids, bool]]:
    """Yield (input_ids_BT, target_ids_BT, counted) in the reference's evaluation order.

    The text is cut into `batch_size` contiguous columns and the rest is dropped; the last segment may be shorter. In 2023, with a memory
    and with `warm_up` (manual text has none), whole segments that fill the memory come first: the end of the previous column, for
    the first column that of the last one. They are not counted, but `max_size` segments in all include them.
    """
    rows = len(ids) // batch_size
    ids_RB = ids[: rows * batch_size].reshape(batch_size, rows).T
    warm_rows = 0
    if lineage == "2023" and warm_up and mem_len > 0:
        warm_rows = -(-mem_len // tgt_len) * tgt_len
        # where a column is shorter than that, fewer rows come, yet `warm_rows` of all are not counted: kept as the reference has it
        before_RB = np.roll(ids_RB, shift=(warm_rows, 1), axis=(0, 1))[:warm_rows]
        ids_RB = np.concatenate([before_RB, ids_RB])
    for index, start in enumerate(range(0, len(ids_RB) - 1, tgt_len)):
        if max_size is not None and index >= max_size:
            return
        end = min(start + tgt_len, len(ids_RB) - 1)
        yield ids_RB[start:end].T.copy(), ids_RB[start + 1 : end + 1].T.copy(), start >= warm_rows


# Recorded results


@dataclass(frozen=True, kw_only=True)
class ReferenceCase:
    """One evaluation by the reference: its settings and what came out. Lengths in tokens, loss in nats per token."""

    id: str
    lineage: Lineage
    checkpoint: Path
    data: Path
    dataset: str
    split: str
    type: str
    batch_size: int
    tgt_len: int
    mem_len: int
    ext_len: int
    clamp_len: int | None
    same_length: bool
    max_size: int | None
    repeat: int
    world_size: int
    """Number of ranks. With several, each reads its part of the columns, and the loss is the plain mean of theirs."""
    manual: tuple[str, ...] | None
    manual_ids: tuple[int, ...] | None
    expected_loss_nats: float | None
    """None where the reference ended with an error."""
    tokens_scored: int | None
    rows_scored: int | None
    segments: int | None

    def model_config(self, checkpoint_config: ModelConfig) -> ModelConfig:
        """Return a checkpoint's config with the lengths and the mask of this evaluation, which replace those of training."""
        return dataclasses.replace(
            checkpoint_config,
            mem_len=self.mem_len,
            clamp_len=self.clamp_len,
            same_length=self.same_length,
            same_length_rule=_SAME_LENGTH_RULE[self.lineage],
        )

    def evaluation_segments(self, ids: Ids) -> Iterator[tuple[Ids, Ids, bool]]:
        """Yield the segments of one pass over `ids` in the reference's order; see `nvidia_segments`."""
        return nvidia_segments(
            ids, self.batch_size, self.tgt_len, self.mem_len, self.lineage, max_size=self.max_size, warm_up=self.manual_ids is None
        )


def read_cases(root: Path) -> list[ReferenceCase]:
    """Return all evaluations recorded in `root`/expected.json; paths are under `root`."""
    entries = json.loads((root / "expected.json").read_text(encoding="utf-8"))["cases"]
    return [_case(root, entry) for entry in entries]


def _case(root: Path, entry: dict[str, Any]) -> ReferenceCase:
    return ReferenceCase(
        id=entry["id"],
        lineage=entry["lineage"],
        checkpoint=root / entry["checkpoint"],
        data=root / entry["data"],
        dataset=entry["dataset"],
        split=entry["split"],
        type=entry["type"],
        batch_size=entry["batch_size"],
        tgt_len=entry["tgt_len"],
        mem_len=entry["mem_len"],
        ext_len=entry["ext_len"],
        clamp_len=_none_unless_positive(entry["clamp_len"]),
        same_length=entry["same_length"],
        max_size=entry["max_size"],
        repeat=entry["repeat"],
        world_size=entry["world_size"],
        manual=tuple(entry["manual"]) if "manual" in entry else None,
        manual_ids=tuple(entry["manual_ids"]) if "manual_ids" in entry else None,
        expected_loss_nats=entry.get("expected_loss_nats"),
        tokens_scored=entry.get("tokens_scored"),
        rows_scored=entry.get("rows_scored"),
        segments=entry.get("segments"),
    )


def _none_unless_positive(length: int) -> int | None:
    """Translate a limit: the reference writes "none" as 0 or -1."""
    return length if length > 0 else None
