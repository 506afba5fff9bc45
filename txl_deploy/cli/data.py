"""`txl data`: makes the folder of a data set, tokenises raw text, or counts what is in a folder and how far simple models come on it."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from txl_deploy.cli.options import dataset_options, echo_json, json_option, split_option, verbosity_options
from txl_train.data.datasets import DATASETS, DatasetSpec, get_dataset
from txl_train.errors import DataError, UsageError

if TYPE_CHECKING:
    from txl_train.data.corpus import Corpus, VocabKind
    from txl_train.data.prepared import Prepared

log = logging.getLogger(__name__)


@click.group("data")
def command() -> None:
    """Make the folder of a data set, tokenise raw text, or count what is in a folder."""


@command.command("prepare")
@click.argument("dataset", type=click.Choice(list(DATASETS)))
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder to write train.txt, valid.txt and test.txt to.",
)
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Archive (.zip, .tar.gz, .gz), text file or folder to make it from.  [default: download it]",
)
@json_option
@verbosity_options
def prepare(dataset: str, out: Path, source: Path | None, as_json: bool) -> None:
    """Make the folder of a data set: wt103, lm1b, enwik8 and text8 are downloaded or taken from --source, pydoc comes with Python.

    wt103 also takes WikiText-2; text8 any text or Wikipedia's XML, which it puts through its filter; all of them a folder of train.txt,
    valid.txt and test.txt. enwik8 and text8 are cut as usual, 90, 5 and 5 million; a smaller text in the same proportions. A folder that is
    there already is checked and left as it is; after an interruption, the same command goes on.
    """
    spec = get_dataset(dataset)
    if spec.built_in:
        if source is not None:
            raise UsageError(f"`{dataset}` comes with Python and is made of nothing else.", remedy="Leave `--source` out.")
        _prepare_built_in(spec, out, as_json)
        return
    if dataset == "text":
        raise UsageError(
            "`text` is any folder of yours, so there is nothing to prepare.",
            remedy=f"Put {' '.join(spec.files.values())} into a folder and name that with `--data`. "
            "`txl data tokenize` cuts raw text into words.",
        )
    from txl_train.data.prepare import prepare as make

    prepared = make(dataset, out, source)
    if as_json:
        echo_json({"directory": str(out), "already_there": prepared.already_there, **prepared.to_dict()})
    else:
        _print_prepared(prepared, out)


def _prepare_built_in(spec: DatasetSpec, out: Path, as_json: bool) -> None:
    from txl_train.data.pydoc import build

    info = build(out)
    if as_json:
        echo_json({"directory": str(out), "dataset": spec.name, **info.to_dict()})
        return
    for name, split in info.splits.items():
        click.echo(f"{out / spec.files[name]}  {split.lines:,} lines, {split.tokens:,} tokens, {split.types:,} different")


def _print_prepared(prepared: Prepared, out: Path) -> None:
    source = prepared.source
    checksum = f"  sha256 {source['sha256']}" if "sha256" in source else ""
    there = "  (there already)" if prepared.already_there else ""
    click.echo(f"{prepared.edition or prepared.dataset} from {source['given']}{checksum}{there}")
    for split in prepared.splits.values():
        click.echo(f"{out / split.file}  {split.bytes:,} bytes, {split.lines:,} lines, {split.tokens:,} tokens  sha256 {split.sha256}")
    for name, sha256 in prepared.files.items():
        click.echo(f"{out / name}  sha256 {sha256}")
    for note in prepared.notes:
        click.echo(f"Note: {note}", err=True)


@command.command("tokenize")
@click.option(
    "--dataset", type=click.Choice([name for name in DATASETS if name != "text"]), required=True, help="Whose tokens the text becomes."
)
@click.argument("file", type=click.File("rb"), default="-")
@verbosity_options
def tokenize(dataset: str, file: BinaryIO) -> None:
    """Turn raw text (FILE or standard input, UTF-8) into tokens as the data set has them, on standard output.

    Line by line, so a file may be of any size. For raw text only: what is tokenised already would be cut once more.
    """
    from txl_train.data.tokenizers import tokenized

    for piece in tokenized(_lines(file, as_bytes=dataset == "enwik8"), get_dataset(dataset)):
        sys.stdout.buffer.write(piece.encode())


def _lines(file: Iterable[bytes], *, as_bytes: bool) -> Iterator[str]:
    """Yield lines of UTF-8 text; with `as_bytes`, whatever is no UTF-8 is kept as it is."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8", "surrogateescape" if as_bytes else "strict")
        except UnicodeDecodeError as error:
            raise DataError(f"Line {number} is not UTF-8 text ({error.reason}).", remedy="Convert the text to UTF-8.") from error


@command.command("stats")
@dataset_options
@split_option
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Take vocabulary, data set and folder from this checkpoint."
)
@click.option(
    "--min-count",
    type=click.IntRange(min=1),
    metavar="N",
    help="Words seen fewer than N times in train.txt become <unk> (text, pydoc, lm1b).  [default: 1]",
)
@click.option("--vocab", type=click.Choice(["word", "bpe"]), help="Count the data set's own tokens or GPT-2's subwords.  [default: word]")
@click.option(
    "--baselines/--no-baselines",
    default=True,
    show_default=True,
    help="Score --split with a unigram and a trigram model of train.txt. For a hundred million tokens this takes minutes and some 10 GiB.",
)
@click.option("--out", "-o", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Also write the JSON document to FILE.")
@json_option
@verbosity_options
def stats(
    dataset: str | None,
    data: Path | None,
    split: str,
    checkpoint: Path | None,
    min_count: int | None,
    vocab: VocabKind | None,
    baselines: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Count tokens, types and unknown words of each split, and the perplexity of a unigram and a trigram model.

    The simple models score the tokens that `txl eval` scores, over the same vocabulary, so the perplexities may be set side by side.
    """
    from txl_train.files import check_replaceable, write_json

    if out is not None:
        check_replaceable(out, b"{")
    corpus = _open(dataset, data, checkpoint, min_count, vocab)
    document: dict[str, Any] = {
        "dataset": corpus.spec.name,
        "data": str(corpus.directory),
        "vocabulary": {"tokens": len(corpus.vocabulary), "unit": corpus.vocabulary.unit, "sha256": corpus.vocabulary.sha256},
        "splits": {name: _count(corpus, name) for name in corpus.spec.files},
    }
    if baselines:
        document |= _score(corpus, split)
    if out is not None:
        write_json(out, document)
    if as_json:
        echo_json(document)
    else:
        _print(document)


def _open(dataset: str | None, data: Path | None, checkpoint: Path | None, min_count: int | None, vocab: VocabKind | None) -> Corpus:
    from txl_train.data.corpus import load_corpus

    if checkpoint is not None:
        from txl_deploy.corpora import ModelData, open_corpus
        from txl_train.checkpoint import load_checkpoint

        for option, value in (("--min-count", min_count), ("--vocab", vocab)):
            if value is not None:
                raise UsageError(
                    f"`{option}` has no meaning beside `--checkpoint`, which has its vocabulary.", remedy="Leave one of them out."
                )
        loaded = load_checkpoint(checkpoint)
        return open_corpus(ModelData(loaded.dataset, loaded.vocabulary, loaded.data_folder), dataset=dataset, data=data)
    if dataset is None or data is None:
        raise UsageError(
            "It is not said which data set to look at.",
            remedy="Give `--dataset` and `--data DIR`, or a checkpoint that was trained on it with `--checkpoint`. "
            "`txl data prepare pydoc --out DIR` makes one.",
        )
    return load_corpus(data, get_dataset(dataset), min_count=min_count or 1, vocab=vocab or "word")


def _count(corpus: Corpus, split: str) -> dict[str, Any]:
    import numpy as np

    log.info("counting %s", split)
    ids = corpus.ids(split)
    different = int(np.count_nonzero(np.bincount(ids, minlength=len(corpus.vocabulary))))
    return {
        "tokens": len(ids),
        "words": corpus.n_words(split),
        "types": different,
        "oov": corpus.oov(split),
        "sha256": corpus.sha256(split),
    }


def _score(corpus: Corpus, split: str) -> dict[str, Any]:
    from txl_train.data.ngram import trigram_perplexity, unigram_perplexity
    from txl_train.metrics import bits_per_char

    train, scored, size = corpus.ids("train"), corpus.ids(split), len(corpus.vocabulary)
    document: dict[str, Any] = {}
    for name, model in (("unigram", unigram_perplexity), ("trigram", trigram_perplexity)):
        log.info("scoring %s with a %s model of train", split, name)
        perplexity = model(train, scored, size)
        nll_nats = math.log(perplexity)
        document[name] = {
            "split": split,
            "n_tokens": len(scored) - 1,
            "nll_nats_per_token": nll_nats,
            "perplexity": perplexity,
            "bits_per_char": bits_per_char(nll_nats),
        }
    return document


def _print(document: dict[str, Any]) -> None:
    vocabulary = document["vocabulary"]
    click.echo(f"{document['dataset']} in {document['data']}: {vocabulary['tokens']:,} different {vocabulary['unit']}s")
    click.echo(f"{'split':<6} {'tokens':>13} {'different':>10} {'unknown':>9}")
    for name, counts in document["splits"].items():
        click.echo(f"{name:<6} {counts['tokens']:>13,} {counts['types']:>10,} {counts['oov']:>9,}")
    for name in ("unigram", "trigram"):
        if name in document:
            score = document[name]
            per_char = f", {score['bits_per_char']:.5f} bits per {vocabulary['unit']}" if vocabulary["unit"] in ("char", "byte") else ""
            figures = f"perplexity {score['perplexity']:.3f}{per_char} ({score['n_tokens']:,} tokens scored)"
            click.echo(f"{name} model of train on {score['split']}: {figures}")
