"""`txl import`: makes a checkpoint of another family one of ours, with evidence that it is the same model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, cast

import click

from txl_deploy.cli.options import echo_json, json_option, verbosity_options
from txl_train.data.datasets import DATASETS
from txl_train.errors import UsageError, ValidationError


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC")
@click.option(
    "--out",
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The checkpoint to write, such as imported.pt.",
)
@click.option(
    "--from",
    "format_name",
    type=click.Choice(["auto", "nvidia", "kimiyoung", "huggingface"]),
    default="auto",
    show_default=True,
    help="Whose it is: NVIDIA's (2019 and 2023), the authors' (torch.save of the model), or Hugging Face's (a folder).",
)
@click.option(
    "--vocab",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Its tokens: one a line, or vocabulary.json, vocab.pkl, cache.pt.  [default: what SRC holds]",
)
@click.option(
    "--dataset",
    metavar="NAME",
    help=f"How its text becomes tokens: {', '.join(DATASETS)}; or wt2, wt103 counted over all splits.  [default: as recorded in SRC]",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of its text, for evaluations; with --dataset the vocabulary is counted there if nothing else has it.",
)
@click.option(
    "--reverse-clusters", is_flag=True, help="Its tail clusters are in the other order than its family writes them: read them so."
)
@click.option("--force", is_flag=True, help="Write it even where the evidence is against the order of its clusters.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there already.")
@json_option
@verbosity_options
def command(
    source: Path,
    out: Path,
    format_name: str,
    vocab: Path | None,
    dataset: str | None,
    data: Path | None,
    reverse_clusters: bool,
    force: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make SRC, a Transformer-XL of NVIDIA, of its authors or of Hugging Face, a checkpoint of txl.

    No code in SRC is run, and whatever in it is not understood is refused by name. To see that the model is the same, a text is scored
    with its tail clusters in the order of its family and in the other one; if the other is better, nothing is written, and the exit
    code is 1.
    """
    from txl_train.checkpoint import save_checkpoint
    from txl_train.interop.importer import Format, ImportRequest, describe, import_checkpoint

    _check_replaceable(out, source, overwrite)
    imported = import_checkpoint(
        ImportRequest(
            source=source,
            format=cast(Format, format_name),
            vocabulary=vocab,
            dataset=dataset,
            data=data,
            reverse_clusters=reverse_clusters,
        )
    )
    contradicted = imported.identity.verdict == "contradicted"
    document: dict[str, Any] = describe(imported)
    written = not contradicted or force
    if written:
        save_checkpoint(out, imported.checkpoint)
    document["out"] = str(out) if written else None
    if as_json:
        echo_json(document)
    else:
        for line in _lines(document):
            click.echo(line)
    if not written:
        raise ValidationError(
            f"The evidence is against the order of its tail clusters, so {out} was not written: perplexity "
            f"{imported.identity.perplexity:.3f} as imported, {imported.identity.perplexity_reversed:.3f} reversed.",
            remedy="Read them in the other order with `--reverse-clusters`, or write it as it is with `--force`.",
        )


def _check_replaceable(out: Path, source: Path, overwrite: bool) -> None:
    if not out.parent.is_dir():
        raise UsageError(f"There is no folder {out.parent} to write {out.name} into.", remedy="Make it, or name another file with `--out`.")
    if not out.exists():
        return
    if source.exists() and out.samefile(source):
        raise UsageError(f"{out} is what is to be imported.", remedy="Name another file with `--out`.")
    if not overwrite:
        raise UsageError(f"{out} exists already.", remedy="Name another file with `--out`, or replace it with `--overwrite`.")
    from txl_train.checkpoint import load_checkpoint

    load_checkpoint(out)  # replaces checkpoints only: another file is an error here


def _lines(document: dict[str, Any]) -> list[str]:
    """Return the summary: what it is, what was found, the evidence, what to do next."""
    model, vocabulary, identity, progress = document["model"], document["vocabulary"], document["identity"], document["progress"]
    sizes = (
        f"{model['n_layer']} layers, d_model {model['d_model']}, {model['n_head']} heads of {model['d_head']}, d_inner {model['d_inner']}"
    )
    kind = "" if model["attn_type"] == "relative" else f", attention {model['attn_type']}"
    clusters = f"cutoffs {', '.join(map(str, model['cutoffs']))}, div_val {model['div_val']}" if model["cutoffs"] else "plain softmax"
    rows = [
        ("source", f"{document['source']} ({document['form']})"),
        ("model", f"{document['parameters']:,} parameters: {sizes}{kind}; {clusters}"),
        ("lengths", _lengths(document)),
        ("vocabulary", f"{vocabulary['tokens']:,} {vocabulary['unit']}s, from {vocabulary['from']}; data set {document['dataset']}"),
        ("trained", _trained(progress)),
        ("text", _text(identity)),
        *_perplexities(identity),
        ("identity", f"{identity['verdict']}. {identity['reason']}"),
        *(("note", note) for note in document["notes"]),
    ]
    lines = [f"{name:<12}{text}" for name, text in rows if text]
    if document["out"] is None:
        return lines
    out = shlex.quote(document["out"])
    data = "" if document["data"] else " --data DIR"
    return [
        *lines,
        f"{'written':<12}{document['out']}",
        "",
        "Next:",
        f"  txl eval --checkpoint {out}{data}",
        f"  txl export --checkpoint {out} --format onnx --out DIR",
        f"  txl train --init-from {out} --work-dir DIR{data}",
        f"  txl inspect {out}",
    ]


def _lengths(document: dict[str, Any]) -> str:
    model = document["model"]
    rule = f", same_length over {model['same_length_rule'].replace('+', ' + ')} keys" if model["same_length"] else ""
    clamp = "none" if model["clamp_len"] is None else model["clamp_len"]
    return f"eval_tgt_len {document['eval_tgt_len']}, mem_len {model['mem_len']}, clamp_len {clamp}{rule}"


def _trained(progress: dict[str, Any]) -> str:
    if not progress.get("step"):
        return ""
    loss = progress.get("best_valid_nll")
    return f"{progress['step']:,} steps" + ("" if loss is None else f", best validation loss {loss:.4f} nats a token")


def _text(identity: dict[str, Any]) -> str:
    if not identity["n_tokens"]:
        return ""
    return f"{identity['text']}: {identity['n_tokens']:,} tokens scored, {identity['n_unknown']:,} of its tokens not in the vocabulary"


def _perplexities(identity: dict[str, Any]) -> list[tuple[str, str]]:
    names = (("perplexity", "perplexity_reversed", "perplexity_shuffled"), ("as imported", "clusters reversed", "tokens shuffled"))
    return [("", f"{identity[key]:12,.3f}  {name}") for key, name in zip(*names) if identity[key] is not None]
