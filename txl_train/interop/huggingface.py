"""Reads Hugging Face's TransfoXL: a folder with config.json, the weights (model.safetensors or pytorch_model.bin) and the vocabulary.

Model `TransfoXLLMHeadModel` of transformers up to 4.35. What its files leave out is what its code then assumes: tied word embeddings,
biases per layer. Its vocabulary file is a pickle, in its newer form with objects of other packages, which become inert ones here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from txl_train.errors import CheckpointError, UsageError
from txl_train.interop.foreign import Foreign, Values, make_config, plain_values
from txl_train.interop.pickles import Names, inert, printable
from txl_train.interop.safetensors import read_safetensors
from txl_train.interop.tensors import StoredTensor
from txl_train.interop.torch_files import TORCH, open_torch

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
VOCABULARIES = ("vocab.pkl", "vocab.bin", "vocab.txt")
"""Names of the vocabulary's file, the newest first."""

VOCABULARY_NAMES: Names = inert(
    "re._compile",
    "sacremoses.normalize.MosesPunctNormalizer",
    "sacremoses.tokenize.MosesTokenizer",
    "sacremoses.tokenize.MosesDetokenizer",
    "tokenizers.AddedToken",
    "transformers.tokenization_utils.Trie",
    "transformers.tokenization_utils_base.AddedToken",
)
"""What a vocab.pkl names: the tokenizer's tools, none of which is needed to know the tokens."""

LARGEST_CONFIG_BYTES = 1 << 24
_PREFIX = "transformer."
_EPSILON = 1e-5


def is_huggingface(path: Path) -> bool:
    """True if this is a folder with a config.json, or its weights."""
    folder = path if path.is_dir() else path.parent
    return (folder / CONFIG).is_file() and (path.is_dir() or path.name in (SAFETENSORS, BIN, CONFIG))


@contextlib.contextmanager
def open_huggingface(path: Path) -> Iterator[Foreign]:
    """Yield the model of a folder (or of the folder that a named file is in); its tensors can be read until the block ends.

    Raises:
        UsageError: the folder lacks a file.
        CheckpointError: a file is damaged, refused, or describes another model.
    """
    folder = path if path.is_dir() else path.parent
    config = _read_config(folder / CONFIG)
    chosen = (
        path.name if path.name in (SAFETENSORS, BIN) else next((name for name in (SAFETENSORS, BIN) if (folder / name).is_file()), None)
    )
    if chosen is None:
        raise UsageError(f"{folder} has neither {SAFETENSORS} nor {BIN}.", remedy=_remedy_for_weights(folder))
    if chosen == SAFETENSORS:
        yield _foreign(folder, config, read_safetensors(folder / chosen), "safetensors")
    else:
        with open_torch(folder / chosen, TORCH) as state:
            if not isinstance(state, dict) or not all(isinstance(tensor, StoredTensor) for tensor in state.values()):
                raise CheckpointError(f"{folder / chosen} holds something else than named tensors.")
            yield _foreign(folder, config, state, BIN)


def vocabulary_file(path: Path) -> Path | None:
    """Return the vocabulary's file in the folder of a model, or None."""
    folder = path if path.is_dir() else path.parent
    return next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)


def _remedy_for_weights(folder: Path) -> str:
    if any((folder / f"{name}.index.json").is_file() for name in (SAFETENSORS, BIN)):
        return "Its weights are cut into several files: save them again with `save_pretrained(folder, max_shard_size='100GB')`."
    if any(folder.glob("*.h5")) or any(folder.glob("*.ckpt*")):
        return "TensorFlow's weights are not read here: load them with `from_tf=True` and save them again with `save_pretrained`."
    return "Give the folder that `save_pretrained` wrote."


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(
            f"{path.parent} has no {CONFIG}, so it is no model of Hugging Face.", remedy="Give the folder of `save_pretrained`."
        )
    if path.stat().st_size > LARGEST_CONFIG_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, as no configuration has.")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no table of settings.")
    if config.get("model_type", "transfo-xl") != "transfo-xl":
        raise CheckpointError(f"{path} describes a model of the type {str(config['model_type'])[:60]!r}; only `transfo-xl` is read here.")
    return config


def _foreign(folder: Path, settings: dict[str, Any], state: dict[str, StoredTensor], form: str) -> Foreign:
    where = str(folder)
    values = Values(settings, f"{folder / CONFIG}")
    tensors = {}
    for name, tensor in state.items():
        short = str(name).removeprefix(_PREFIX)
        if short in tensors:
            raise CheckpointError(f"{where} holds `{printable(short)}` both with and without the prefix `{_PREFIX}`.")
        tensors[short] = tensor
    if not any(name.startswith("crit.") for name in tensors):
        raise CheckpointError(f"{where} has no output layers (`crit.…`): it is a model without a language model's head.")
    if values.integer("attn_type", high=3, default=0) != 0:
        raise CheckpointError(f"{where} has an attn_type other than 0, which Hugging Face's own code does not run.")
    epsilon = settings.get("layer_norm_epsilon", _EPSILON)
    if epsilon != _EPSILON:
        raise CheckpointError(f"{where} normalises with an epsilon of {epsilon!r:.40}; here it is {_EPSILON}.")
    size = values.integer("vocab_size", low=1, default=settings.get("n_token") if type(settings.get("n_token")) is int else None)
    cutoffs = values.integers("cutoffs")
    d_model = values.integer("d_model", low=1)
    ties = values.flags("tie_projs") if settings.get("tie_projs") is not None else _default_ties(values, len(cutoffs))
    config, n_empty = make_config(
        where,
        vocab_size=size,
        n_layer=values.integer("n_layer", low=1),
        n_head=values.integer("n_head", low=1),
        d_head=values.integer("d_head", low=1),
        d_model=d_model,
        d_embed=values.integer("d_embed", low=1, default=d_model),
        d_inner=values.integer("d_inner", low=1),
        dropout=values.share("dropout", default=0.1),
        dropatt=values.share("dropatt", default=0.0),
        pre_lnorm=values.flag("pre_lnorm", default=False),
        tie_weights=values.flag("tie_word_embeddings", default=values.flag("tie_weight", default=True)),
        cutoffs=cutoffs,
        div_val=values.integer("div_val", low=1),
        tie_projections=ties,
        untie_biases=values.flag("untie_r", default=True),
        mem_len=values.length("mem_len"),
        clamp_len=values.optional_length("clamp_len"),
        same_length=values.flag("same_length"),
        same_length_rule="mem_len",
    )
    return Foreign(
        family="huggingface",
        lineage="huggingface",
        form=f"Hugging Face's TransfoXL, {form}",
        config=config,
        n_empty=n_empty,
        tensors=tensors,
        clusters_reversed=False,
        symbols=None,
        dataset=None,
        tgt_len=values.optional_length("tgt_len"),
        arguments=plain_values(settings),
        notes=(
            "Hugging Face's own cold start reads a memory of zeros as if it were text; here an unfilled memory is not seen, "
            "so the first mem_len tokens score differently than there.",
        ),
    )


def _default_ties(values: Values, n_cluster: int) -> tuple[bool, ...]:
    return (False, *[values.flag("proj_share_all_but_first", default=True)] * n_cluster)
