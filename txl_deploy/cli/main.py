"""The command `txl`: finds commands by name, and ends every run with a documented exit code.

A command's module is imported when the command is called, so `txl --help` needs neither PyTorch nor numpy. What the commands do
stands in their own files; what their options share stands in `options`.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence

import click

import txl_train
from txl_deploy.cli.lazy import LazyGroup
from txl_deploy.cli.options import set_up_logging, verbosity, verbosity_options
from txl_train.errors import EnvironmentUnfitError, TxlError, UsageError
from txl_train.exhaustion import as_unfit

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("txl_deploy.cli.train:command", "Train a model and write its checkpoints."),
    "eval": ("txl_deploy.cli.eval:command", "Perplexity of a checkpoint or an exported model."),
    "export": ("txl_deploy.cli.export:command", "Write a checkpoint as ONNX, TorchScript or a TensorRT engine."),
    "parity": ("txl_deploy.cli.parity:command", "Prove that an exported model computes what its checkpoint does."),
    "bench": ("txl_deploy.cli.bench:command", "Latency, throughput and perplexity at several batch sizes."),
    "generate": ("txl_deploy.cli.generate:command", "Go on with a text, on any runtime."),
    "score": ("txl_deploy.cli.score:command", "Perplexity of each line, document or file of a text."),
    "report": ("txl_deploy.cli.report:command", "One page of tables and plots from measured results."),
    "data": ("txl_deploy.cli.data:command", "Build a data set, or count what is in one."),
    "import": ("txl_deploy.cli.import_:command", "Make a checkpoint of NVIDIA, the authors or Hugging Face one of ours."),
    "inspect": ("txl_deploy.cli.inspect:command", "Say what a checkpoint, an exported model or a graph is."),
    "verify": ("txl_deploy.cli.verify:command", "Recompute the checksums of an exported model."),
    "doctor": ("txl_deploy.cli.doctor:command", "What works on this machine, and what mends the rest."),
}

_LESS_MEMORY = {
    "": "Ask for less at a time: a smaller batch size, tgt_len or mem_len.",
    "eval": "Ask for less at a time: a smaller `--batch-size`, `--tgt-len` or `--mem-len`.",
    "score": "Ask for less at a time: a smaller `--batch-size` or `--tgt-len`.",
    "bench": "Leave out the larger ones of `--batch-sizes`, or lower `--tgt-len`.",
    "export": "Lower `--tgt-len` or `--mem-len`, or export on a machine with more memory.",
    "parity": "Lower `--batch-size`, or compare on a machine with more memory.",
    "generate": "Ask for less at a time: fewer `--num-samples`, or a smaller `--segment-len` or `--mem-len`.",
    "data": "Raise `--min-count` for a smaller vocabulary, or leave out the n-gram models with `--no-baselines`.",
}
"""By command: what helps where memory runs out. `train` says it itself."""
EXIT_BUG = 70
EXIT_CTRL_C = 130
EXIT_BROKEN_PIPE = 141

log = logging.getLogger(__name__)


def dashes(token: str) -> str:
    """Return an option's name with dashes, so that the underscore spellings of older scripts are understood."""
    return token.replace("_", "-")


@click.command(
    "txl", cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": dashes}
)
@verbosity_options
@click.version_option(txl_train.__version__, prog_name="txl", message="%(prog)s %(version)s")
def cli() -> None:
    """Train a Transformer-XL, export it, prove that the export is the same model, and measure it.

    Results go to standard output, progress to standard error. Exit codes: 0 done and valid, 1 a check failed, 2 wrong usage,
    3 this machine lacks something, 4 a file is unreadable or was changed, 130 Ctrl-C.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run `txl` with these arguments, those of the process if `None`, and return its exit code; every error is printed here."""
    if "_TXL_COMPLETE" in os.environ:
        cli.main(prog_name="txl")  # the shell asks for completions
    logging.captureWarnings(True)
    set_up_logging()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to end
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OSError as error:  # the last flush: a full disk, mostly
        click.echo(f"Error: The result could not be written: {error.strerror}.", err=True)
        return EnvironmentUnfitError.exit_code
    return code


def _run(arguments: list[str]) -> int:
    context: click.Context | None = None
    try:
        with cli.make_context("txl", arguments) as context:
            cli.invoke(context)
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        if sys.stderr is not None and sys.stderr.isatty():
            click.echo(err=True)  # ends the line on which the terminal shows ^C
        click.echo("Interrupted.", err=True)
        return EXIT_CTRL_C
    except click.ClickException as error:
        error.show()
        return UsageError.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        shown = _as_txl_error(error, None if context is None else context.invoked_subcommand)
        if os.environ.get("TXL_DEBUG", "0") not in ("", "0") or verbosity(context) > 1:
            log.error("Traceback of the error below:", exc_info=error)
        if shown is None:
            name = f"{type(error).__name__}: {error}".strip().rstrip(":")
            _print_error(f"{name}\nThis is a bug in txl. Run the command again with TXL_DEBUG=1 and report it with what that prints.")
            return EXIT_BUG
        _print_error(str(shown))
        return shown.exit_code


def _as_txl_error(error: Exception, command: str | None) -> TxlError | None:
    """Return the error as one of ours: itself, or a translation where the cause is the machine's; `None` for a bug."""
    if isinstance(error, TxlError):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name:
        from txl_deploy.doctor import install_command

        command = install_command(error.name.partition(".")[0])
        if command is not None:
            return EnvironmentUnfitError(
                f"This needs `{error.name}`, which is not installed, or the package is too old.", remedy=f"Install it with `{command}`."
            )
    if told := as_unfit(error, _LESS_MEMORY.get(command or "", _LESS_MEMORY[""])):
        return told
    if isinstance(error, OSError):
        where = "" if error.filename is None else f": {error.filename}"
        return EnvironmentUnfitError(
            f"{error.strerror or error}{where}.",
            remedy="Check the path, its permissions and the free disk space; TXL_DEBUG=1 shows what was tried.",
        )
    return None


def _print_error(text: str) -> None:
    click.echo(f"Error: {text}", err=True)


if __name__ == "__main__":  # `python -m txl_deploy.cli.main`, where the script `txl` is not on the path
    sys.exit(main())
