"""From a file or folder of another family to a checkpoint of ours, with the evidence that it is the same model.

Knows in which order things happen: find out what the source is, read it, map its weights, find its vocabulary, score a text. Each step
stands in a module of its own; writing the result is left to the caller.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from txl_train.checkpoint import Checkpoint
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import check_folder, get_dataset
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import CheckpointError, DataError, EnvironmentUnfitError, UsageError
from txl_train.files import file_sha256, finite
from txl_train.interop.foreign import ATTENTION, Family, Foreign
from txl_train.interop.huggingface import is_huggingface, open_huggingface, vocabulary_file
from txl_train.interop.identity import Identity, built_in_text, prove
from txl_train.interop.kimiyoung import NAMES as KIMIYOUNG_NAMES
from txl_train.interop.kimiyoung import is_kimiyoung, read_kimiyoung
from txl_train.interop.nvidia import NAMES as NVIDIA_NAMES
from txl_train.interop.nvidia import is_nvidia, read_nvidia
from txl_train.interop.tensors import StoredTensor
from txl_train.interop.torch_files import TORCH, open_torch
from txl_train.interop.vocabularies import count_symbols, fit_symbols, make_vocabulary, read_symbols, resolve_dataset
from txl_train.interop.weights import map_weights

log = logging.getLogger(__name__)

Format = Literal["auto", "nvidia", "kimiyoung", "huggingface"]

_FAMILIES: dict[Format, str] = {
    "nvidia": "NVIDIA's checkpoint",
    "kimiyoung": "the authors' pickled module",
    "huggingface": "Hugging Face's folder",
}


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What to import, and what its files may not say themselves."""

    source: Path
    """A checkpoint, or a folder of Hugging Face's or of the authors'."""
    format: Format = "auto"
    vocabulary: Path | None = None
    """A file of tokens, which takes precedence over what the source holds."""
    dataset: str | None = None
    """Name of the data set; None means the recorded one, or what the tokens look like."""
    data: Path | None = None
    """Folder of its text: kept for evaluations, and counted for the vocabulary where nothing else has it."""
    reverse_clusters: bool = False
    """The file holds its tail clusters in the other order than its family does."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A checkpoint of ours, and how it came to be."""

    checkpoint: Checkpoint
    identity: Identity
    notes: tuple[str, ...]
    """What a user should know: sentences."""


def import_checkpoint(request: ImportRequest) -> Imported:
    """Read a model of another family.

    Raises:
        UsageError: there is no such source, or its vocabulary or data set is neither in it nor given.
        CheckpointError: it is refused, damaged, or not what its configuration says; none of its code is run.
        DataError: the folder of text is not what its data set says.
    """
    log.info("reading %s", request.source)
    with _open(request) as foreign:
        symbols, origin = _symbols(request, foreign)
        dataset = resolve_dataset(request.dataset, foreign.dataset, symbols)
        symbols, note = fit_symbols(symbols, foreign.vocab_size, origin)
        vocabulary = make_vocabulary(foreign.with_empty_clusters(symbols), dataset, origin)
        folder = _data_folder(request.data, foreign.data, dataset)
        reversed_here = foreign.clusters_reversed != request.reverse_clusters
        weights = map_weights(
            str(request.source), foreign.tensors, foreign.config, clusters_reversed=reversed_here, n_empty=foreign.n_empty
        )
    identity = _prove(foreign, weights, vocabulary, dataset, folder)
    notes = tuple(text for text in (*foreign.notes, _attention_note(foreign), _cluster_note(foreign), note, _dropped(foreign)) if text)
    record = {
        "family": foreign.family,
        "lineage": foreign.lineage,
        "form": foreign.form,
        "source": str(request.source.resolve()),
        "sha256": {path.name: file_sha256(path) for path in _files(request.source)},
        "vocabulary_from": origin,
        "clusters_reversed_in_file": reversed_here and foreign.config.n_cluster > 1,
        "identity": finite(identity.to_dict()),
        "notes": list(notes),
        "arguments": foreign.arguments,
    }
    train = {"tgt_len": foreign.tgt_len, "eval_tgt_len": foreign.eval_tgt_len or foreign.tgt_len}
    settings = {"data": {"dataset": dataset}, "train": {name: value for name, value in train.items() if value}}
    checkpoint = Checkpoint(
        model_config=foreign.config,
        model=weights,
        vocabulary=vocabulary,
        dataset=dataset,
        run={"settings": settings, "imported": record, **({"data_folder": str(folder)} if folder is not None else {})},
        progress=foreign.progress or {"step": 0},
    )
    return Imported(checkpoint=checkpoint, identity=identity, notes=notes)


@contextlib.contextmanager
def _open(request: ImportRequest) -> Iterator[Foreign]:
    """Yield what the source holds, whose tensors can be read until the block ends."""
    source, wanted = request.source, request.format
    if not source.exists():
        raise UsageError(f"There is no {source}.", remedy="Give a checkpoint, or the folder of a Hugging Face model.")
    if wanted == "huggingface" or (wanted == "auto" and is_huggingface(source)):
        with open_huggingface(source) as foreign:
            yield foreign
        return
    path = _file_of(source)
    with open_torch(path, {**TORCH, **NVIDIA_NAMES, **KIMIYOUNG_NAMES}) as value:
        found: Family | None = "nvidia" if is_nvidia(value) else "kimiyoung" if is_kimiyoung(value) else None
        if found is None:
            raise _not_a_model(path, value)
        if wanted not in ("auto", found):
            raise UsageError(f"{path} is {_FAMILIES[found]}, not {_FAMILIES[wanted]}.", remedy=f"Use `--from {found}`, or leave it out.")
        yield read_nvidia(path, value) if found == "nvidia" else read_kimiyoung(path, value)


def _file_of(source: Path) -> Path:
    if not source.is_dir():
        return source
    if (source / "model.pt").is_file():
        return source / "model.pt"
    candidates = sorted(path.name for path in source.glob("*.pt"))
    raise UsageError(
        f"{source} is a folder without config.json (Hugging Face) or model.pt (the authors).",
        remedy=f"Name a file: {', '.join(candidates[:5])}." if candidates else "Give a checkpoint.",
    )


def _not_a_model(path: Path, value: object) -> CheckpointError:
    if isinstance(value, dict) and value.get("format") == "txl-checkpoint":
        return CheckpointError(f"{path} is a checkpoint of txl already.", remedy="Use it as it is: `txl eval --checkpoint`.")
    if isinstance(value, dict) and value and all(isinstance(tensor, StoredTensor) for tensor in value.values()):
        return CheckpointError(
            f"{path} holds named tensors alone, without a configuration.",
            remedy="If it is Hugging Face's, put its config.json beside it and give the folder.",
        )
    return CheckpointError(
        f"{path} is neither NVIDIA's checkpoint nor the authors' model.",
        remedy="NVIDIA's is checkpoint_best.pt or checkpoint_last.pt; the authors' is model.pt (their optimizer.pt holds no model).",
    )


def _files(source: Path) -> list[Path]:
    if is_huggingface(source):
        folder = source if source.is_dir() else source.parent
        vocabulary = vocabulary_file(source)
        names = ("config.json", "model.safetensors", "pytorch_model.bin")
        return [path for path in (*(folder / name for name in names), *([vocabulary] if vocabulary else [])) if path.is_file()]
    return [_file_of(source)]


def _symbols(request: ImportRequest, foreign: Foreign) -> tuple[tuple[str, ...], str]:
    """Return the tokens, and where they come from."""
    if request.vocabulary is not None:
        return read_symbols(request.vocabulary), str(request.vocabulary)
    if foreign.symbols is not None:
        return foreign.symbols, str(request.source)
    beside = vocabulary_file(request.source) if foreign.family == "huggingface" else None
    if beside is not None:
        return read_symbols(beside), str(beside)
    if request.data is not None and request.dataset is not None:
        return count_symbols(request.data, request.dataset), str(request.data)
    raise UsageError(
        f"{request.source} holds no vocabulary, so its numbers cannot be made into tokens.",
        remedy="Give a file of its tokens with `--vocab FILE` (one a line, a vocab.pkl, or the cache.pt beside its data), "
        "or the text it was trained on with `--data DIR --dataset NAME`, to be counted as the original does.",
    )


def _data_folder(given: Path | None, recorded: str | None, dataset: str) -> Path | None:
    """Return the folder of the text: the given one, which must be right, or the recorded one, if it is there."""
    spec = get_dataset(dataset)
    if given is not None:
        check_folder(given, spec, [])
        return given.resolve()
    if recorded:
        with contextlib.suppress(DataError):
            check_folder(Path(recorded), spec)
            return Path(recorded).resolve()
    return None


def _prove(foreign: Foreign, weights: dict[str, Any], vocabulary: Vocabulary, dataset: str, folder: Path | None) -> Identity:
    """Judge by built-in text; where that leaves it open and the model's own text is there, by that."""
    spec = get_dataset(dataset)
    try:
        ids, n_unknown = built_in_text(spec, vocabulary)
    except EnvironmentUnfitError as error:  # what makes tokens of text is not installed
        return Identity(verdict="undecided", reason=error.message, text="built-in", n_tokens=0, n_unknown=0)
    log.info("scoring text, to see that it is the same model")
    identity = prove(foreign.config, weights, ids, text="built-in", n_unknown=n_unknown)
    if identity.verdict == "undecided" and folder is not None:
        with contextlib.suppress(DataError):
            corpus = load_corpus(folder, spec, vocabulary=vocabulary)
            own_ids = corpus.ids("valid").astype("int64")
            path = str(folder / spec.files["valid"])
            own = prove(foreign.config, weights, own_ids, text=path, n_unknown=corpus.oov("valid"))
            identity = identity if own.verdict == "undecided" else own
    return identity


def _attention_note(foreign: Foreign) -> str | None:
    """The originals add absolute positions to the memory in place, once for every segment it is kept."""
    kind = foreign.config.attn_type
    if kind not in ("sinusoidal", "learned"):
        return None
    queries = " and with pre_lnorm they leave queries as they are," if foreign.config.pre_lnorm else ""
    return (
        f"Attention of the kind {kind} (attn_type {ATTENTION.index(kind)}) is computed wrongly by the original programs: tokens in the "
        f"memory collect a new position with every segment,{queries} so a perplexity here differs from theirs."
    )


def _cluster_note(foreign: Foreign) -> str | None:
    if not foreign.n_empty:
        return None
    return (
        f"{foreign.n_empty} of its tail clusters have no words, since the cutoffs reach beyond the vocabulary, but take a share of the "
        "softmax all the same. As in the original, nothing was done about that: they are words here that no text has (<empty-cluster-…>)."
    )


def _dropped(foreign: Foreign) -> str | None:
    if not foreign.dropped:
        return None
    *others, last = foreign.dropped
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"Not imported: {listed}. Training can begin with these weights, but not go on where it was."


def describe(imported: Imported) -> dict[str, Any]:
    """Return what was imported as plain values: the document of `txl import --json`, but for where it was written."""
    checkpoint, record = imported.checkpoint, imported.checkpoint.run["imported"]
    config = checkpoint.model_config
    return {
        **{name: record[name] for name in ("source", "family", "lineage", "form", "sha256")},
        "parameters": sum(weight.numel() for weight in checkpoint.model.values()),
        "vocabulary": {
            "tokens": len(checkpoint.vocabulary),
            "unit": checkpoint.vocabulary.unit,
            "sha256": checkpoint.vocabulary.sha256,
            "from": record["vocabulary_from"],
        },
        "dataset": checkpoint.dataset,
        "data": checkpoint.data_folder,
        "model": {
            **{name: getattr(config, name) for name in ("n_layer", "n_head", "d_head", "d_model", "d_inner", "attn_type", "div_val")},
            "d_embed": config.embed_size,
            "cutoffs": list(config.cutoffs),
            **{name: getattr(config, name) for name in ("tie_weights", "untie_biases", "pre_lnorm")},
            **{name: getattr(config, name) for name in ("mem_len", "ext_len", "clamp_len", "same_length", "same_length_rule")},
        },
        "eval_tgt_len": checkpoint.eval_tgt_len,
        "progress": checkpoint.progress,
        "clusters_reversed_in_file": record["clusters_reversed_in_file"],
        "identity": record["identity"],
        "notes": record["notes"],
    }
