"""Options that several commands share, and how a command prints its result.

A command that uses these decorators spells, explains and checks an option like every other. Knows nothing of what commands do.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from txl_train.data.datasets import DATASETS, SPLITS

F = TypeVar("F", bound=Callable[..., Any])

_VERBOSITY = "txl.verbosity"


def verbosity_options(command: F) -> F:
    """Add `-v/--verbose` and `-q/--quiet`, which set the level of the log on standard error and reach the command in no other way."""
    command = click.option(
        "-q", "--quiet", count=True, expose_value=False, callback=_set_quiet, help="Log less on standard error; twice: errors only."
    )(command)
    return click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_set_verbose,
        help="Log more on standard error; twice: tracebacks of errors too.",
    )(command)


def json_option(command: F) -> F:
    """Add `--json` as the argument `as_json: bool`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as exactly one JSON document on standard output.")(
        command
    )


def device_option(command: F) -> F:
    """Add `--device` as the argument `device: str`, one of auto, cpu, cuda."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where to compute; auto means a GPU if there is one.",
    )(command)


def threads_option(command: F) -> F:
    """Add `--threads` as the argument `threads: int | None`."""
    return click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads to compute with.  [default: what the runtime chooses]"
    )(command)


class _Dtype(click.Choice[str]):
    """fp32, fp16 or int8; bf16, which training knows, is refused with the reason."""

    def __init__(self) -> None:
        super().__init__(["fp32", "fp16", "int8"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "bf16":
            self.fail("bf16 is for training only: exported models and their runtimes are in fp32, fp16 or int8.", param, ctx)
        return str(super().convert(value, param, ctx))


def dtype_option(what: str) -> Callable[[F], F]:
    """Add `--dtype` as the argument `dtype: str | None`, one of fp32, fp16, int8; `what` says what has it and what it is by default."""
    return click.option("--dtype", type=_Dtype(), help=f"Type of weights and matrix products (int8: of linear layers, on a CPU) {what}")


def dataset_options(command: F) -> F:
    """Add `--dataset` (`str | None`) and `--data` (`Path | None`): which text, and the folder it lies in."""
    command = click.option(
        "--data",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder of train.txt, valid.txt and test.txt.  [default: where the data set was found or built in training]",
    )(command)
    return click.option(
        "--dataset",
        type=click.Choice(list(DATASETS)),
        help="How the text becomes tokens: pydoc is built in, text is any folder of text.  [default: the checkpoint's]",
    )(command)


def split_option(command: F) -> F:
    """Add `--split` as the argument `split: str`, one of train, valid, test."""
    return click.option(
        "--split", type=click.Choice(list(SPLITS)), default="test", show_default=True, help="Which of the three files to read."
    )(command)


def data_options(command: F) -> F:
    """Add `--dataset`, `--data` and `--split`."""
    return dataset_options(split_option(command))


def echo_json(document: Any) -> None:
    """Print `document` as one JSON document on standard output. A number that is not finite is a `ValueError`: JSON has none."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def command_line() -> str:
    """Return the command as typed, so that it can be given again; the home folder becomes `~`, which says nothing of who typed it."""
    home = os.path.expanduser("~").rstrip(os.sep)

    def written(word: str) -> str:
        return "~" + shlex.quote(word[len(home) :]) if home and word.startswith(home + os.sep) else shlex.quote(word)

    return " ".join(written(word) for word in ["txl", *sys.argv[1:]])


def verbosity(context: click.Context | None) -> int:
    """Return the number of `-v` less the number of `-q` that were given, 0 without a context."""
    return 0 if context is None else int(context.meta.get(_VERBOSITY, 0))


def set_up_logging(level: int = 0) -> None:
    """Send the log to standard error: progress by default, less with a negative `level`, more with a positive one.

    Calling it again changes the level only. Other libraries are heard from warnings on, or one step earlier with each `-v` after the first.
    """
    root = logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        handler = _StderrHandler()
        handler.setFormatter(_Formatter())
        root.addHandler(handler)
    ours = {-1: logging.WARNING, 0: logging.INFO}.get(level, logging.ERROR if level < 0 else logging.DEBUG)
    root.setLevel(logging.INFO if level > 1 else max(ours, logging.WARNING))
    for package in ("txl_train", "txl_deploy"):
        logging.getLogger(package).setLevel(ours)
    for chatty in ("py.warnings", "torch.onnx._internal"):  # deprecations, and packages that could be used too
        logging.getLogger(chatty).setLevel(logging.WARNING if level > 0 else logging.ERROR)


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at that moment: a progress bar puts itself there to keep below the log lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _Formatter(logging.Formatter):
    """The bare message for progress, since its lines have readers; from warnings on, the level before it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.capitalize()}: {text}" if record.levelno >= logging.WARNING else text


def _set_verbose(context: click.Context, parameter: click.Parameter, count: int) -> None:
    _add_verbosity(context, count)


def _set_quiet(context: click.Context, parameter: click.Parameter, count: int) -> None:
    _add_verbosity(context, -count)


def _add_verbosity(context: click.Context, steps: int) -> None:
    context.meta[_VERBOSITY] = context.meta.get(_VERBOSITY, 0) + steps
    set_up_logging(context.meta[_VERBOSITY])
