"""`txl data`: writes a built-in data set, or counts what is in one and how far simple models come on it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from txl_deploy.cli.options import dataset_options, echo_json, json_option, split_option, verbosity_options
from txl_train.data.datasets import DATASETS, get_dataset
from txl_train.errors import UsageError

if TYPE_CHECKING:
    from txl_train.data.corpus import Corpus

log = logging.getLogger(__name__)


@click.group("data")
def command() -> None:
    """Build a data set, or count what is in one."""


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
@json_option
@verbosity_options
def prepare(dataset: str, out: Path, as_json: bool) -> None:
    """Write a data set that comes with Python: pydoc.

    The others are not built here: their files are put into a folder, which is named with --data.
    """
    from txl_train.data.pydoc import build

    spec = get_dataset(dataset)
    if not spec.built_in:
        built_in = ", ".join(name for name, other in DATASETS.items() if other.built_in)
        raise UsageError(
            f"`{dataset}` does not come with Python, so it cannot be built; {built_in} can.",
            remedy=f"Put its {' '.join(spec.files.values())} into a folder and name that with `--data`.",
        )
    info = build(out)
    if as_json:
        echo_json({"directory": str(out), "dataset": dataset, **info.to_dict()})
        return
    for name, split in info.splits.items():
        click.echo(f"{out / spec.files[name]}  {split.lines:,} lines, {split.tokens:,} tokens, {split.types:,} different")


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
    help="Words seen fewer than N times in train.txt become <unk> (text and pydoc).  [default: 1]",
)
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
    corpus = _open(dataset, data, checkpoint, min_count)
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


def _open(dataset: str | None, data: Path | None, checkpoint: Path | None, min_count: int | None) -> Corpus:
    from txl_train.data.corpus import load_corpus

    if checkpoint is not None:
        from txl_deploy.corpora import ModelData, open_corpus
        from txl_train.checkpoint import load_checkpoint

        if min_count is not None:
            raise UsageError(
                "`--min-count` has no meaning beside `--checkpoint`, which has its vocabulary.", remedy="Leave one of them out."
            )
        loaded = load_checkpoint(checkpoint)
        return open_corpus(ModelData(loaded.dataset, loaded.vocabulary, loaded.data_folder), dataset=dataset, data=data)
    if dataset is None or data is None:
        raise UsageError(
            "It is not said which data set to look at.",
            remedy="Give `--dataset` and `--data DIR`, or a checkpoint that was trained on it with `--checkpoint`. "
            "`txl data prepare pydoc --out DIR` makes one.",
        )
    return load_corpus(data, get_dataset(dataset), min_count=min_count or 1)


def _count(corpus: Corpus, split: str) -> dict[str, Any]:
    import numpy as np

    log.info("counting %s", split)
    ids = corpus.ids(split)
    different = int(np.count_nonzero(np.bincount(ids, minlength=len(corpus.vocabulary))))
    return {"tokens": len(ids), "types": different, "oov": corpus.oov(split), "sha256": corpus.sha256(split)}


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
            per_char = "" if vocabulary["unit"] == "word" else f", {score['bits_per_char']:.5f} bits per {vocabulary['unit']}"
            figures = f"perplexity {score['perplexity']:.3f}{per_char} ({score['n_tokens']:,} tokens scored)"
            click.echo(f"{name} model of train on {score['split']}: {figures}")
