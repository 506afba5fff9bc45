"""Reads what the authors' program saves: the whole module, pickled by `torch.save(model)`.

Repository kimiyoung/transformer-xl, folder pytorch. No class of theirs is needed or run: modules become inert objects, of which the
weights are collected by their place, as a state dict names them. The configuration is what the modules remember (sizes, lengths,
dropout) and what their shapes say; which weights are tied follows from which are the same numbers in the same place. The
vocabulary is not in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from txl_train.errors import CheckpointError
from txl_train.interop.foreign import ATTENTION, Foreign, Values, attributes, make_config
from txl_train.interop.pickles import Inert, Names, inert
from txl_train.interop.tensors import StoredTensor

_MODULES = (
    "MemTransformerLM",
    "AdaptiveEmbedding",
    "PositionalEmbedding",
    "PositionwiseFF",
    "DecoderLayer",
    "RelLearnableDecoderLayer",
    "RelPartialLearnableDecoderLayer",
    "MultiHeadAttn",
    "RelLearnableMultiHeadAttn",
    "RelPartialLearnableMultiHeadAttn",
)
_TORCH_MODULES = (
    "linear.Linear",
    "dropout.Dropout",
    "normalization.LayerNorm",
    "sparse.Embedding",
    "activation.ReLU",
    "container.Sequential",
    "container.ModuleList",
    "container.ParameterList",
)

NAMES: Names = inert(
    *(f"mem_transformer.{name}" for name in _MODULES),
    *(f"{package}proj_adaptive_softmax.ProjectedAdaptiveLogSoftmax" for package in ("", "utils.")),
    *(f"{package}log_uniform_sampler.LogUniformSampler" for package in ("", "utils.")),
    *(f"torch.nn.modules.{name}" for name in _TORCH_MODULES),
    "torch.nn.backends.thnn._get_thnn_function_backend",  # modules named their backend until PyTorch 1.4
)
"""What its files name besides tensors and plain values."""

_DEEPEST_MODULE = 8


def is_kimiyoung(value: Any) -> bool:
    """True if this is what the authors' program saves."""
    return isinstance(value, Inert) and value.class_name == "MemTransformerLM"


def read_kimiyoung(path: Path, value: Inert) -> Foreign:
    """Return the model. Raises `CheckpointError` where something is missing or not understood."""
    where = str(path)
    model = Values(value.attributes, where)
    if model.integer("sample_softmax", low=-1, default=-1) > 0:
        raise CheckpointError(f"{where} was trained with a sampled softmax, which the authors' program itself cannot evaluate.")
    tensors = dict(_collect(value, "", where, set()))
    embedding = Values(attributes(_part(value, "word_emb", where), ("AdaptiveEmbedding",), f"{where}: word_emb"), f"{where}: word_emb")
    layers = list(_modules(_part(value, "layers", where)).values())
    n_layer = model.integer("n_layer", low=1)
    if len(layers) != n_layer:
        raise CheckpointError(f"{where} says that it has {n_layer} layers, but holds {len(layers)}.")
    attention = _part(layers[0], "dec_attn", where)
    inner = tensors.get("layers.0.pos_ff.CoreNet.0.weight")
    if inner is None or len(inner.shape) != 2:
        raise CheckpointError(f"{where} has no feed-forward weights in its first layer.")
    vocab_size, div_val = model.integer("n_token", low=1), embedding.integer("div_val", low=1)
    d_embed, d_model = model.integer("d_embed", low=1), model.integer("d_model", low=1)
    cutoffs = embedding.integers("cutoffs")
    if not cutoffs or cutoffs[-1] != vocab_size:
        raise CheckpointError(f"{where}: the last of its cutoffs {list(cutoffs)} is not its vocabulary's size {vocab_size}.")
    attn_type = model.integer("attn_type", high=3)
    lengths = {name: model.length(name, default=0) for name in ("tgt_len", "ext_len", "mem_len")}
    config, n_empty = make_config(
        where,
        vocab_size=vocab_size,
        n_layer=n_layer,
        n_head=model.integer("n_head", low=1),
        d_head=model.integer("d_head", low=1),
        d_model=d_model,
        d_embed=d_embed,
        d_inner=inner.shape[0],
        dropout=Values(_part(value, "drop", where).attributes, f"{where}: drop").share("p"),
        dropatt=Values(_part(attention, "dropatt", where).attributes, f"{where}: dropatt").share("p"),
        attn_type=ATTENTION[attn_type],
        position_rows=_rows(tensors, where) if attn_type in (1, 3) else 0,
        pre_lnorm=Values(attention.attributes, f"{where}: dec_attn").flag("pre_lnorm", default=False),
        tie_weights=_tied_weights(tensors, len(cutoffs) if div_val > 1 else 1, where),
        cutoffs=cutoffs[:-1],
        div_val=div_val,
        tie_projections=tuple(_is_tied_projection(tensors, i, div_val) for i in range(len(cutoffs))),
        mem_len=lengths["mem_len"],
        ext_len=lengths["ext_len"],
        clamp_len=model.optional_length("clamp_len"),
        same_length=model.flag("same_length"),
        same_length_rule="mem_len",
    )
    return Foreign(
        family="kimiyoung",
        lineage="kimiyoung",
        form="the authors' pickled module",
        config=config,
        n_empty=n_empty,
        tensors=tensors,
        clusters_reversed=True,
        symbols=None,
        dataset=None,
        tgt_len=lengths["tgt_len"] or None,
    )


def _modules(module: Inert) -> dict[str, Inert]:
    found = module.attributes.get("_modules")
    if not isinstance(found, dict):
        return {}
    return {name: part for name, part in found.items() if isinstance(name, str) and isinstance(part, Inert)}


def _part(module: Inert, name: str, where: str) -> Inert:
    part = _modules(module).get(name)
    if part is None:
        raise CheckpointError(f"{where}: its {module.class_name} has no part `{name}`, so it is no Transformer-XL of the authors.")
    return part


def _collect(module: Inert, prefix: str, where: str, seen: set[int]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield every parameter and buffer with the name that a state dict gives it; a tied one under each of its names."""
    if id(module) in seen or prefix.count(".") > _DEEPEST_MODULE:
        raise CheckpointError(f"{where}: its module `{prefix[:60]}` is part of itself, or is there twice.")
    seen.add(id(module))
    for kind in ("_parameters", "_buffers"):
        own = module.attributes.get(kind, {})
        if not isinstance(own, dict):
            raise CheckpointError(f"{where}: the {kind} of `{prefix}` are no table.")
        for name, tensor in own.items():
            if isinstance(tensor, StoredTensor) and isinstance(name, str):
                yield f"{prefix}{name}", tensor
            elif tensor is not None:
                raise CheckpointError(f"{where}: `{prefix}{name}` is something else than a tensor.")
    for name, part in _modules(module).items():
        yield from _collect(part, f"{prefix}{name}.", where, seen)


def _same(tensors: dict[str, StoredTensor], one: str, other: str) -> bool:
    return one in tensors and other in tensors and tensors[one].identity == tensors[other].identity


def _tied_weights(tensors: dict[str, StoredTensor], n_tables: int, where: str) -> bool:
    tied = {_same(tensors, f"word_emb.emb_layers.{i}.weight", f"crit.out_layers.{i}.weight") for i in range(n_tables)}
    if len(tied) != 1:
        raise CheckpointError(f"{where}: the output weights of some clusters are the embedding's and those of others are not.")
    return tied.pop()


def _is_tied_projection(tensors: dict[str, StoredTensor], cluster: int, div_val: int) -> bool:
    return _same(tensors, f"word_emb.emb_projs.{cluster if div_val > 1 else 0}", f"crit.out_projs.{cluster}")


def _rows(tensors: dict[str, StoredTensor], where: str) -> int:
    embeddings = tensors.get("r_emb")
    if embeddings is None or len(embeddings.shape) != 4:
        raise CheckpointError(f"{where} has no table `r_emb` of learned positions.")
    return embeddings.shape[1]
