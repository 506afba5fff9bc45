"""Every reader of files that may come from strangers, with valid files to begin from."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.deploy.bench.samples import result_of, rows_of
from tests.deploy.test_manifest import MANIFEST
from tests.deploy.test_receipt import receipt
from tests.fuzz.artifacts import ARTIFACTS, CONFIG, ONNX, document_mended, export, open_onnx
from tests.fuzz.harness import Target
from tests.reference.naive_txl import random_parameters
from tests.support import write_checkpoint
from tests.train.interop.foreign_files import write_huggingface, write_kimiyoung, write_nvidia, write_vocab_pkl
from txl_deploy.bench.result import BenchResult
from txl_deploy.manifest import verify, write_manifest
from txl_deploy.receipt import Receipt
from txl_train.checkpoint import load_model
from txl_train.data import idcache
from txl_train.data.archives import members
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.prepare import prepare
from txl_train.data.prepared import read_info
from txl_train.data.vocabulary import Vocabulary
from txl_train.interop.importer import ImportRequest, import_checkpoint
from txl_train.interop.safetensors import read_safetensors
from txl_train.interop.vocabularies import read_symbols
from txl_train.settings import resolve

_PICKLE = (
    b"\x80\x02",
    b"c__builtin__\neval\n",
    b"cos\nsystem\n",
    b"cposix\nsystem\n",
    b"csubprocess\nPopen\n",
    b"(",
    b"t",
    b"R",
    b"Q",
    b"q\x00",
)
_PICKLE += (
    b"h\x00",
    b"\x8c\x04eval",
    b"\x93",
    b"o",
    b"b",
    b".",
    b"0",
    b"2",
    b"}",
    b"]",
    b"a",
    b"u",
    b"s",
    b"\x8a\x08" + b"\xff" * 8,
    b"X\xff\xff\xff\x7f",
)
_PICKLE += (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"\x81", b"\x92", b"\x94", b"B\xff\xff\xff\xff")
_YAML = (
    b"&a",
    b"*a",
    b"!!python/object/apply:os.system",
    b"- ",
    b": ",
    b"? ",
    b"<<: *a",
    b"{",
    b"[",
    b"|\n",
    b"---\n",
    b".nan",
    b".inf",
    b"1e999",
    b"2001-99-99",
    b"9" * 5000,
    b"[" * 3000,
    b"'",
    b'"',
)


def _parameters() -> Any:
    return random_parameters(CONFIG, seed=0)


def checkpoint_mended(data: bytes) -> bytes:
    """Return a checkpoint whose comment holds the checksum of what is before it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        length = len(archive.comment)
    body = data[: len(data) - length - 2]
    digest = hashlib.sha256(body + b"\0\0").hexdigest().encode()
    comment = data[len(data) - length :][: length - 64] + digest
    return body + len(comment).to_bytes(2, "little") + comment


def vocabulary_mended(data: bytes) -> bytes:
    """Return a vocabulary with the checksum of its symbols."""
    document = json.loads(data)
    content = json.dumps([document["unit"], *document["symbols"]], ensure_ascii=True, separators=(",", ":"))
    document["sha256"] = hashlib.sha256(content.encode("ascii")).hexdigest()
    return json.dumps(document).encode()


def entry_mended(data: bytes) -> bytes:
    """Return a cache entry whose header has its checksum, and that of the ids behind it."""
    body = data[8 : idcache.HEADER_BYTES]
    try:
        header = json.loads(body)
        header["crc32"] = zlib.crc32(data[idcache.HEADER_BYTES :])
        body = json.dumps(header).encode().ljust(idcache.HEADER_BYTES - 9)[: idcache.HEADER_BYTES - 9] + b"\n"
    except (ValueError, TypeError):
        pass
    return f"{zlib.crc32(body):08x}".encode() + body + data[idcache.HEADER_BYTES :]


# --- valid files


def _checkpoint(folder: Path) -> None:
    write_checkpoint(folder / "checkpoint.pt", CONFIG)


def _nvidia(folder: Path, *, legacy: bool, lineage: str = "2023") -> None:
    write_nvidia(folder / "checkpoint.pt", CONFIG, _parameters(), legacy=legacy, lineage=lineage)


def _kimiyoung(folder: Path, *, legacy: bool) -> None:
    write_kimiyoung(folder / "model.pt", CONFIG, _parameters(), legacy=legacy)
    _words(folder)


def _words(folder: Path) -> None:
    (folder / "words.txt").write_text("\n".join(["<eos>", *(f"w{i}" for i in range(CONFIG.vocab_size - 1))]) + "\n")


def _huggingface(folder: Path, *, form: Any) -> None:
    write_huggingface(folder, CONFIG, _parameters(), form=form)


def _manifest(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"graph")
    write_manifest(folder, MANIFEST, ["model.onnx"])


def _vocabulary(folder: Path) -> None:
    Vocabulary(["<eos>", "<unk>", "a", "é", "\u2028"], unit="word").save(folder / "vocabulary.json")


def _yaml(folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "model:\n  n_layer: 2\n  cutoffs: [5, 9]\n  dropout: 0.1\ndata: {dataset: text}\noptim:\n  lr: 1e-3\ntrain:\n  seed: 3\n"
    )


def _archive(folder: Path, kind: str) -> None:
    made = io.BytesIO()
    texts = {f"wikitext-2/wiki.{name}.tokens": b" = A = \n\n some <unk> words \n" * 3 for name in ("train", "valid", "test")}
    if kind == "zip":
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in texts.items():
                archive.writestr(name, text)
    else:
        with tarfile.open(fileobj=made, mode="w:gz") as archive:
            for name, text in texts.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text))
    (folder / "archive").write_bytes(made.getvalue())


_KEY = idcache.IdCacheKey(text_sha256="a" * 64, tokenizer="words", vocabulary_sha256="b" * 64)


def _entry(folder: Path) -> None:
    def write(path: Path, offset: int) -> dict[str, Any]:
        ids = np.arange(50, dtype=np.uint16)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(ids.tobytes())
        return {"dtype": "<u2", "n_tokens": 50, "n_unknown": 0, "n_words": 50}

    idcache.write_entry(folder / "ids.bin", _KEY, write)


def _info(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    for name in ("train", "valid", "test"):
        (source / f"wiki.{name}.tokens").write_text(" = A = \n some words \n" * 3)
    prepare("wt103", folder / "made", source)


def _text(folder: Path) -> None:
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text("a few words é\nand another line\n" * 4)


# --- reading


def _import(source: str, vocabulary: str | None = None) -> Any:
    def read(folder: Path) -> object:
        path = folder / source if source else folder
        return import_checkpoint(ImportRequest(source=path, vocabulary=folder / vocabulary if vocabulary else None))

    return read


def _read_members(folder: Path) -> int:
    n_bytes = 0
    for member in members(folder / "archive"):
        n_bytes += sum(len(block) for block in member.blocks(1 << 21))
    return n_bytes


def _prepare(folder: Path) -> object:
    made = folder / "made"
    for path in made.glob("*") if made.is_dir() else ():
        path.unlink()
    return prepare("wt103", made, folder / "archive")


def _load_text(folder: Path) -> object:
    return load_corpus(folder, get_dataset("text"), cache_dir=folder / "cache", processes=1).vocabulary


def _read_result(folder: Path) -> object:
    result = BenchResult.read(folder / "benchmark.json")
    return result.invalid, result.failed, result.verified, result.to_json()


def _read_receipt(folder: Path) -> object:
    made = Receipt.read(folder / "receipt.json")
    return made.verdict, made.perplexity_interval, made.summary()


def _result(folder: Path) -> None:
    result_of(rows_of((1,), n=8)).write(folder / "benchmark.json")


def _receipt(folder: Path) -> None:
    receipt().write(folder / "receipt.json")


_BOMB = b"model:\n" + b"".join(b"  x%d: &x%d [%s]\n" % (i, i, b",".join([b"*x%d" % (i - 1)] * 9) if i else b"1") for i in range(9))
_GZIP_BOMB = gzip.compress(bytes(1 << 22))


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "checkpoint",
            "checkpoint.pt",
            _checkpoint,
            lambda f: load_model(f / "checkpoint.pt"),
            mend=checkpoint_mended,
            tokens=_PICKLE,
            kind="zip",
        ),
        Target(
            "import-nvidia", "checkpoint.pt", functools.partial(_nvidia, legacy=False), _import("checkpoint.pt"), tokens=_PICKLE, kind="zip"
        ),
        Target("import-nvidia-legacy", "checkpoint.pt", functools.partial(_nvidia, legacy=True), _import("checkpoint.pt"), tokens=_PICKLE),
        Target(
            "import-authors", "model.pt", functools.partial(_kimiyoung, legacy=False), _import("", "words.txt"), tokens=_PICKLE, kind="zip"
        ),
        Target("import-authors-legacy", "model.pt", functools.partial(_kimiyoung, legacy=True), _import("", "words.txt"), tokens=_PICKLE),
        Target("import-hf-config", "config.json", functools.partial(_huggingface, form="safetensors"), _import(""), kind="json"),
        Target("import-hf-bin", "pytorch_model.bin", functools.partial(_huggingface, form="bin"), _import(""), tokens=_PICKLE, kind="zip"),
        Target(
            "import-hf-vocab",
            "vocab.pkl",
            lambda f: write_vocab_pkl(f / "vocab.pkl", [f"w{i}" for i in range(9)]),
            lambda f: read_symbols(f / "vocab.pkl"),
            tokens=_PICKLE,
        ),
        Target(
            "safetensors",
            "model.safetensors",
            functools.partial(_huggingface, form="safetensors"),
            lambda f: [t.load() for t in read_safetensors(f / "model.safetensors").values()],
            tokens=(b'"F32"', b'"shape"', b'"data_offsets"', b"[", b"]", b"-1", b"1e9", b"99999999999999999999"),
        ),
        Target(
            "symbols",
            "words.txt",
            _words,
            lambda f: read_symbols(f / "words.txt"),
            tokens=(b"{", b"[", b"PK\x03\x04", b"\x80\x02", b"\xef\xbb\xbf"),
        ),
        Target(
            "vocabulary",
            "vocabulary.json",
            _vocabulary,
            lambda f: Vocabulary.load(f / "vocabulary.json"),
            mend=vocabulary_mended,
            kind="json",
        ),
        Target("manifest", "manifest.json", _manifest, lambda f: verify(f), mend=document_mended, kind="json"),
        Target("receipt", "receipt.json", _receipt, _read_receipt, mend=document_mended, kind="json"),
        Target("bench-result", "benchmark.json", _result, _read_result, kind="json"),
        Target("config", "run.yaml", _yaml, lambda f: resolve(str(f / "run.yaml"), environment={}), seeds=(_BOMB,), tokens=_YAML),
        Target("archive-zip", "archive", functools.partial(_archive, kind="zip"), _read_members, kind="zip"),
        Target("archive-tar", "archive", functools.partial(_archive, kind="tar"), _read_members, seeds=(_GZIP_BOMB,)),
        Target("prepare", "archive", functools.partial(_archive, kind="zip"), _prepare, kind="zip"),
        Target("id-cache", "ids.bin", _entry, lambda f: idcache.open_entry(f / "ids.bin", _KEY), mend=entry_mended, refuses=False),
        Target("corpus-info", "made/corpus.json", _info, lambda f: read_info(f / "made"), kind="json", refuses=False),
        Target("text", "train.txt", _text, _load_text, tokens=(b"\x00", b"\xff\xfe", b"\r", b"\n", b"\xe2\x80\xa8", b"<unk>", b"<eos>")),
        Target(
            "onnx",
            "model.onnx",
            lambda f: export(f, "onnx"),
            open_onnx,
            tokens=ONNX,
            cost=20,
        ),
        *ARTIFACTS,
    )
}
